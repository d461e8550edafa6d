"""The root of the one family of errors a user may meet, and the two that need no TensorFlow file to happen.

Every message says what is wrong, where, and what to do. ``porting.errors`` adds the rest of the family.
"""

from __future__ import annotations


class PortingError(Exception):
    """Bad input or a refused job. Command lines print the message alone and exit with status 2."""


class ConfigError(PortingError):
    """A hyper-parameter has a value no EfficientDet can have. The message names it."""


class WeightsError(PortingError):
    """A PyTorch weight file is missing, damaged, or does not fit the model."""
