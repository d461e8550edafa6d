"""Raw snappy decompression, for the index blocks of checkpoints that were written compressed.

Source: google/snappy ``format_description.txt``.
"""

from __future__ import annotations

from pytorch_model.formats.wire import Malformed, read_varint

#: Of one block. TensorFlow ends a block after the entry that makes it larger than 256 kB.
MOST_BYTES = 1 << 20


def decompress(data: bytes) -> bytes:
    """Decompress raw snappy ``data``, to at most :data:`MOST_BYTES` (3 bytes can expand to 64).

    Raises :class:`~pytorch_model.formats.wire.Malformed` unless it is a well-formed stream.
    """
    length, position = read_varint(data, 0)
    if length > MOST_BYTES:
        raise Malformed(f"snappy data claims {length} bytes, more than any block has ({MOST_BYTES})")
    output = bytearray()
    while position < len(data) and len(output) <= length:
        if data[position] & 3 == 0:
            start, size = _literal(data, position)
            position = start + size
            if position > len(data):
                raise Malformed("a snappy literal runs past the end of its block")
            output += data[start:position]
        else:
            offset, size, position = _copy(data, position)
            if not 0 < offset <= len(output):
                raise Malformed(f"a snappy copy reaches back {offset} bytes of {len(output)}")
            _repeat(output, offset, size)
    if len(output) != length:
        raise Malformed(f"snappy data holds {len(output)} bytes, not the {length} it claims")
    return bytes(output)


def _literal(data: bytes, position: int) -> tuple[int, int]:
    """(start, size) of the literal with its tag at ``position``."""
    size = data[position] >> 2
    position += 1
    if size >= 60:  # 60…63: the size follows in 1…4 bytes
        extra = size - 59
        size = int.from_bytes(_take(data, position, extra), "little")
        position += extra
    return position, size + 1


def _copy(data: bytes, position: int) -> tuple[int, int, int]:
    """(offset back from the end of the output, size, position after) of the copy at ``position``."""
    tag = data[position]
    kind = tag & 3
    if kind == 1:  # 11-bit offset, its high bits in the tag; 4…11 bytes
        low = _take(data, position + 1, 1)[0]
        return (tag >> 5) << 8 | low, (tag >> 2 & 7) + 4, position + 2
    width = 2 if kind == 2 else 4
    offset = int.from_bytes(_take(data, position + 1, width), "little")
    return offset, (tag >> 2) + 1, position + 1 + width


def _repeat(output: bytearray, offset: int, size: int) -> None:
    """Append ``size`` bytes from ``offset`` before the end; the source may overlap the appended bytes."""
    start = len(output) - offset
    pattern = output[start : start + size]
    repeats, rest = divmod(size, len(pattern))
    output += pattern * repeats + pattern[:rest]


def _take(data: bytes, position: int, size: int) -> bytes:
    chunk = data[position : position + size]
    if len(chunk) != size:
        raise Malformed("a snappy element runs past the end of its block")
    return chunk
