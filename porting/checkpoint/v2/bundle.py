"""Name-based TensorFlow V2 checkpoints ("tensor bundles"), read and written without TensorFlow.

``PREFIX.index`` is a LevelDB table from variable name to where its bytes lie; ``PREFIX.data-00000-of-00001``
(more when sharded) is those bytes, row-major and little-endian, one tensor after another, no padding.

Source: TensorFlow ``core/protobuf/tensor_bundle.proto`` and ``core/util/tensor_bundle/tensor_bundle.cc``.
"""

from __future__ import annotations

import math
import os
import reprlib
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import google_crc32c
import numpy as np

from porting.checkpoint import wire
from porting.checkpoint.base import MOST_VARIABLES, Checkpoint
from porting.checkpoint.v2.table import FOOTER_SIZE, is_table, mask_crc, read_table
from porting.checkpoint.wire import Malformed
from porting.errors import CheckpointError

FORMAT = "TensorFlow V2 checkpoint"
HEADER_KEY = b""
SLICE_PREFIX = b"\0"  # keys of the pieces of partitioned variables; no variable's name starts so

# TensorFlow core/framework/types.proto: DataType → (its name, how the bytes of one element lie on disk)
DT_STRING, DT_BFLOAT16 = 7, 14
_DTYPES: dict[int, tuple[str, np.dtype]] = {
    1: ("float32", np.dtype("<f4")),
    2: ("float64", np.dtype("<f8")),
    3: ("int32", np.dtype("<i4")),
    4: ("uint8", np.dtype("u1")),
    5: ("int16", np.dtype("<i2")),
    6: ("int8", np.dtype("i1")),
    9: ("int64", np.dtype("<i8")),
    10: ("bool", np.dtype("?")),
    DT_BFLOAT16: ("bfloat16", np.dtype("<u2")),
    17: ("uint16", np.dtype("<u2")),
    19: ("float16", np.dtype("<f2")),
    22: ("uint32", np.dtype("<u4")),
    23: ("uint64", np.dtype("<u8")),
}
_OTHER_DTYPES = {DT_STRING: "string", 8: "complex64", 18: "complex128", 20: "resource", 21: "variant"}
DTYPE_NUMBERS = {dtype: number for number, (_, dtype) in _DTYPES.items() if number != DT_BFLOAT16}

_MAX_DIMENSIONS = 32  # NumPy 1's limit
_MOST_INDEX_BYTES = 16 << 20  # of an index file; D4's, averages included, has 100 kB
_MOST_NAME_BYTES = 8 << 20  # keys share what they begin with: those of a small file may be long without end
_LONGEST_SHOWN = 200  # characters of a name; AutoML's reach about 100, damaged ones anything


class Entry(NamedTuple):
    """One variable as the index describes it (``BundleEntryProto``)."""

    dtype: int  # TensorFlow's DataType
    shape: tuple[int, ...]
    shard: int
    offset: int  # bytes, in its shard
    size: int  # bytes
    crc32c: int  # masked
    partitioned: bool  # stored in slices under other keys; offset, size and checksum mean nothing

    @property
    def dtype_name(self) -> str:
        if self.dtype in _DTYPES:
            return _DTYPES[self.dtype][0]
        return _OTHER_DTYPES.get(self.dtype, f"number {self.dtype}")

    @property
    def storage(self) -> np.dtype | None:
        """The dtype of the bytes on disk, None for those that are not plain arrays."""
        return _DTYPES[self.dtype][1] if self.dtype in _DTYPES else None

    @property
    def array_dtype(self) -> np.dtype:
        """The dtype of the array that reading returns (bfloat16 widens); ``object`` where it cannot be."""
        if self.dtype == DT_BFLOAT16:
            return np.dtype(np.float32)
        if self.partitioned or self.storage is None:
            return np.dtype(object)
        return self.storage


@dataclass(frozen=True)
class BundleIndex:
    """What an ``.index`` file says: everything about the variables but their values."""

    path: Path
    num_shards: int
    entries: Mapping[str, Entry]  # in key order

    @property
    def prefix(self) -> str:
        return str(self.path).removesuffix(".index")

    def shard_path(self, shard: int) -> Path:
        return shard_path(self.prefix, shard, self.num_shards)


def shard_path(prefix: str, shard: int, num_shards: int) -> Path:
    """The data file ``PREFIX.data-SSSSS-of-NNNNN``."""
    return Path(f"{prefix}.data-{shard:05d}-of-{num_shards:05d}")


