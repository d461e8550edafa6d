"""The errors a user may meet: one root, and the ones that need no TensorFlow checkpoint to happen.

Every message says what is wrong, where, and what to do. ``porting.errors`` adds the rest of the family.
"""

from __future__ import annotations


class EfficientDetError(Exception):
    """The root of the family: bad input, or a job that cannot be done.

    Command lines print the message alone and exit with status 2. The message is always one line: characters
    that are not printable, in names quoted from files, are escaped.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


#: The former name of the root, kept for callers.
PortingError = EfficientDetError


def one_line(text: str) -> str:
    """``text``, its characters that are not printable escaped: ``\\n``, ``\\x1b``, ``\\udc80``."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text
    )


def first_line(error: Exception) -> str:
    """The first line of another library's error, for a message of one line; its type if it has no text."""
    if isinstance(error, RecursionError):
        return "its values are nested too deeply"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class ConfigError(EfficientDetError):
    """A hyper-parameter has a value no EfficientDet can have. The message names it."""


class WeightsError(EfficientDetError):
    """A PyTorch weight file is missing, damaged, or does not fit the model."""


class OutputError(EfficientDetError):
    """A result could not be written. Nothing half-written is left behind."""


class Reason(Exception):  # noqa: N818
    """Internal: a problem without its file name; the caller adds the file and raises an EfficientDetError."""
