"""The root of the one family of errors a user may meet, and those that need no TensorFlow file to happen.

Every message says what is wrong, where, and what to do. ``porting.errors`` adds the rest of the family.
"""

from __future__ import annotations


class PortingError(Exception):
    """Bad input or a refused job. Command lines print the message alone and exit with status 2."""


class ConfigError(PortingError):
    """A hyper-parameter has a value no EfficientDet can have. The message names it."""


class WeightsError(PortingError):
    """A PyTorch weight file is missing, damaged, or does not fit the model."""


class Reason(Exception):  # noqa: N818
    """What is wrong, on its way to the one who knows where: it becomes part of a :class:`PortingError`."""
