"""The errors a user may meet: the root class, and those that do not concern a TensorFlow checkpoint.

Every message says what is wrong, where, and what to do. ``porting.errors`` adds the other classes.
"""

from __future__ import annotations


class EfficientDetError(Exception):
    """The root of all errors here: bad input, or work that cannot be done.

    Command lines print only the message and exit with status 2. The message is always one line: characters
    that are not printable, in names quoted from files, are escaped.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


#: The former name of the root class, kept for callers.
PortingError = EfficientDetError


def one_line(text: str) -> str:
    """``text`` with unprintable characters escaped: ``\\n``, ``\\x1b``, ``\\udc80``."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def first_line(error: Exception) -> str:
    """The first line of another library's error, for a message of one line; its type if it has no text."""
    if isinstance(error, RecursionError):
        return "its values are nested too deeply"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class ConfigError(EfficientDetError):
    """A hyper-parameter has a value that is not possible. The message names it."""


class WeightsError(EfficientDetError):
    """A PyTorch weight file is missing, damaged, or does not fit the model."""


class OutputError(EfficientDetError):
    """A result could not be written. Nothing half-written is left behind."""


class Reason(Exception):  # noqa: N818
    """Internal: a problem without its file name; the caller adds the file and raises an EfficientDetError."""
