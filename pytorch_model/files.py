"""Files: bounded reads, JSON, checksums, atomic writes, locks.

A file that is written is either the complete old one or the complete new one, never part of either.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pytorch_model.errors import OutputError, Reason


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether ``path``, links followed, is neither a file nor a folder.

    It is then a pipe, a device or a socket: opening it may wait for ever, reading it may never end.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # nothing there, or a name that a file cannot have
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


#: What ``git clone`` without Git LFS leaves in place of a large file: a text of this beginning.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_POINTER_BYTES = 1024  # its specification's limit


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise OSError, its ``strerror`` the reason, if ``path`` cannot hold what its name says.

    That is if :func:`is_special`, or if it is a Git LFS pointer. Call it before opening a file.
    """
    if is_special(path):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", os.fspath(path))
    if _is_lfs_pointer(path):
        reason = "it is a Git LFS pointer, not the file itself: run git lfs pull"
        raise OSError(errno.EINVAL, reason, os.fspath(path))


def _is_lfs_pointer(path: str | os.PathLike[str]) -> bool:
    try:
        if os.path.isdir(path) or os.path.getsize(path) > _MOST_POINTER_BYTES:
            return False
        with open(path, "rb") as file:
            return file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except (OSError, ValueError):  # nothing there, not readable, or an impossible name: the reader says it
        return False


def read_bounded(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of the file at ``path``, of at most ``most`` bytes.

    Raises OSError, its ``strerror`` the reason, also for a larger file and for a pipe or device; and
    ValueError for a name that a file cannot have.
    """
    check_regular(path)
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size <= most:
            return file.read()
    raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", os.fspath(path))


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal. Raises OSError, also for a pipe, and ValueError."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def parse_json(data: bytes | str) -> Any:
    """Parse JSON text. Bytes may be UTF-8, UTF-16 or UTF-32, with or without a byte-order mark.

    Raises :class:`Reason`, also for an object that has a key twice, which Python's own reader accepts.
    """
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data))
        return json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise Reason(f"it is not JSON: byte {error.start} is not text") from None
    except json.JSONDecodeError as error:
        raise Reason(f"it is not JSON: {error}") from None
    except RecursionError:
        raise Reason("it is nested too deep") from None
    except ValueError:  # Python's message is for programmers
        raise Reason("it holds a number of thousands of digits") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise Reason(f"an object in it has the key {key[:40]!r} twice")
    return found


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` with the same suffix; leaving without an error renames it to ``path``.

    On any failure, Ctrl-C included, the temporary file is deleted and ``path`` is unchanged. Raises
    :class:`OutputError` for an error of the disk.
    """
    path = Path(path)
    _check_not_special(path)
    temporary = _temporary_beside(path, path.suffix)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error, "free some space or choose another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as JSON on one line, atomically. Raises :class:`OutputError` if the disk refuses."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside ``path``; leaving without an error renames it to ``path``.

    ``path`` must not exist, or be an empty folder. On any failure, Ctrl-C included, the temporary folder is
    deleted and ``path`` is unchanged. Raises :class:`OutputError` otherwise, and for an error of the disk.
    """
    path = Path(path)
    check_new_folder(path)
    temporary = _temporary_beside(path, "")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        os.replace(temporary, path)
    except OutputError as error:  # from a writer that knows only the temporary name
        raise OutputError(str(error).replace(str(temporary), str(path))) from None
    except OSError as error:
        raise _cannot_write(path, error, "free some space or choose another place") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Fail before long work: raise :class:`OutputError` unless :func:`new_folder` can create ``path``."""
    path = Path(path)
    if os.path.isdir(path) and any(path.iterdir()):
        raise OutputError(f"cannot write {path}: it is not empty; choose another folder")
    if not path.name:
        raise OutputError(f"cannot write {path}: it is the current folder or the root; give a folder name")
    if os.path.exists(path) and not os.path.isdir(path):
        raise OutputError(f"cannot write {path}: there is a file of that name; choose another folder")
    _check_place(path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail before long work, not after it: raise :class:`OutputError` unless ``path`` can be created."""
    path = Path(path)
    _check_not_special(path)
    _check_place(path)


def make_folder(path: str | os.PathLike[str]) -> None:
    """Create a folder to write into, and the folders above it.

    Raises :class:`OutputError` if that fails, or if the folder is not writable.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot create the folder {path}: {error.strerror or error}; choose another folder"
        ) from None
    _probe(path, path)


def _check_not_special(path: Path) -> None:
    if os.path.isdir(path):  # Path.is_dir raises on a name that is too long
        raise OutputError(f"cannot write {path}: it is a folder; give a file name")
    if is_special(path):
        raise OutputError(f"cannot write {path}: it is a pipe or a device, not a file; give a file name")


def _check_place(path: Path) -> None:
    if not os.path.isdir(path.parent):
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    _probe(path.parent, path)


def _probe(folder: Path, path: Path) -> None:
    """Try to write in ``folder``. Raises :class:`OutputError`, which names ``path``."""
    probe = _temporary_beside(folder / "probe", "")
    try:
        with suppress(FileNotFoundError):
            os.lstat(path)  # fails on a name that is too long; the probe's is shorter
        probe.touch(exist_ok=False)
    except OSError as error:
        raise _cannot_write(path, error, "choose a folder you may write to") from None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError, advice: str) -> OutputError:
    return OutputError(f"cannot write {path}: {error.strerror or error}; {advice}")


def _temporary_beside(path: Path, suffix: str) -> Path:
    """A new name beside ``path``; it is not too long for any folder that can hold ``path``."""
    start = path.name[:20]  # enough to recognise it; the whole name might exceed 255 bytes
    return path.with_name(f".{start}.{os.getpid()}-{secrets.token_hex(4)}{suffix}")


@contextmanager
def locked(path: Path, busy: Callable[[], object]) -> Iterator[bool]:
    """Hold the lock file ``path`` against other runs; it is created, and stays.

    If another run holds it, ``busy`` is called, which may raise; otherwise this waits. Yields False if the
    file system cannot lock files. Raises ``OSError`` if ``path`` cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            busy()
            lock.acquire()
    except NotImplementedError:  # some network file systems
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
