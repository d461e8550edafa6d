"""The one family of errors a user may meet. Each message says what is wrong, where, and what to do."""

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
    """The checkpoint is readable but does not fit the model: a missing, unknown or misshapen variable."""


class CheckFailedError(ConversionError):
    """What was made does not do what it was made for. Command lines exit with status 1, not 2."""
