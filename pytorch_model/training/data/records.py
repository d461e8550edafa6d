"""TFRecord files without TensorFlow: any record in any order, every byte checked.

A record is: its length, 8 bytes; a masked CRC32C of these; the data; a masked CRC32C of the data. Numbers are
little-endian. Source: TensorFlow ``core/lib/io/record_writer.cc``.
"""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from pytorch_model.errors import Reason
from pytorch_model.evaluation.dataset import DatasetError
from pytorch_model.files import check_regular
from pytorch_model.formats.crc32c import masked_crc32c

#: Bytes of one record: the limit of protocol buffers.
MOST_BYTES = 1 << 31

_HEADER, _FOOTER = 12, 4
_GZIP = b"\x1f\x8b\x08"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ADVICE = "fetch the file again, or write it again"


class RecordFile:
    """The records of one file, plain or GZIP. ``len()`` counts them; they can be read by several processes.

    Opening walks over the lengths of all records, each checked; reading one checks its data. A GZIP file
    cannot be read from the middle, so it is unpacked once, into an unnamed file in the folder for temporary
    files (``TMPDIR``); processes that are forked share it, others unpack their own.

    Opening and reading raise :class:`DatasetError`, for damage with the record's number, from 1, and the byte
    at which it begins.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unpacked: IO[bytes] | None = None
        self._starts = array("q", [0])  # of every record, and the end of the last
        with self._opened() as file:
            self._packed = _is_gzip(file)
        with self._readable() as file:
            self._walk(file.fileno())

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_unpacked": None}

    def read(self, index: int) -> bytes:
        """The data of record ``index``, counted from 0."""
        start, end = self._starts[index], self._starts[index + 1]
        with self._readable() as file:
            record = os.pread(file.fileno(), end - start, start)
        try:
            if _length(record[:_HEADER]) != end - start - _HEADER - _FOOTER or len(record) < end - start:
                raise Reason("the file has changed since it was opened")
            if masked_crc32c(record[_HEADER:-_FOOTER]) != int.from_bytes(record[-_FOOTER:], "little"):
                raise Reason("the checksum of its data is wrong")
        except Reason as reason:
            self._damaged(index, reason)
        return record[_HEADER:-_FOOTER]

    def place(self, index: int) -> str:
        """Where record ``index`` is, for messages."""
        unpacked = " of the unpacked data" if self._packed else ""
        return f"{self.path}, record {index + 1} at byte {self._starts[index]:,}{unpacked}"

    def _walk(self, descriptor: int) -> None:
        size, position = os.fstat(descriptor).st_size, 0
        while position < size:
            try:
                length = _length(os.pread(descriptor, _HEADER, position))
                if length > MOST_BYTES:
                    raise Reason(f"it has {length:,} bytes, protocol buffers may have {MOST_BYTES:,}")
                if position + _HEADER + length + _FOOTER > size:
                    raise Reason("the file ends within it")
            except Reason as reason:
                self._damaged(len(self), reason)
            position += _HEADER + length + _FOOTER
            self._starts.append(position)

    def _damaged(self, index: int, reason: Reason) -> NoReturn:
        raise DatasetError(f"{self.place(index)}, is damaged: {reason}; {_ADVICE}") from None

    @contextmanager
    def _readable(self) -> Iterator[IO[bytes]]:
        """A file that holds the records as they are. It is not closed if it is the unpacked one."""
        if self._packed:
            if self._unpacked is None:
                self._unpacked = self._unpack()
            yield self._unpacked
        else:
            with self._opened() as file:
                yield file

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            check_regular(self.path)
            with open(self.path, "rb", buffering=0) as file:
                yield file
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = getattr(error, "strerror", None) or error
            raise DatasetError(f"{self.path} cannot be read: {reason}; give a TFRecord file") from None

    def _unpack(self) -> IO[bytes]:
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115  it is closed with the object that keeps it
        try:
            with self._opened() as file, gzip.open(file) as packed:
                try:
                    shutil.copyfileobj(packed, unpacked, 1 << 20)
                    unpacked.flush()
                except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                    raise DatasetError(
                        f"{self.path} is a damaged GZIP file: {error}, after {unpacked.tell():,} unpacked "
                        f"bytes; {_ADVICE}"
                    ) from None
                except OSError as error:
                    if error.errno not in _NO_SPACE:
                        raise
                    raise DatasetError(
                        f"{self.path} cannot be unpacked: there is no space for it in "
                        f"{tempfile.gettempdir()}; let TMPDIR name another folder, or unpack it yourself"
                    ) from None
        except BaseException:
            unpacked.close()
            raise
        return unpacked


def holds_records(path: Path) -> bool:
    """Whether there is a file at ``path`` that begins with a record, plain or GZIP."""
    try:
        check_regular(path)
        with open(path, "rb") as file:
            if _is_gzip(file):
                with gzip.open(file) as packed:
                    header = packed.read(_HEADER)
            else:
                header = file.read(_HEADER)
        _length(header)
    except (OSError, ValueError, EOFError, zlib.error, Reason):
        return False
    return True


def _is_gzip(file: IO[bytes]) -> bool:
    """Whether the file is packed. Position 0 is restored. A plain record may begin with the same bytes."""
    header = file.read(_HEADER)
    file.seek(0)
    try:
        _length(header)
    except Reason:
        return header.startswith(_GZIP)
    return False


def _length(header: bytes) -> int:
    """The length that the 12 bytes before a record's data state. Raises :class:`Reason`."""
    if len(header) < _HEADER:
        raise Reason("the file ends within it")
    if masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
        raise Reason("the checksum of its length is wrong")
    return int.from_bytes(header[:8], "little")
