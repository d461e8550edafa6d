"""Write a name-based TensorFlow V2 checkpoint that TensorFlow can read."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from porting.checkpoint.v2.index import DTYPE_NUMBERS, HEADER_KEY, SLICE_PREFIX, shard_path
from porting.checkpoint.v2.locate import STATE_FILE
from porting.checkpoint.v2.table import write_table
from porting.errors import OutputError
from pytorch_model.formats import wire
from pytorch_model.formats.crc32c import masked_crc32c


def write_bundle(
    prefix: str | os.PathLike[str], variables: Mapping[str, np.ndarray], num_shards: int = 1
) -> None:
    """Write ``variables`` as ``PREFIX.index`` and ``PREFIX.data-…``, and the state file ``checkpoint``.

    Arrays are read one at a time, so a lazy mapping is never completely in memory. Missing folders are
    created, and an older checkpoint with the same prefix is replaced. On any failure, including Ctrl-C, the
    folder is restored to its state before the call. ``num_shards``: the number of data files.

    Raises :class:`~porting.errors.OutputError` if it cannot be written: a name or dtype that the format does
    not allow, a full disk, missing permission.
    """
    prefix = Path(prefix)
    if not prefix.name:
        raise OutputError(f"{prefix} is not a checkpoint prefix; add a name, such as {prefix / 'model'}")
    names = _sorted_names(prefix, variables)
    try:
        with _Replacement(prefix.parent) as output:
            entries = _write_shards(output, prefix, variables, names, num_shards)
            index = write_table([(HEADER_KEY, _header(num_shards)), *entries])
            with output.create(f"{prefix.name}.index") as file:
                file.write(index)
            with output.create(STATE_FILE) as file:
                file.write(_state(prefix.name))
            output.commit()
    except OSError as error:
        raise OutputError(
            f"{prefix} cannot be written: {error.strerror or error}; free some space or choose another place"
        ) from None


def _sorted_names(prefix: Path, variables: Mapping[str, np.ndarray]) -> list[str]:
    """The names in the order of the table: sorted by their UTF-8 bytes."""
    for name in variables:
        if not name or name.startswith(SLICE_PREFIX.decode()):
            raise OutputError(f"{prefix} cannot be written: {name!r} is not a variable name; rename it")
        try:
            name.encode()
        except UnicodeEncodeError:
            raise OutputError(
                f"{prefix} cannot be written: the variable name {name!r} is not valid Unicode; rename it"
            ) from None
    return sorted(variables, key=str.encode)


def _write_shards(
    output: _Replacement, prefix: Path, variables: Mapping[str, np.ndarray], names: list[str], num_shards: int
) -> list[tuple[bytes, bytes]]:
    """Write the data files; returns the index entries, in order."""
    entries: list[tuple[bytes, bytes]] = []
    with ExitStack() as opened:
        files = [
            opened.enter_context(output.create(shard_path(prefix.name, shard, num_shards).name))
            for shard in range(num_shards)
        ]
        for position, name in enumerate(names):
            shard = position * num_shards // len(names)
            array = np.asarray(variables[name], order="C")
            array = array.astype(array.dtype.newbyteorder("<"), copy=False)
            if array.dtype not in DTYPE_NUMBERS:
                raise OutputError(
                    f"{prefix} cannot be written: variable {name!r} has dtype {array.dtype}, "
                    "which is not supported; convert it first"
                )
            offset = files[shard].tell()
            files[shard].write(array.reshape(-1).view(np.uint8).data)
            entries.append((name.encode(), _entry(array, shard, offset)))
    return entries


def _header(num_shards: int) -> bytes:
    """``BundleHeaderProto``: little-endian (the default), format version 1."""
    return wire.int_field(1, num_shards) + wire.bytes_field(3, wire.int_field(1, 1))


def _entry(array: np.ndarray, shard: int, offset: int) -> bytes:
    """``BundleEntryProto``."""
    shape = b"".join(wire.bytes_field(2, wire.int_field(1, length)) for length in array.shape)
    return (
        wire.int_field(1, DTYPE_NUMBERS[array.dtype])
        + wire.bytes_field(2, shape)
        + wire.int_field(3, shard)
        + wire.int_field(4, offset)
        + wire.int_field(5, array.nbytes)
        + wire.fixed32_field(6, masked_crc32c(array))
    )


def _state(name: str) -> bytes:
    """A ``CheckpointState`` in text form."""
    quoted = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'model_checkpoint_path: "{quoted}"\nall_model_checkpoint_paths: "{quoted}"\n'.encode()


class _Replacement:
    """Files that appear in a folder together or not at all.

    They are written under temporary names; :meth:`commit` renames them in the order of creation. Leaving the
    context without a commit restores the folder to its earlier state.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._token = f".{os.getpid()}-{secrets.token_hex(4)}"
        self._names: list[str] = []
        self._new_folders: list[Path] = []
        self._moved: list[str] = []  # the names of the files that commit may have moved
        self._done = False

    def __enter__(self) -> _Replacement:
        missing = [f for f in (self._folder, *self._folder.parents) if not f.exists()]
        try:
            for folder in reversed(missing):
                self._new_folders.append(folder)
                folder.mkdir()
        except BaseException:
            self._roll_back()
            raise
        return self

    def create(self, name: str) -> BinaryIO:
        """Open a file for writing; :meth:`commit` renames it to ``name``."""
        self._names.append(name)
        return open(self._temporary(name), "wb")

    def commit(self) -> None:
        # First to the disk: otherwise a crash could leave the new names without contents.
        for name in self._names:
            with open(self._temporary(name), "rb") as file:
                os.fsync(file.fileno())
        for name in self._names:
            final = self._folder / name
            if final.is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{final} is a folder")
            self._moved.append(name)
            with suppress(FileNotFoundError):
                os.replace(final, self._backup(name))
            os.replace(self._temporary(name), final)
        self._done = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            self._roll_back()
        for name in self._names:
            with suppress(OSError):
                self._backup(name).unlink(missing_ok=True)

    def _roll_back(self) -> None:
        for name in reversed(self._names):
            temporary, backup, final = self._temporary(name), self._backup(name), self._folder / name
            with suppress(OSError):
                if name in self._moved and not temporary.exists():
                    final.unlink(missing_ok=True)  # already replaced by ours
                temporary.unlink(missing_ok=True)
                if backup.exists():
                    os.replace(backup, final)
        for folder in reversed(self._new_folders):
            with suppress(OSError):
                folder.rmdir()

    def _temporary(self, name: str) -> Path:
        return self._folder / f".{name}.new{self._token}"

    def _backup(self, name: str) -> Path:
        return self._folder / f".{name}.old{self._token}"
