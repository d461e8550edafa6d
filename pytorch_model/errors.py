"""The root of the one family of errors a user may meet, and those that need no TensorFlow file to happen.

Every message says what is wrong, where, and what to do. ``porting.errors`` adds the rest of the family.
"""

from __future__ import annotations


class PortingError(Exception):
    """Bad input or a refused job. Command lines print the message alone and exit with status 2.

    The message is one line, whatever names from files it quotes: signs that are not printable are escaped.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def one_line(text: str) -> str:
    """``text`` with each sign that is not printable as Python escapes it: ``\\n``, ``\\x1b``, ``\\udc80``."""
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode("ascii") for sign in text
    )


class ConfigError(PortingError):
    """A hyper-parameter has a value no EfficientDet can have. The message names it."""


class WeightsError(PortingError):
    """A PyTorch weight file is missing, damaged, or does not fit the model."""


class Reason(Exception):  # noqa: N818
    """What is wrong, on its way to the one who knows where: it becomes part of a :class:`PortingError`."""
