"""The parts of the protocol buffer wire format that checkpoints and TFRecords need.

Every length is compared with the size of the data before it is used, so a damaged message costs no more than
its own size. Source: protobuf.dev, "Encoding".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn, TypeVar

from pytorch_model.errors import Reason

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 (groups) are obsolete

_MAX_FIELD_NUMBER = (1 << 29) - 1

Data = TypeVar("Data", bytes, memoryview)


class Malformed(Reason):
    """Internal: bytes that break their format; the caller raises an error of its own, with the file name."""


def read_varint(data: Data, position: int) -> tuple[int, int]:
    """(value in 0…2**64-1, position after it). Raises :class:`Malformed`."""
    value = shift = 0
    try:
        byte = data[position]
        if byte < 0x80:  # the usual case
            return byte, position + 1
        while byte >= 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                _fail("a variable-length integer is longer than 10 bytes")
            position += 1
            byte = data[position]
    except IndexError:
        raise Malformed("a variable-length integer runs past the end") from None
    value |= byte << shift
    if value >> 64:
        _fail("a variable-length integer exceeds 64 bits")
    return value, position + 1


def write_varint(value: int) -> bytes:
    """``value`` in 0…2**64-1."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def read_fields(message: Data) -> Iterator[tuple[int, int, int | Data]]:
    """Yield every (field number, wire type, value) in the order of the message.

    A generator, because a message can have one field for every two bytes. The value is an unsigned int for
    VARINT, FIXED32 and FIXED64; for BYTES it has the type of ``message``: bytes (a copy) or memoryview (not a
    copy). Raises :class:`Malformed`.
    """
    position, end = 0, len(message)
    while position < end:
        tag = message[position]
        if tag < 0x80:  # an index has tens of thousands of tags; a call for each would double the time
            position += 1
        else:
            tag, position = read_varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if not 0 < number <= _MAX_FIELD_NUMBER:
            _fail(f"field number {number} is not allowed")
        if wire_type == VARINT:
            value, position = read_varint(message, position)
            yield number, wire_type, value
            continue
        if wire_type == BYTES:
            size, position = read_varint(message, position)
        elif wire_type in (FIXED32, FIXED64):
            size = 4 if wire_type == FIXED32 else 8
        else:
            _fail(f"field {number} has the unknown wire type {wire_type}")
        if size > end - position:
            _fail(f"field {number} runs past the end of its message")
        chunk = message[position : position + size]
        position += size
        yield number, wire_type, chunk if wire_type == BYTES else int.from_bytes(chunk, "little")


def last_values(message: Data, *numbers: int) -> dict[int, int | Data]:
    """Those fields of ``message`` that are in ``numbers``; if a field is repeated, its last value.

    Raises :class:`Malformed`, also for errors in the other fields.
    """
    return {number: value for number, _, value in read_fields(message) if number in numbers}


def expect_int(number: int, value: int | Data) -> int:
    """An integer field as int64. Raises :class:`Malformed` when the field holds bytes."""
    if not isinstance(value, int):
        _fail(f"field {number} holds bytes instead of a number")
    return value - (1 << 64) if value >> 63 else value


def expect_bytes(number: int, value: int | Data) -> Data:
    """A bytes, string or message field. Raises :class:`Malformed` when the field holds a number."""
    if isinstance(value, int):
        _fail(f"field {number} holds a number instead of bytes")
    return value


def int_field(number: int, value: int) -> bytes:
    """Field ``number`` as a varint; empty for zero, the default, which protocol buffers omit."""
    return write_varint(number << 3 | VARINT) + write_varint(value) if value else b""


def bytes_field(number: int, value: bytes) -> bytes:
    """Field ``number`` as bytes, a string or an embedded message."""
    return write_varint(number << 3 | BYTES) + write_varint(len(value)) + value


def fixed32_field(number: int, value: int) -> bytes:
    """Field ``number`` as four bytes."""
    return write_varint(number << 3 | FIXED32) + value.to_bytes(4, "little")


def _fail(reason: str) -> NoReturn:
    raise Malformed(reason)