def read_index(path: str | os.PathLike[str]) -> BundleIndex:
    """Read an ``.index`` file alone: names, shapes, dtypes and places of all variables.

    Every byte of it is checked (CRC32C of each block, order of keys). Raises CheckpointError.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - FOOTER_SIZE))
            if not is_table(file.read()):
                raise CheckpointError(
                    f"{path} is not the index of a TensorFlow checkpoint, or is cut short: its last "
                    f"{FOOTER_SIZE} bytes (of {size}) are not a table's footer; fetch the file again"
                )
            if size > _MOST_INDEX_BYTES:
                raise CheckpointError(
                    f"{path} has {size} bytes, more than the index of any EfficientDet "
                    f"({_MOST_INDEX_BYTES}); is it the right file?"
                )
            file.seek(0)
            data = file.read()
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        return _parse_index(path, data)
    except Malformed as error:
        raise CheckpointError(f"{path} is damaged: {error}; fetch the file again") from None


def _parse_index(path: Path, data: bytes) -> BundleIndex:
    num_shards: int | None = None
    entries: dict[str, Entry] = {}
    name_bytes = 0
    for key, value in read_table(data):
        if num_shards is None:
            if key != HEADER_KEY:
                raise Malformed("its first key is not the header of a TensorFlow V2 checkpoint")
            num_shards = _parse_header(path, value)
            continue
        if key.startswith(SLICE_PREFIX):
            continue  # its whole is listed under the variable's own name, marked as partitioned
        try:
            name = key.decode()
        except UnicodeDecodeError:
            raise Malformed(f"the variable name {reprlib.repr(key)} is not UTF-8") from None
        entries[name] = _parse_entry(name, value, num_shards)
        name_bytes += len(key)
        if len(entries) > MOST_VARIABLES or name_bytes > _MOST_NAME_BYTES:
            raise Malformed(
                f"it lists more than {MOST_VARIABLES} variables, or {_MOST_NAME_BYTES} bytes of their names, "
                "which no EfficientDet has"
            )
    if num_shards is None:
        raise Malformed("it holds no header")
    return BundleIndex(path, num_shards, entries)


def _parse_header(path: Path, message: bytes) -> int:
    """Number of shards, from a ``BundleHeaderProto`` of a version and endianness that can be read."""
    num_shards = endianness = min_consumer = 0
    for number, _, value in wire.read_fields(message):
        if number == 1:
            num_shards = wire.expect_int(number, value)
        elif number == 2:
            endianness = wire.expect_int(number, value)
        elif number == 3:
            for inner, _, version in wire.read_fields(wire.expect_bytes(number, value)):
                if inner == 2:
                    min_consumer = wire.expect_int(inner, version)
    if endianness != 0:
        raise CheckpointError(
            f"{path} was written on a big-endian machine, which is not supported; "
            "load and save it again with TensorFlow on a little-endian one"
        )
    if min_consumer > 1:
        raise CheckpointError(
            f"{path} asks for version {min_consumer} of the checkpoint format, only version 1 is known; "
            "save it again with a released version of TensorFlow"
        )
    if not 0 <= num_shards < 1 << 31:
        raise Malformed(f"its header claims {num_shards} data files")
    return num_shards


def _parse_entry(name: str, message: bytes, num_shards: int) -> Entry:
    try:
        entry = _parse_usual_entry(message)
        if entry is None or not num_shards:
            entry = _parse_any_entry(message)
            _check_entry(entry, num_shards)
    except Malformed as error:
        shown = repr(name if len(name) <= _LONGEST_SHOWN else name[:_LONGEST_SHOWN] + "…")
        raise Malformed(f"the entry of variable {shown} is wrong: {error}") from None
    return entry


def _parse_usual_entry(message: bytes) -> Entry | None:
    """``message`` if it is of an array in the first data file, in the form in which TensorFlow writes it.

    That is type, shape, offset, size, checksum, in the order of their numbers and without zeros. A checkpoint
    has thousands of them; this takes a third of the time of reading the message field by field, which every
    other form still gets.
    """
    if len(message) < 9 or message[0] != 0x08 or message[2] != 0x12 or message[-5] != 0x35:
        return None
    if (message[1] | message[3]) >= 0x80:  # a type or a shape in more than one byte
        return None
    start = 4 + message[3]
    try:
        dtype, shape, size, size_field = _usual_array(message[:start])
        offset_field = message[start:-5].removesuffix(size_field)
        offset, stop = wire.read_varint(offset_field, 1) if offset_field[:1] == b"\x20" else (0, 0)
    except Malformed:
        return None
    if size is None or stop != len(offset_field) or start + stop + len(size_field) + 5 != len(message):
        return None
    if (size | offset) >> 63:  # the other way reads these as below zero
        return None
    crc32c = int.from_bytes(message[-4:], "little")
    return Entry(dtype, shape, 0, offset, size, crc32c, partitioned=False)


@lru_cache(maxsize=1024)  # a checkpoint's thousands of entries share a few hundred shapes
def _usual_array(fields: bytes) -> tuple[int, tuple[int, ...], int | None, bytes]:
    """Type and shape from ``fields``, the size in bytes that they make, and the field that says so."""
    dtype, shape = fields[1], _parse_shape(fields[4:])
    size = _byte_size(dtype, shape)
    return dtype, shape, size, b"\x28" + wire.write_varint(size) if size else b""


def _parse_any_entry(message: bytes) -> Entry:
    """A ``BundleEntryProto``."""
    dtype = shard = offset = size = crc32c = 0
    shape: tuple[int, ...] = ()
    partitioned = False
    for number, wire_type, value in wire.read_fields(message):
        if number == 1:
            dtype = wire.expect_int(number, value)
        elif number == 2:
            shape = _parse_shape(wire.expect_bytes(number, value))
        elif number == 3:
            shard = wire.expect_int(number, value)
        elif number == 4:
            offset = wire.expect_int(number, value)
        elif number == 5:
            size = wire.expect_int(number, value)
        elif number == 6 and wire_type == wire.FIXED32:
            crc32c = wire.expect_int(number, value)
        elif number == 7:
            partitioned = True
    return Entry(dtype, shape, shard, offset, size, crc32c, partitioned)


def _parse_shape(message: bytes) -> tuple[int, ...]:
    """A ``TensorShapeProto``."""
    shape: list[int] = []
    for number, _, value in wire.read_fields(message):
        if number == 2:
            length = 0
            for inner, _, dimension in wire.read_fields(wire.expect_bytes(number, value)):
                if inner == 1:
                    length = wire.expect_int(inner, dimension)
            if length < 0:
                raise Malformed(f"dimension {len(shape)} is {length}")
            shape.append(length)
            if len(shape) > _MAX_DIMENSIONS:
                raise Malformed(f"it has more than {_MAX_DIMENSIONS} dimensions")
        elif number == 3 and value:
            raise Malformed("its rank is unknown")
    return tuple(shape)


def _check_entry(entry: Entry, num_shards: int) -> None:
    dtype, shape, shard, offset, size, _, partitioned = entry
    if partitioned:
        return
    if not 0 <= shard < num_shards:
        raise Malformed(f"it lies in data file {shard} of {num_shards}")
    if offset < 0 or size < 0:
        raise Malformed(f"it claims {size} bytes at offset {offset}")
    if size != _byte_size(dtype, shape) is not None:
        raise Malformed(
            f"{entry.dtype_name} of shape {list(entry.shape)} does not fill the {entry.size} bytes it claims"
        )


def _byte_size(dtype: int, shape: tuple[int, ...]) -> int | None:
    """What an array takes on disk; None for types that are not plain arrays."""
    return math.prod(shape) * _DTYPES[dtype][1].itemsize if dtype in _DTYPES else None


class TensorBundle(Checkpoint):
    """A V2 checkpoint with its data files open. ``TensorBundle(read_index("model.index"))``.

    Raises CheckpointError if a data file is missing or too short for what the index says it holds. Each
    tensor's CRC32C is verified as it is read. Strings, partitioned variables and types that NumPy lacks are
    listed (dtype ``object``) but refuse to be read.
    """

    def __init__(self, index: BundleIndex) -> None:
        super().__init__(
            source=index.prefix,
            format=FORMAT,
            shapes={name: entry.shape for name, entry in index.entries.items()},
            dtypes={name: entry.array_dtype for name, entry in index.entries.items()},
        )
        self.index = index
        with ExitStack() as opened:
            self._files = {
                shard: opened.enter_context(_open_shard(index, shard, stop, name))
                for shard, (stop, name) in _extents(index).items()
            }
            self._close = weakref.finalize(self, opened.pop_all().close)

    def close(self) -> None:
        self._close()

    def _reading_order(self, names: list[str]) -> list[str]:
        entries = self.index.entries
        return sorted(names, key=lambda name: (entries[name].shard, entries[name].offset))

    def _read(self, name: str) -> np.ndarray:
        entry = self.index.entries[name]
        if entry.partitioned:
            raise self._refusal(name, "is split into slices (a partitioned variable)")
        if entry.storage is None:
            raise self._refusal(name, f"is of type {entry.dtype_name}, not a plain array")
        if entry.dtype == DT_BFLOAT16:
            return _widen_bfloat16(self._read_array(name, entry, entry.storage))
        if entry.storage == np.bool_:
            return self._read_bool(name, entry)
        return self._read_array(name, entry, entry.storage)

    def read_string(self, name: str) -> bytes:
        """The value of a string variable that holds one string (``_CHECKPOINTABLE_OBJECT_GRAPH`` does).

        It is stored as the length (varint), a masked CRC32C of the length, the bytes. Raises CheckpointError,
        and :class:`KeyError` if there is no such name.
        """
        entry = self.index.entries[name]
        if entry.dtype != DT_STRING or entry.partitioned or math.prod(entry.shape) != 1:
            raise self._refusal(name, "is not a single string")
        raw = self._read_bytes(name, entry, (entry.size,), np.dtype("u1")).tobytes()
        try:
            length, start = wire.read_varint(raw, 0)
        except Malformed as error:
            raise self._damage(name, entry, str(error)) from None
        if start + 4 + length != len(raw):
            raise self._damage(name, entry, f"its string of {length} bytes does not fill {len(raw)}")
        # TensorFlow sums the length as a fixed-width number, not as the varint it stores.
        fixed = length.to_bytes(4 if length < 1 << 32 else 8, "little")
        if mask_crc(google_crc32c.value(fixed + raw[start:])) != entry.crc32c:
            raise self._damage(name, entry, "it fails its CRC32C checksum")
        return raw[start + 4 :]

    def _read_bool(self, name: str, entry: Entry) -> np.ndarray:
        array = self._read_array(name, entry, np.dtype("u1"))
        if array.size and array.max() > 1:
            raise self._damage(name, entry, f"it holds the byte {array.max()} where a bool belongs")
        return array.view(np.bool_)

    def _read_array(self, name: str, entry: Entry, dtype: np.dtype) -> np.ndarray:
        array = self._read_bytes(name, entry, entry.shape, dtype)
        if mask_crc(google_crc32c.value(array)) != entry.crc32c:
            raise self._damage(name, entry, "it fails its CRC32C checksum")
        return array

    def _read_bytes(self, name: str, entry: Entry, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The entry's bytes straight from the file into a fresh array, checksum not looked at."""
        if not self._close.alive:
            raise CheckpointError(f"{self.source} is closed; open it again to read {name!r}")
        try:
            array = np.empty(shape, dtype)
        except (MemoryError, ValueError) as error:
            raise self._refusal(name, f"does not fit in memory ({error})") from None
        file = self._files[entry.shard]
        try:
            file.seek(entry.offset)
            count = file.readinto(array)  # type: ignore[attr-defined]
            if count != array.nbytes:
                self._read_rest(name, entry, array.reshape(-1).view(np.uint8).data[count:])
        except OSError as error:
            raise _unreadable(self.index.shard_path(entry.shard), error) from None
        return array

    def _read_rest(self, name: str, entry: Entry, unread: memoryview) -> None:
        """Fill ``unread`` from where the file stands: one request may return less than was asked for."""
        while unread:
            count = self._files[entry.shard].readinto(unread)  # type: ignore[attr-defined]
            if not count:
                raise self._damage(name, entry, f"the file ends {len(unread)} bytes too early")
            unread = unread[count:]

    def _damage(self, name: str, entry: Entry, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.index.shard_path(entry.shard)} is damaged at variable {name!r} "
            f"({entry.size} bytes at byte {entry.offset}): {what}; fetch the file again"
        )

    def _refusal(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: variable {name!r} {what}; it cannot be read here")


def _extents(index: BundleIndex) -> dict[int, tuple[int, str]]:
    """Shard → (how many bytes it must have, the variable that ends there), for shards with variables."""
    extents: dict[int, tuple[int, str]] = {}
    for name, entry in index.entries.items():
        if not entry.partitioned:
            stop = entry.offset + entry.size
            if stop >= extents.get(entry.shard, (0, ""))[0]:
                extents[entry.shard] = (stop, name)
    return extents


def _open_shard(index: BundleIndex, shard: int, stop: int, name: str) -> BinaryIO:
    path = index.shard_path(shard)
    try:
        size = path.stat().st_size
        if size >= stop:
            return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise CheckpointError(
            f"{index.path} is there but its data file {path.name} is not; put it beside the index"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    raise CheckpointError(
        f"{path} is cut short: it has {size} bytes, but variable {name!r} ends at byte {stop}; "
        "fetch the file again"
    )


def _widen_bfloat16(halves: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32; ``halves`` are its bits as uint16."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be read: {error.strerror or error}; check the path and permissions"
    )
