"""The index of a TensorFlow V2 checkpoint: names, shapes, dtypes and positions of all variables.

``PREFIX.index`` is a LevelDB table from variable name to ``BundleEntryProto``. The values are in the data
files (:mod:`.bundle`).

Source: TensorFlow ``core/protobuf/tensor_bundle.proto`` and ``core/util/tensor_bundle/tensor_bundle.cc``.
"""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from porting.checkpoint.base import MOST_VARIABLES
from porting.checkpoint.messages import parse_shape, shortened, unreadable
from porting.checkpoint.v2.table import FOOTER_SIZE, is_table, read_table
from porting.errors import CheckpointError
from pytorch_model.files import read_bounded
from pytorch_model.formats import wire
from pytorch_model.formats.wire import Malformed

HEADER_KEY = b""
SLICE_PREFIX = b"\0"  # keys of the slices of partitioned variables; no variable name starts with it

# TensorFlow core/framework/types.proto: DataType → (its name, the dtype of the bytes on disk)
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

_MOST_INDEX_BYTES = 16 << 20  # of an index file; that of D4 with averages has 100 kB
_LONGEST_CACHED = 128  # bytes of a TensorShapeProto; a convolution kernel's has about 20
_MOST_NAME_BYTES = (
    8 << 20
)  # a key shares the beginning of the one before, so a small file can hold very long ones


class Entry(NamedTuple):
    """One variable in the index (``BundleEntryProto``)."""

    dtype: int  # TensorFlow's DataType
    shape: tuple[int, ...]
    shard: int
    offset: int  # bytes, in its shard
    size: int  # bytes
    crc32c: int  # masked
    partitioned: bool  # stored in slices under other keys; offset, size and checksum have no meaning

    @property
    def dtype_name(self) -> str:
        if self.dtype in _DTYPES:
            return _DTYPES[self.dtype][0]
        return _OTHER_DTYPES.get(self.dtype, f"number {self.dtype}")

    @property
    def storage(self) -> np.dtype | None:
        """The dtype of the bytes on disk; None if they are not a plain array."""
        return _DTYPES[self.dtype][1] if self.dtype in _DTYPES else None

    @property
    def array_dtype(self) -> np.dtype:
        """The dtype of the array that reading returns (bfloat16 is widened); ``object``: not readable."""
        if self.dtype == DT_BFLOAT16:
            return np.dtype(np.float32)
        if self.partitioned or self.storage is None:
            return np.dtype(object)
        return self.storage


@dataclass(frozen=True)
class BundleIndex:
    """The content of an ``.index`` file: everything about the variables except their values."""

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
    """Read an ``.index`` file: names, shapes, dtypes and positions of all variables.

    Every byte is checked (CRC32C of each block, order of keys). The data files are not opened. Raises
    CheckpointError.
    """
    path = Path(path)
    try:
        data = read_bounded(path, _MOST_INDEX_BYTES)
    except OSError as error:
        raise unreadable(path, error) from None
    if not is_table(data[-FOOTER_SIZE:]):
        raise CheckpointError(
            f"{path} is not the index of a TensorFlow checkpoint, or is cut short: its last "
            f"{FOOTER_SIZE} bytes (of {len(data)}) are not a table's footer; fetch the file again"
        )
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
            continue  # the variable is also listed under its own name, marked as partitioned
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
    """The number of shards in a ``BundleHeaderProto``. Raises if version or endianness are not supported."""
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
            f"{path} needs version {min_consumer} of the checkpoint format, only version 1 is supported; "
            "save it again with a released version of TensorFlow"
        )
    if not 0 <= num_shards < 1 << 31:
        raise Malformed(f"its header claims {num_shards} data files")
    return num_shards


def _parse_entry(name: str, message: bytes, num_shards: int) -> Entry:
    """A ``BundleEntryProto``, checked."""
    try:
        entry = _read_entry(message)
        _check_entry(entry, num_shards)
    except Malformed as error:
        raise Malformed(f"the entry of variable {shortened(name)!r} is wrong: {error}") from None
    return entry


def _read_entry(message: bytes) -> Entry:
    dtype = shard = offset = size = crc32c = 0
    shape: tuple[int, ...] = ()
    partitioned = False
    for number, wire_type, value in wire.read_fields(message):
        if number == 1:
            dtype = wire.expect_int(number, value)
        elif number == 2:
            shape = _shape(wire.expect_bytes(number, value))
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


def _shape(message: bytes) -> tuple[int, ...]:
    # A long message is not from TensorFlow; a cache of such messages could hold gigabytes.
    return _cached_shape(message) if len(message) < _LONGEST_CACHED else parse_shape(message)


@lru_cache(maxsize=1024)  # the thousands of entries of a checkpoint share a few hundred shapes
def _cached_shape(message: bytes) -> tuple[int, ...]:
    return parse_shape(message)


def _check_entry(entry: Entry, num_shards: int) -> None:
    dtype, shape, shard, offset, size, _, partitioned = entry
    if partitioned:
        return
    if not 0 <= shard < num_shards:
        raise Malformed(f"it is in data file {shard} of {num_shards}")
    if offset < 0 or size < 0:
        raise Malformed(f"it claims {size} bytes at offset {offset}")
    if size != _byte_size(dtype, shape) is not None:
        raise Malformed(
            f"{entry.dtype_name} of shape {list(entry.shape)} does not fill the {entry.size} bytes it claims"
        )


def _byte_size(dtype: int, shape: tuple[int, ...]) -> int | None:
    """The number of bytes of an array on disk; None for types that are not plain arrays."""
    return math.prod(shape) * _DTYPES[dtype][1].itemsize if dtype in _DTYPES else None
