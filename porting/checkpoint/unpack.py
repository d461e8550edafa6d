"""Unpack what may be weights from an archive that is not trusted.

Nothing is written outside the target folder, no link is followed, and how much is unpacked is bounded.
"""

from __future__ import annotations

import errno
import gzip
import os
import re
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO, NamedTuple, NoReturn

from porting.checkpoint.base import HEAD_SIZE
from porting.checkpoint.messages import shortened
from porting.checkpoint.v2.locate import STATE_FILE
from porting.errors import CheckpointError, Reason
from porting.hparams import RUN_CONFIG

_GZIP_MAGIC = b"\x1f\x8b"
_ZIP_MAGICS = (b"PK\x03\x04", b"PK\x05\x06")  # the second is that of an empty archive
_OTHER_MAGICS = {  # formats that are not supported
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
}
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257

#: Files that hold weights, describe them and their training, or name their classes; also the graph
#: (``.meta``), which can be a reference.
_WANTED = re.compile(
    rf"{STATE_FILE}|pipeline\.config|{re.escape(RUN_CONFIG)}|.*label_?map.*\.(pbtxt|txt)|.+\.(index|meta|data-\d{{5,}}-of-\d{{5,}}|h5|hdf5|tflite|pb)"
)
# The largest EfficientDet, D7x, is 0.9 GB with averages and optimizer slots; float weights hardly compress.
_MOST_BYTES = 8 << 30
_MOST_EXPANSION = 100
_ALWAYS_ALLOWED = 256 << 20
_MOST_MEMBERS = 100_000
_MOST_DEPTH = 32  # folders in folders
_HEADER_ROOM = 1 << 20  # bytes for the headers of one tar member (long names, extended attributes)
_CHUNK = 1 << 18  # bytes


def _lzma_errors() -> tuple[type[Exception], ...]:
    try:
        from lzma import LZMAError
    except ImportError:  # a Python built without lzma cannot read such archives either
        return ()
    return (LZMAError,)


# Everything the standard library raises on a damaged or hostile archive.
_DAMAGE: tuple[type[Exception], ...] = (
    *_lzma_errors(),
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    gzip.BadGzipFile,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
    struct.error,
    IndexError,
    KeyError,
)

# The system's errors for a name that is too long, or for a path that is both a file and a folder.
_NAME_FAULTS = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


class _Rejected(Reason):
    """Internal: what is wrong with the archive and what to do; the caller puts the path before it."""


class _Member(NamedTuple):
    """One entry of an archive. Its data must be read before the next member is requested."""

    name: str
    size: int  # bytes, as declared
    is_file: bool  # a plain file: not a folder, link, device or sparse file
    is_folder: bool
    data: IO[bytes] | None  # of plain files


