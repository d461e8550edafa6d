"""Read the parts of FlatBuffers and FlexBuffers that a TFLite file needs, without trusting an offset.

A table starts with the distance back to its vtable, which lists the position of each field in the table (0:
the field is missing). A field is a number, or the distance forward to a table, a string or a vector. Every
position is checked against the size of the data before it is read, and vectors are views: a damaged file
costs no more than its own size.

Source: google/flatbuffers, ``docs/source/internals.md`` and ``docs/source/flexbuffers.md``.
"""

from __future__ import annotations

import struct

import numpy as np

from pytorch_model.formats.wire import Malformed

_LONGEST_TEXT = 200  # bytes of a string that are read; the names that matter are shorter


class Table:
    """The table of ``data`` at byte ``at``. Fields are numbered as in the schema, from 0.

    The constructor and every method raise :class:`~pytorch_model.formats.wire.Malformed` if a position is
    outside the data.
    """

    __slots__ = ("_at", "_data", "_size", "_vtable", "_vtable_size")

    def __init__(self, data: bytes, at: int) -> None:
        self._data = data
        self._at = at
        self._vtable = at - _unpack("<i", data, at)
        self._vtable_size = _unpack("<H", data, self._vtable)
        self._size = _unpack("<H", data, self._vtable + 2)
        _require(data, self._vtable, self._vtable_size)
        _require(data, at, self._size)

    @classmethod
    def root(cls, data: bytes) -> Table:
        """The outermost table of a file."""
        return cls(data, _unpack("<I", data, 0))

    def number(self, field: int, code: str, default: int = 0) -> int:
        """An integer or bool field; ``code`` is its :mod:`struct` letter."""
        at = self._place(field, struct.calcsize(code))
        return default if at is None else _unpack(f"<{code}", self._data, at)

    def has(self, field: int) -> bool:
        return self._place(field, 0) is not None

    def table(self, field: int) -> Table | None:
        at = self._target(field)
        return None if at is None else Table(self._data, at)

    def tables(self, field: int, most: int) -> list[Table]:
        """A vector of tables; empty if the field is missing. Raises if there are more than ``most``."""
        start, count = self._vector(field, 4)
        if count > most:
            raise Malformed(f"it claims {count} entries; no more than {most} are expected")
        places = range(start, start + 4 * count, 4)
        return [Table(self._data, at + _unpack("<I", self._data, at)) for at in places]

    def array(self, field: int, dtype: np.dtype) -> np.ndarray:
        """A vector of numbers as a read-only view [n] of the data; empty if the field is missing."""
        start, count = self._vector(field, dtype.itemsize)
        return np.frombuffer(self._data, dtype, count, start) if count else np.empty(0, dtype)

    def text(self, field: int) -> str:
        """The first 200 bytes of a string; bytes that are not UTF-8 are replaced."""
        start, count = self._vector(field, 1)
        return self._data[start : start + min(count, _LONGEST_TEXT)].decode(errors="replace")

    def _vector(self, field: int, itemsize: int) -> tuple[int, int]:
        """(position of the first item, number of items)."""
        at = self._target(field)
        if at is None:
            return 0, 0
        count = _unpack("<I", self._data, at)
        _require(self._data, at + 4, count * itemsize)
        return at + 4, count

    def _target(self, field: int) -> int | None:
        at = self._place(field, 4)
        return None if at is None else at + _unpack("<I", self._data, at)

    def _place(self, field: int, width: int) -> int | None:
        """The position of the field's ``width`` bytes; None if the table does not have the field."""
        entry = 4 + 2 * field
        if entry + 2 > self._vtable_size:
            return None
        offset = _unpack("<H", self._data, self._vtable + entry)
        if offset == 0:
            return None
        if offset + width > self._size:
            raise Malformed(f"field {field} of the table at byte {self._at} is outside the table")
        return self._at + offset


def _require(data: bytes, at: int, size: int) -> None:
    if at < 0 or at + size > len(data):
        raise Malformed(f"{size} bytes at byte {at} are outside its {len(data)} bytes")


def _unpack(code: str, data: bytes, at: int) -> int:
    _require(data, at, struct.calcsize(code))
    value: int = struct.unpack_from(code, data, at)[0]
    return value


_INT, _UINT, _FLOAT, _MAP, _BOOL = 1, 2, 3, 9, 26  # FlexBuffers' types
_LETTERS = {  # (type, width in bytes) → struct letter
    (kind, width): letter
    for kind, letters in ((_INT, "bhiq"), (_UINT, "BHIQ"), (_BOOL, "BHIQ"), (_FLOAT, " efd"))
    for width, letter in zip((1, 2, 4, 8), letters, strict=True)
    if letter != " "
}


def flexbuffer_map(data: bytes) -> dict[str, float]:
    """The numbers of a FlexBuffer whose root is a map, by key; values of other types are left out.

    Raises :class:`~pytorch_model.formats.wire.Malformed`.
    """
    _require(data, 0, 3)
    packed_type, root_width = data[-2], data[-1]
    if packed_type >> 2 != _MAP:
        raise Malformed("its options are not a FlexBuffer map")
    width = 1 << (packed_type & 3)
    start = _follow(data, len(data) - 2 - root_width, root_width)
    count = _uint(data, start - width, width)
    keys_width = _uint(data, start - 2 * width, width)
    keys = _follow(data, start - 3 * width, width)
    _require(data, start, count * (width + 1))  # the values, then one byte per value for its type
    found: dict[str, float] = {}
    for i in range(count):
        name = _follow(data, keys + i * keys_width, keys_width)
        end = data.find(b"\0", name, name + _LONGEST_TEXT)
        letter = _LETTERS.get((data[start + count * width + i] >> 2, width))
        if end >= 0 and letter:
            found[data[name:end].decode(errors="replace")] = _unpack(f"<{letter}", data, start + i * width)
    return found


def _uint(data: bytes, at: int, width: int) -> int:
    if width not in (1, 2, 4, 8):
        raise Malformed(f"its options claim numbers of {width} bytes")
    _require(data, at, width)
    return int.from_bytes(data[at : at + width], "little")


def _follow(data: bytes, at: int, width: int) -> int:
    """The target of an offset. FlexBuffer offsets point backwards from where they are stored."""
    target = at - _uint(data, at, width)
    _require(data, target, 0)
    return target
