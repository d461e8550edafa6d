"""Writing a file so that the target is the complete old one or the complete new one, never part of either."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from porting.errors import OutputError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path``, of the same suffix; leaving without an error renames it to ``path``.

    On any failure, Ctrl-C included, the temporary file is gone and ``path`` is as it was. Raises
    :class:`OutputError` for what the disk refuses.
    """
    path = Path(path)
    if os.path.isdir(path):  # Path.is_dir raises on a name that is too long
        raise OutputError(f"cannot write {path}: it is a folder; give a file name")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside ``path``; leaving without an error renames it to ``path``.

    ``path`` must not exist, or be an empty folder. On any failure, Ctrl-C included, the temporary folder is
    gone and ``path`` is as it was. Raises :class:`OutputError` for what is there or what the disk refuses.
    """
    path = Path(path)
    check_new_folder(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        os.replace(temporary, path)
    except OutputError as error:  # from a writer who knows the temporary name alone
        raise OutputError(str(error).replace(str(temporary), str(path))) from None
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_folder(path: str | os.PathLike[str]) -> None:
    """Fail before long work: raise :class:`OutputError` unless ``path`` is fit for :func:`new_folder`."""
    path = Path(path)
    if os.path.isdir(path) and any(path.iterdir()):
        raise OutputError(f"cannot write {path}: there is something in it already; choose another folder")
    if not path.name:
        raise OutputError(f"cannot write {path}: the folder would be replaced under your feet; give a name")
    if os.path.exists(path) and not os.path.isdir(path):
        raise OutputError(f"cannot write {path}: there is a file of that name; choose another folder")
    if not os.path.isdir(path.parent):
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}; create it first")


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fail before long work, not after it: raise :class:`OutputError` unless ``path`` can be created."""
    path = Path(path)
    if os.path.isdir(path):  # Path.is_dir raises on a name that is too long
        raise OutputError(f"cannot write {path}: it is a folder; give a file name")
    if not os.path.isdir(path.parent):
        raise OutputError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    probe = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}.probe")
    try:
        probe.touch(exist_ok=False)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; choose a folder you may write to"
        ) from None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def lock(file: int, busy: Callable[[], object]) -> bool:
    """Lock an open file against other runs, until it is closed or the process ends.

    Where another run holds it, ``busy`` is called, which may raise; then this waits. False where files cannot
    be locked.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy()
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # some network file systems
        return False
    return True
