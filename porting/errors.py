"""All errors that a user may see. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

from pytorch_model.errors import (
    ConfigError,
    EfficientDetError,
    OutputError,
    PortingError,
    Reason,
    WeightsError,
)

__all__ = [
    "CheckFailedError",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "EfficientDetError",
    "OutputError",
    "PortingError",
    "Reason",
    "WeightsError",
]


class CheckpointError(EfficientDetError):
    """A checkpoint file is missing, damaged, or not what it claims to be."""


class ConversionError(EfficientDetError):
    """The checkpoint does not fit the model: a variable is missing, unknown or has a wrong shape."""


class CheckFailedError(ConversionError):
    """A result failed its check. Command lines exit with status 1, not 2."""
