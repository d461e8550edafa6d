"""Ways to damage bytes, chosen by a seeded generator."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

#: Numbers at the edges of what fields hold, as 4 or 8 little-endian bytes.
_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_TEXT = b"{}[]()<>:=,;\"'\\#*&!|%@-+.eE0129xnNaAtT \n\t\0\xff\xc3"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` after one to four changes; never equal to ``data``, unless that is empty."""
    changed = data
    while changed == data and data:
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            changed = rng.choice(_MUTATIONS)(changed, rng) if changed else changed
    return changed


_TOKEN = re.compile(rb'"[^"]*"|[\w.+-]+|[^\s\w]')
_TOKENS = (
    *(b"-1", b"0", b"1e400", b"NaN", b"99999999999999999999", b"0.5", b"true", b"null", b"None", b"~"),
    *(b"[]", b"{}", b"[[]]", b'""', b'"x"', b"x", b",", b":", b"=", b"!!python/name:os.system", b"&a", b"*a"),
)


def mutated_text(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one to three of its words, numbers or signs replaced, left out or doubled."""
    changed = data
    while changed == data:
        for _ in range(rng.choice((1, 1, 2, 3))):
            tokens = list(_TOKEN.finditer(changed))
            if not tokens:
                break
            token = rng.choice(tokens)
            new = rng.choice((b"", token[0] * 2, rng.choice(tokens)[0], *rng.sample(_TOKENS, 4)))
            changed = changed[: token.start()] + new + changed[token.end() :]
    return changed


def _place(data: bytes, rng: random.Random) -> int:
    """Anywhere; half of the time near an end, where headers and footers are."""
    near = min(len(data), 64)
    choice = rng.random()
    if choice < 0.25:
        return rng.randrange(near)
    if choice < 0.5:
        return len(data) - 1 - rng.randrange(near)
    return rng.randrange(len(data))


def _range(data: bytes, rng: random.Random) -> tuple[int, int]:
    start = _place(data, rng)
    return start, min(len(data), start + rng.choice((1, 2, 4, 8, 64, 512, 4096)))


def _flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def _set_byte(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _set_text(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([rng.choice(_TEXT)]) + data[at + 1 :]


def _set_number(data: bytes, rng: random.Random) -> bytes:
    at, width = _place(data, rng), rng.choice((1, 4, 8))
    number = rng.choice(_EDGES) % (1 << 8 * width)
    return data[:at] + number.to_bytes(width, "little") + data[at + width :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _remove(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + data[stop:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + data[at:]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:stop] + data[start:stop] + data[stop:]


def _blank(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    return data[:start] + bytes([rng.choice((0, 0xFF))]) * (stop - start) + data[stop:]


def _move(data: bytes, rng: random.Random) -> bytes:
    start, stop = _range(data, rng)
    at = _place(data, rng)
    return data[:at] + data[start:stop] + data[at + stop - start :]


_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _flip_bit,
    _flip_bit,
    _set_byte,
    _set_text,
    _set_number,
    _cut,
    _remove,
    _insert,
    _repeat,
    _blank,
    _move,
)
