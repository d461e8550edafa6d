"""The text format of protocol buffers: ``name: value``, ``name { … }``, lists in brackets, comments.

Source: protobuf.dev, "Text Format Language Specification".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from pytorch_model.errors import Reason

_MOST_DEPTH = 32
_TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)|(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
    r"""|(?P<word>[\w.+-]+)|(?P<punctuation>[{}<>\[\]:,;])"""
)
_CLOSING = {"{": "}", "<": ">"}
_ESCAPE = re.compile(rb"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|(.))", re.S)
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b", b"f": b"\f", b"v": b"\v"}

#: Field → its values in order. A string is without its quotes, its escapes are as in the file.
Message = dict[str, list["str | Message"]]


def parse_message(text: str) -> Message:
    """The message that ``text`` holds. Raises :class:`Reason`, which names the line."""
    tokens = _tokens(text)
    message, closed = _message(tokens, 0)
    if closed:
        raise Reason(f"line {closed.line}: {closed.text!r} has no opening bracket")
    return message


def unescaped(string: str) -> str:
    """``string`` with its escapes replaced: ``\\'``, ``\\n``, octal and hexadecimal bytes of UTF-8.

    Raises :class:`Reason` if the bytes are not UTF-8.
    """

    def replaced(found: re.Match[bytes]) -> bytes:
        octal, hexadecimal, other = found.groups()
        if other is not None:
            return _ESCAPED.get(other, other)
        return bytes([(int(octal, 8) if octal else int(hexadecimal, 16)) & 255])

    try:
        return _ESCAPE.sub(replaced, string.encode()).decode()
    except UnicodeError:
        raise Reason(f"{string[:40]!r} is not UTF-8 text") from None


class _Token(NamedTuple):
    kind: str  # word, string or punctuation
    text: str
    line: int


def _tokens(text: str) -> Iterator[_Token]:
    position, line = 0, 1
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None or found.lastgroup is None:
            raise Reason(f"line {line}: {text[position]!r} is unexpected")
        if found.lastgroup != "skip":
            yield _Token(found.lastgroup, found[0], line)
        line += found[0].count("\n")
        position = found.end()


def _message(tokens: Iterator[_Token], depth: int) -> tuple[Message, _Token | None]:
    """The fields up to the bracket that closes the message, and that bracket; None at the end of the text."""
    message: Message = {}
    for token in tokens:
        if token.text in (",", ";"):
            continue
        if token.text in _CLOSING.values():
            return message, token
        if token.kind != "word":
            raise _unexpected(token)
        following = next(tokens, token)
        if following.text == ":":
            following = next(tokens, token)
        message.setdefault(token.text, []).extend(_values(tokens, following, depth))
    return message, None


def _values(tokens: Iterator[_Token], first: _Token, depth: int) -> Iterator[str | Message]:
    """One value, or the values of a list; ``first`` is the first token."""
    if depth == _MOST_DEPTH:
        raise Reason(f"line {first.line}: messages nest too deep")
    if first.text in _CLOSING:
        inner, closed = _message(tokens, depth + 1)
        if closed is None or closed.text != _CLOSING[first.text]:
            raise Reason(f"line {first.line}: {first.text!r} is never closed")
        yield inner
    elif first.text == "[":
        for token in tokens:
            if token.text == "]":
                return
            if token.text != ",":
                yield from _values(tokens, token, depth + 1)
        raise Reason(f"line {first.line}: '[' is never closed")
    elif first.kind == "punctuation":
        raise _unexpected(first)
    else:
        yield first.text[1:-1] if first.kind == "string" else first.text


def _unexpected(token: _Token) -> Reason:
    return Reason(f"line {token.line}: {token.text!r} is unexpected")
