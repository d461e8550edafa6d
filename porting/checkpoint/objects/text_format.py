"""Protocol buffers in text form, as the Object Detection API's ``pipeline.config`` is written.

Source: the protocol buffer text format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from porting.errors import CheckpointError

NAME = "pipeline.config"

_MOST_DEPTH = 32
_TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)|(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
    r"""|(?P<word>[\w.+-]+)|(?P<punctuation>[{}<>\[\]:,;])"""
)
_CLOSING = {"{": "}", "<": ">"}
_OPTIONAL = ("bifpn", "post_processing", "batch_non_max_suppression", "image_resizer", "batch_norm")

Message = dict[str, list["str | Message"]]


class Fields(NamedTuple):
    """One message of the file, and its name for errors. A missing value has its default."""

    path: Path
    where: str
    fields: Message

    def has(self, name: str) -> bool:
        return name in self.fields

    def message(self, name: str) -> Fields:
        """The message ``name``. Raises CheckpointError if it is missing, unless it is optional."""
        values = self.fields.get(name)
        value = values[-1] if values else None  # "name: []" has no value
        where = f"{self.where}.{name}".lstrip(".")
        if value is None and name in _OPTIONAL:
            value = {}
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{self.path} has no {where}, so it is not for an EfficientDet of the Object Detection API; "
                f"put the model's own {NAME} there"
            )
        return Fields(self.path, where, value)

    def messages(self, name: str) -> list[Fields]:
        """Every message ``name``, none if there is none. Values of another kind are left out."""
        where = f"{self.where}.{name}".lstrip(".")
        found = self.fields.get(name, [])
        return [Fields(self.path, where, value) for value in found if isinstance(value, dict)]

    def text(self, name: str, default: str) -> str:
        value = (self.fields.get(name) or [default])[-1]
        if not isinstance(value, str):
            raise self.wrong(name, "a message")
        return value

    def flag(self, name: str, default: bool) -> bool:
        return self.text(name, str(default)).lower() in ("true", "t", "1")

    def number(self, name: str, default: float) -> float:
        return self._number(name, self.text(name, str(default)))

    def integer(self, name: str, default: int) -> int:
        value = self.number(name, default)
        if not value.is_integer() or abs(value) > 1 << 31:
            raise self.wrong(name, repr(value))
        return int(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self.fields.get(name, [])
        for value in values:
            if not isinstance(value, str):
                raise self.wrong(name, "a message")
        return tuple(self._number(name, str(value)) for value in values)

    def _number(self, name: str, value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            raise self.wrong(name, repr(value)) from None
        if number != number or number in (float("inf"), float("-inf")):
            raise self.wrong(name, repr(value))
        return number

    def wrong(self, name: str, value: str, cure: str = "correct the file") -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.where}.{name} is {value}; {cure}")


def parse(path: Path, text: str) -> Message:
    """Parse the text format: ``name: value``, ``name { … }``, lists in brackets, comments."""
    tokens = _tokens(path, text)
    message, closed = _message(path, tokens, 0)
    if closed:
        raise CheckpointError(
            f"{path}, line {closed.line}: {closed.text!r} has no opening bracket; correct the file"
        )
    return message


class _Token(NamedTuple):
    kind: str  # word, string or punctuation
    text: str
    line: int


def _tokens(path: Path, text: str) -> Iterator[_Token]:
    position, line = 0, 1
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None or found.lastgroup is None:
            raise CheckpointError(f"{path}, line {line}: {text[position]!r} is unexpected; correct the file")
        if found.lastgroup != "skip":
            yield _Token(found.lastgroup, found[0], line)
        line += found[0].count("\n")
        position = found.end()


def _message(path: Path, tokens: Iterator[_Token], depth: int) -> tuple[Message, _Token | None]:
    """The fields up to the bracket that closes the message, and that bracket; None at the end of the file."""
    message: Message = {}
    for token in tokens:
        if token.text in (",", ";"):
            continue
        if token.text in _CLOSING.values():
            return message, token
        if token.kind != "word":
            raise _unexpected(path, token)
        following = next(tokens, token)
        if following.text == ":":
            following = next(tokens, token)
        message.setdefault(token.text, []).extend(_values(path, tokens, following, depth))
    return message, None


def _values(path: Path, tokens: Iterator[_Token], first: _Token, depth: int) -> Iterator[str | Message]:
    """One value, or the values of a list; ``first`` is the first token."""
    if depth == _MOST_DEPTH:
        raise CheckpointError(f"{path}, line {first.line}: messages nest too deep; correct the file")
    if first.text in _CLOSING:
        inner, closed = _message(path, tokens, depth + 1)
        if closed is None or closed.text != _CLOSING[first.text]:
            raise CheckpointError(
                f"{path}, line {first.line}: {first.text!r} is never closed; correct the file"
            )
        yield inner
    elif first.text == "[":
        for token in tokens:
            if token.text == "]":
                return
            if token.text != ",":
                yield from _values(path, tokens, token, depth + 1)
        raise CheckpointError(f"{path}, line {first.line}: '[' is never closed; correct the file")
    elif first.kind == "punctuation":
        raise _unexpected(path, first)
    else:
        yield first.text[1:-1] if first.kind == "string" else first.text


def _unexpected(path: Path, token: _Token) -> CheckpointError:
    return CheckpointError(f"{path}, line {token.line}: {token.text!r} is unexpected; correct the file")
