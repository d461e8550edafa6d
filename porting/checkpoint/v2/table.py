"""LevelDB tables: sorted (key, value) pairs in checksummed blocks. A checkpoint's ``.index`` file is one.

A table consists of data blocks, a metaindex block, an index block (last key of each data block → its
position) and a 48-byte footer. A block holds entries, whose keys omit the prefix shared with the key before,
and then the offsets of the entries with a complete key ("restarts"). One byte of compression type and a
masked CRC32C follow each block.

Sources: google/leveldb ``doc/table_format.md``; TensorFlow ``core/lib/io/{table_builder,block,format}.cc``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from porting.checkpoint.v2 import snappy
from pytorch_model.formats.crc32c import masked_crc32c
from pytorch_model.formats.wire import Malformed, read_varint, write_varint

MAGIC = 0xDB4775248B80FB57
FOOTER_SIZE = 48

_TRAILER_SIZE = 5  # compression type, CRC32C
_UNCOMPRESSED, _SNAPPY = 0, 1
_RESTART_INTERVAL = 16  # in TensorFlow's data blocks; index blocks restart at every key
_BLOCK_SIZE = 262144


def is_table(footer: bytes) -> bool:
    """Whether a file that ends in ``footer`` (its last 48 bytes) is a LevelDB table."""
    return len(footer) == FOOTER_SIZE and int.from_bytes(footer[-8:], "little") == MAGIC


def read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield every (key, value) of a table in strictly ascending key order; all checksums are verified.

    Raises :class:`~pytorch_model.formats.wire.Malformed` with the byte offset of the damaged block.
    """
    if not is_table(data[-FOOTER_SIZE:]):
        raise Malformed("its last 48 bytes are not the footer of a LevelDB table")
    end = len(data) - FOOTER_SIZE
    meta_offset, meta_size, index_offset, index_size = _read_footer(data[end:])
    metaindex = _read_block(data, meta_offset, meta_size, end)
    for _ in _entries(metaindex, meta_offset):
        pass  # TensorFlow leaves it empty; it is read only to check it
    last_key: bytes | None = None
    block_end = 0
    for separator, handle in _entries(_read_block(data, index_offset, index_size, end), index_offset):
        offset, size = _read_handle(handle, index_offset)
        if offset < block_end:  # also keeps the work linear in the size of the file
            raise Malformed(f"the data block at byte {offset} overlaps the one before it")
        block_end = offset + size + _TRAILER_SIZE
        for key, value in _entries(_read_block(data, offset, size, end), offset):
            if last_key is not None and key <= last_key:
                raise Malformed(f"keys are out of order in the block at byte {offset}")
            last_key = key
            yield key, value
        if last_key is not None and last_key > separator:
            raise Malformed(f"the block at byte {offset} holds keys beyond the one its index entry promises")
        last_key = separator  # the keys of the next block must be greater


def _read_footer(footer: bytes) -> list[int]:
    """Offset and size of the metaindex block, then of the index block."""
    position = 0
    numbers = []
    for _ in range(4):
        number, position = read_varint(footer[:-8], position)
        numbers.append(number)
    if footer[:-8] != b"".join(map(write_varint, numbers)).ljust(FOOTER_SIZE - 8, b"\0"):
        raise Malformed("its footer is damaged")  # the only part without a checksum
    return numbers


def _read_handle(handle: bytes, index_offset: int) -> tuple[int, int]:
    offset, position = read_varint(handle, 0)
    size, position = read_varint(handle, position)
    if position != len(handle):
        raise Malformed(f"the index block at byte {index_offset} holds an entry that is not a block address")
    return offset, size


def _read_block(data: bytes, offset: int, size: int, end: int) -> bytes:
    """The contents of the block at ``offset``; the block and its trailer must end before ``end``."""
    stop = offset + size
    if stop + _TRAILER_SIZE > end:
        raise Malformed(f"the block at byte {offset} ({size} bytes) runs past the end of the table")
    checksum = int.from_bytes(data[stop + 1 : stop + _TRAILER_SIZE], "little")
    if checksum != masked_crc32c(data[offset : stop + 1]):
        raise Malformed(f"the block at byte {offset} ({size} bytes) fails its CRC32C checksum")
    compression = data[stop]
    contents = data[offset:stop]
    if compression == _UNCOMPRESSED:
        return contents
    if compression != _SNAPPY:
        raise Malformed(f"the block at byte {offset} has the unknown compression type {compression}")
    try:
        return snappy.decompress(contents)
    except Malformed as error:
        raise Malformed(f"the block at byte {offset} cannot be decompressed: {error}") from None