def unpack(archive: Path, folder: Path) -> list[PurePosixPath]:
    """Copy the files that may be weights from ``archive`` into ``folder``; returns their paths in it.

    Raises :class:`~porting.errors.CheckpointError` if the archive is damaged, hostile or too large, or if
    there is not enough room.
    """
    found: dict[PurePosixPath, None] = {}
    try:
        with open(archive, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            limit = min(_MOST_BYTES, max(_ALWAYS_ALLOWED, _MOST_EXPANSION * size))
            for member in _bounded(_members(file, limit), limit):
                place = _place(member)
                if place is not None and member.data is not None:
                    found[place] = None
                    with _own_faults(member):
                        _copy(member, member.data, folder / place)
    except _Rejected as rejection:
        raise CheckpointError(f"{archive} {rejection}") from None
    except _DAMAGE as error:
        _damaged(archive, error)
    except OSError as error:
        # zipfile seeks to any position that the archive contains (EINVAL); bz2 raises without a number.
        if error.errno in (errno.EINVAL, None):
            _damaged(archive, error)
        no_room(archive, error)
    return list(found)


@contextmanager
def _own_faults(member: _Member) -> Iterator[None]:
    """Report the system's errors that are caused by the name of ``member``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NAME_FAULTS:
            raise
        raise _Rejected(
            f"holds {shortened(member.name)!r}, which cannot be unpacked together with the rest "
            f"({error.strerror}); pack it under another name"
        ) from None


def _members(file: BinaryIO, limit: int) -> Iterator[_Member]:
    head = file.read(HEAD_SIZE)
    kind = kind_of(head)
    file.seek(0)
    if kind == "zip":
        yield from _zip_members(file)
    elif kind == "gzip":
        with gzip.open(file) as stream:
            yield from _tar_members(_Metered(stream, limit))
    elif kind == "tar":
        yield from _tar_members(_Metered(file, limit))
    elif kind:
        raise _Rejected(f"is packed by {kind}, which is not supported; unpack it, or pack it as .tar.gz")
    else:
        raise _Rejected(f"is not an archive: it begins with {head[:16]!r}; fetch or make it again")


def kind_of(head: bytes) -> str | None:
    """The format of an archive that begins with ``head``; None if it is not an archive."""
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    if head.startswith(_ZIP_MAGICS):
        return "zip"
    if head[_TAR_MAGIC_AT:].startswith(_TAR_MAGIC):
        return "tar"
    return next((name for magic, name in _OTHER_MAGICS.items() if head.startswith(magic)), None)


class _Metered:
    """The stream of a tar file; reading more than was allowed raises :class:`_Rejected`.

    ``allow`` permits reading a member's data. Without it, only the headers of one member can be read. (Their
    sizes come from the archive too, and tarfile reads them completely.)
    """

    def __init__(self, stream: BinaryIO | gzip.GzipFile, limit: int) -> None:
        self._stream, self._limit = stream, limit
        self._position, self._allowed = 0, 0
        self.allow(0)

    def allow(self, size: int) -> None:
        self._allowed = min(self._limit, self._position + size + _HEADER_ROOM)

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        if self._position > self._allowed:
            raise _Rejected("unpacks to more than it declares or than a checkpoint needs; it was rejected")
        return data


def _tar_members(stream: _Metered) -> Iterator[_Member]:
    # In stream mode tarfile never seeks, so each byte is decompressed once.
    with tarfile.open(mode="r|", fileobj=stream, bufsize=_CHUNK) as tar:  # type: ignore[call-overload]
        for info in tar:
            is_file = info.isreg() and not info.issparse()
            stream.allow(info.size)
            data = tar.extractfile(info) if is_file else None
            yield _Member(info.name, info.size, is_file, info.isdir(), data)
        # tarfile treats a broken header as the end. Reading the rest also lets gzip verify its checksum.
        while rest := tar.fileobj.read(_CHUNK):
            if rest.strip(b"\0"):
                raise _Rejected("is damaged: a header in it is broken; fetch or make the archive again")


def _zip_members(file: BinaryIO) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            is_folder = info.is_dir()
            mode = info.external_attr >> 16  # Unix permissions; 0 from other systems
            is_file = not is_folder and (not stat.S_IFMT(mode) or stat.S_ISREG(mode))
            data: IO[bytes] | None = None
            if is_file and _is_wanted(info.filename):
                if info.flag_bits & 1:
                    raise _Rejected(f"is encrypted; unpack {shortened(info.filename)!r} and name its folder")
                data = archive.open(info)
            yield _Member(info.filename, info.file_size, is_file, is_folder, data)


def _bounded(members: Iterable[_Member], limit: int) -> Iterator[_Member]:
    total = 0
    for count, member in enumerate(members, start=1):
        total += member.size
        if total > limit:
            raise _Rejected(
                f"would unpack to more than {limit / 1e9:.1f} GB, which no checkpoint of its size does; "
                "unpack it yourself if you trust it, and name the folder"
            )
        if count > _MOST_MEMBERS:
            raise _Rejected(f"holds more than {_MOST_MEMBERS:,} files; unpack it and name the checkpoint")
        yield member


def _is_wanted(name: str) -> bool:
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if not parts or parts[-1].startswith("._"):  # macOS adds such files with attributes of a file
        return False
    return _WANTED.fullmatch(parts[-1]) is not None


def _place(member: _Member) -> PurePosixPath | None:
    """The path of a member in the target folder; None if it is not needed. Rejects paths that lead out."""
    if member.is_folder or not _is_wanted(member.name):
        return None
    if not member.is_file:
        if PurePosixPath(member.name.replace("\\", "/")).name == RUN_CONFIG:  # weights can do without it
            return None
        raise _Rejected(
            f"holds {shortened(member.name)!r} as a link, device or sparse file, which is not supported; "
            "pack a plain file"
        )
    path = PurePosixPath(member.name.replace("\\", "/"))
    if len(path.parts) > _MOST_DEPTH:
        raise _Rejected(f"holds folders {len(path.parts)} deep; unpack it and name the checkpoint")
    if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or "\0" in member.name:
        raise _Rejected(
            f"holds the path {shortened(member.name)!r}, which leads out of it; it was not unpacked"
        )
    return path


def _copy(member: _Member, data: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # if two members have one name, the later one is used
    written = 0
    with open(target, "xb") as file:
        while chunk := data.read(_CHUNK):
            written += len(chunk)
            if written > member.size:
                break
            file.write(chunk)
    if written != member.size:
        raise _Rejected(
            f"is damaged: {shortened(member.name)!r} declares {member.size} bytes and has "
            f"{'more' if written > member.size else written}; fetch or make the archive again"
        )


def _damaged(archive: Path, error: Exception) -> NoReturn:
    reason = str(error) or type(error).__name__
    raise CheckpointError(f"{archive} is damaged: {reason[:200]}; fetch or make the archive again") from None


def no_room(archive: Path, error: OSError) -> NoReturn:
    """Raise the error for an archive that cannot be read, or that the temporary folder cannot hold."""
    raise CheckpointError(
        f"{archive} cannot be unpacked into {tempfile.gettempdir()}: {error.strerror or error}; "
        "check the path, free some space, or set TMPDIR to a folder with room"
    ) from None
