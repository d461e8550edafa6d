"""The one family of errors a user may meet. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

from pytorch_model.errors import ConfigError, PortingError, Reason, WeightsError

__all__ = [
    "CheckFailedError",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "OutputError",
    "PortingError",
    "Reason",
    "WeightsError",
]


class CheckpointError(PortingError):
    """A checkpoint file is missing, damaged, or not what it claims to be."""


class ConversionError(PortingError):
    """The checkpoint is readable but does not fit the model: a missing, unknown or misshapen variable."""


class CheckFailedError(ConversionError):
    """What was made does not do what it was made for. Command lines exit with status 1, not 2."""


class OutputError(PortingError):
    """A result could not be written. Nothing half-written is left behind."""
