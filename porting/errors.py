"""The one family of errors a user may meet. Each message says what is wrong, where, and what to do."""

from __future__ import annotations

from pytorch_model.errors import ConfigError, PortingError, WeightsError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "OutputError",
    "PortingError",
    "WeightsError",
]


class CheckpointError(PortingError):
    """A checkpoint file is missing, damaged, or not what it claims to be."""


class ConversionError(PortingError):
    """The checkpoint is readable but does not fit the model: a missing, unknown or misshapen variable."""


class OutputError(PortingError):
    """A result could not be written. Nothing half-written is left behind."""
