"""Name-based TensorFlow V2 checkpoints ("tensor bundles"), read without TensorFlow.

:mod:`.index` says where the values of each variable are; ``PREFIX.data-00000-of-00001`` (more files if
sharded) holds them: row-major, little-endian, one tensor after another, no padding.

Source: TensorFlow ``core/protobuf/tensor_bundle.proto`` and ``core/util/tensor_bundle/tensor_bundle.cc``.
"""

from __future__ import annotations

import math
import weakref
from contextlib import ExitStack
from typing import BinaryIO

import numpy as np

from porting.checkpoint.base import Checkpoint
from porting.checkpoint.messages import rounding_notes, unreadable
from porting.checkpoint.v2.index import DT_BFLOAT16, DT_STRING, BundleIndex, Entry
from porting.errors import CheckpointError
from pytorch_model.files import check_regular
from pytorch_model.formats import wire
from pytorch_model.formats.crc32c import masked_crc32c
from pytorch_model.formats.wire import Malformed

FORMAT = "TensorFlow V2 checkpoint"


class TensorBundle(Checkpoint):
    """A V2 checkpoint with its data files open. ``TensorBundle(read_index("model.index"))``.

    Raises CheckpointError if a data file is missing, or shorter than the index says. The CRC32C of each
    tensor is verified when it is read. Strings, partitioned variables and types that NumPy does not have are
    listed (dtype ``object``), but reading them raises CheckpointError.
    """

    def __init__(self, index: BundleIndex) -> None:
        super().__init__(
            source=index.prefix,
            format=FORMAT,
            shapes={name: entry.shape for name, entry in index.entries.items()},
            dtypes={name: entry.array_dtype for name, entry in index.entries.items()},
            notes=rounding_notes(entry.dtype_name for entry in index.entries.values()),
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
        """The value of a variable that is one string, such as ``_CHECKPOINTABLE_OBJECT_GRAPH``.

        It is stored as the length (varint), a masked CRC32C of the length, and the bytes. Raises
        CheckpointError, and :class:`KeyError` if there is no variable ``name``.
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
        # In the checksum, TensorFlow uses the length as a fixed-width number, not the varint that it stores.
        fixed = length.to_bytes(4 if length < 1 << 32 else 8, "little")
        if masked_crc32c(fixed + raw[start:]) != entry.crc32c:
            raise self._damage(name, entry, "it fails its CRC32C checksum")
        return raw[start + 4 :]

    def _read_bool(self, name: str, entry: Entry) -> np.ndarray:
        array = self._read_array(name, entry, np.dtype("u1"))
        if array.size and array.max() > 1:
            raise self._damage(name, entry, f"it is a bool but holds the byte {array.max()}")
        return array.view(np.bool_)

    def _read_array(self, name: str, entry: Entry, dtype: np.dtype) -> np.ndarray:
        array = self._read_bytes(name, entry, entry.shape, dtype)
        if masked_crc32c(array) != entry.crc32c:
            raise self._damage(name, entry, "it fails its CRC32C checksum")
        return array

    def _read_bytes(self, name: str, entry: Entry, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Read the entry's bytes into a new array, without verifying the checksum."""
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
            raise unreadable(self.index.shard_path(entry.shard), error) from None
        return array

    def _read_rest(self, name: str, entry: Entry, unread: memoryview) -> None:
        """Fill ``unread`` from the current position: one request may return fewer bytes than requested."""
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
    """Shard → (the bytes that it must have at least, the variable that ends there), if it has variables."""
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
        check_regular(path)
        if size >= stop:
            return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise CheckpointError(
            f"{index.path} exists but its data file {path.name} does not; put both in one folder"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None
    raise CheckpointError(
        f"{path} is cut short: it has {size} bytes, but variable {name!r} ends at byte {stop}; "
        "fetch the file again"
    )


def _widen_bfloat16(halves: np.ndarray) -> np.ndarray:
    """bfloat16 → float32, of which it is the upper half. ``halves``: its bits as uint16."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