def _entries(block: bytes, offset: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the (key, value) pairs of one block in its order; ``offset`` is used in messages."""
    try:
        restarts, end = _restarts(block)
        key = b""
        position = 0
        restart = next(restarts)
        while position < end:
            is_restart = position == restart
            if is_restart:
                restart = next(restarts, end)
            shared, unshared, size = block[position : position + 3].ljust(3, b"\xff")
            if shared | unshared | size < 0x80:  # one byte each: the usual case
                position += 3
            else:
                shared, position = read_varint(block, position)
                unshared, position = read_varint(block, position)
                size, position = read_varint(block, position)
            if shared > len(key) or (is_restart and shared) or unshared + size > end - position:
                raise Malformed("an entry does not fit")
            value_start = position + unshared
            key = key[:shared] + block[position:value_start]
            position = value_start + size
            yield key, block[value_start:position]
        if restart != end and end:
            raise Malformed("a restart point is not the start of an entry")
    except Malformed as error:
        raise Malformed(f"the block at byte {offset} is damaged: {error}") from None


def _restarts(block: bytes) -> tuple[Iterator[int], int]:
    """(offsets of the entries with a complete key, ascending; the end of the entries)."""
    if len(block) < 8:
        raise Malformed(f"it is {len(block)} bytes long")
    (count,) = struct.unpack_from("<I", block, len(block) - 4)
    end = len(block) - 4 - 4 * count
    if count < 1 or end < 0:
        raise Malformed(f"it claims {count} restart points")
    last = -1
    for offset in _numbers(block, end, count):
        if offset <= last or (last < 0 and offset):
            raise Malformed("its restart points are out of order")
        last = offset
    if last >= max(end, 1):
        raise Malformed("a restart point is outside it")
    return _numbers(block, end, count), end


def _numbers(block: bytes, start: int, count: int) -> Iterator[int]:
    for (number,) in struct.iter_unpack("<I", memoryview(block)[start : start + 4 * count]):
        yield number


def write_table(items: Iterable[tuple[bytes, bytes]], block_size: int = _BLOCK_SIZE) -> bytes:
    """An uncompressed table of ``items``, whose keys must be strictly ascending.

    It has the same bytes as the table that TensorFlow would write.
    """
    output = bytearray()
    index = _BlockBuilder(restart_interval=1)
    block = _BlockBuilder(_RESTART_INTERVAL)
    for key, value in items:
        if len(block) >= block_size:
            index.add(_separator(block.last_key or b"", key), _append_block(output, block.finish()))
            block = _BlockBuilder(_RESTART_INTERVAL)
        block.add(key, value)
    if block.last_key is not None:
        index.add(_successor(block.last_key), _append_block(output, block.finish()))
    metaindex_handle = _append_block(output, _BlockBuilder(_RESTART_INTERVAL).finish())
    index_handle = _append_block(output, index.finish())
    output += (metaindex_handle + index_handle).ljust(FOOTER_SIZE - 8, b"\0")
    output += MAGIC.to_bytes(8, "little")
    return bytes(output)


def _append_block(output: bytearray, contents: bytes, compression: int = _UNCOMPRESSED) -> bytes:
    """Append a block and its trailer to a table; returns the handle of the block (offset and size)."""
    handle = write_varint(len(output)) + write_varint(len(contents))
    checked = contents + bytes([compression])
    output += checked + masked_crc32c(checked).to_bytes(4, "little")
    return handle


class _BlockBuilder:
    """A block that is being written. ``len`` is the size in bytes that it would have if finished now."""

    def __init__(self, restart_interval: int) -> None:
        self.last_key: bytes | None = None
        self._restart_interval = restart_interval
        self._restarts = [0]
        self._since_restart = 0
        self._entries = bytearray()

    def __len__(self) -> int:
        return len(self._entries) + 4 * len(self._restarts) + 4

    def add(self, key: bytes, value: bytes) -> None:
        shared = 0
        if self._since_restart < self._restart_interval:
            shared = _common_prefix(self.last_key or b"", key)
        else:
            self._restarts.append(len(self._entries))
            self._since_restart = 0
        for number in (shared, len(key) - shared, len(value)):
            self._entries += write_varint(number)
        self._entries += key[shared:] + value
        self._since_restart += 1
        self.last_key = key

    def finish(self) -> bytes:
        offsets = struct.pack(f"<{len(self._restarts) + 1}I", *self._restarts, len(self._restarts))
        return bytes(self._entries) + offsets


def _separator(key: bytes, next_key: bytes) -> bytes:
    """LevelDB's short index key of a block: at least its last key, less than the first of the next block."""
    at = _common_prefix(key, next_key)
    if at < len(key) and at < len(next_key) and key[at] + 1 < next_key[at]:
        return key[:at] + bytes([key[at] + 1])
    return key


def _successor(key: bytes) -> bytes:
    """The index key of the last block: the shortest key that is not less than its last key."""
    for at, byte in enumerate(key):
        if byte != 0xFF:
            return key[:at] + bytes([byte + 1])
    return key


def _common_prefix(a: bytes, b: bytes) -> int:
    length = min(len(a), len(b))
    for i in range(length):
        if a[i] != b[i]:
            return i
    return length
