"""Counts the moments at which a command changes files, and kills the process at one of them."""

from __future__ import annotations

import builtins
import io
import json
import os
import pathlib
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEFORE, MIDDLE, AFTER = "before", "in the middle of", "after"

#: Functions of ``os`` that change files by name → the number of the argument with the name.
NAMED = {"replace": 2, "rename": 2, "unlink": 1, "remove": 1, "rmdir": 1, "mkdir": 1, "truncate": 1}


@dataclass(frozen=True)
class Moment:
    """Before, in the middle of, or after call number ``call``, which changes a file.

    ``what``: the function and the file's name, without the random part of temporary names.
    """

    call: int
    phase: str
    what: str

    def __str__(self) -> str:
        return f"{self.phase} call {self.call}, {self.what}"


class Calls:
    """The calls that change files in ``folder``, in this process, after :meth:`watch`.

    These are functions of ``os``, and ``open`` for writing with the writes that follow; pathlib uses the same
    ones. Files opened by compiled code are not seen; ``written``, the number of bytes seen, reveals that.
    With a ``moment``, the process kills itself at that moment; in the middle of a write, half of it is on
    disk.
    """

    def __init__(self, folder: Path, moment: Moment | None = None) -> None:
        self.folder = os.path.join(os.path.realpath(folder), "")
        self.moment = moment
        self.moments: list[Moment] = []
        self.written = 0
        self._count = 0

    def watch(self) -> None:
        """Wrap the calls, for as long as the process lives."""
        for name, arguments in NAMED.items():
            self._wrap(name, self._by_name(getattr(os, name), name, arguments))
        self._wrap("fsync", self._by_file(os.fsync))
        self._wrap("open", self._low_level(os.open))
        plain = io.open
        builtins.open = io.open = self._opening(plain)
        accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10 keeps what it found at import
        if accessor:
            accessor.open = staticmethod(io.open)

    def save(self, path: Path) -> None:
        """Write the moments to ``path`` for :func:`load`. Called last."""
        content = json.dumps([self.written, [vars(moment) for moment in self.moments]])
        file = os.open(os.fspath(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(file, content.encode())
        os.close(file)

    def _wrap(self, name: str, wrapper: Callable[..., Any]) -> None:
        setattr(os, name, wrapper)
        accessor = getattr(pathlib, "_NormalAccessor", None)
        if accessor and hasattr(accessor, name):
            setattr(accessor, name, staticmethod(wrapper))

    def at(self, what: str, do: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Count and make one call, ``do()``. ``half()`` does half of it."""
        self._count += 1
        number = self._count
        self.moments += [Moment(number, phase, what) for phase in ((BEFORE, MIDDLE) if half else (BEFORE,))]
        now = self.moment.phase if self.moment and self.moment.call == number else None
        if now == BEFORE:
            _die()
        if now == MIDDLE and half:
            half()
            _die()
        result = do()  # a call that fails has no "after", such as an unlink of a missing file
        self.moments.append(Moment(number, AFTER, what))
        if now == AFTER:
            _die()
        return result

    def _concerns(self, path: object) -> bool:
        if not isinstance(path, (str, os.PathLike)):
            return False  # an open file by number
        parent, name = os.path.split(os.path.abspath(os.fspath(path)))
        return os.path.join(os.path.realpath(parent), str(name)).startswith(self.folder)

    def _by_name(self, call: Callable[..., Any], name: str, arguments: int) -> Callable[..., Any]:
        def wrapped(*given: Any, **options: Any) -> Any:
            if len(given) < arguments or not self._concerns(given[arguments - 1]):
                return call(*given, **options)
            what = f"{name} {_name(given[arguments - 1])}"
            return self.at(what, lambda: call(*given, **options))

        return wrapped

    def _by_file(self, call: Callable[[Any], None]) -> Callable[[Any], None]:
        return lambda file: self.at("fsync", lambda: call(file))

    def _low_level(self, call: Callable[..., int]) -> Callable[..., int]:
        def wrapped(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            if not flags & (os.O_WRONLY | os.O_RDWR) or not self._concerns(path):
                return call(path, flags, *rest, **options)
            opened: int = self.at(f"open {_name(path)}", lambda: call(path, flags, *rest, **options))
            return opened

        return wrapped

    def _opening(self, call: Callable[..., Any]) -> Any:
        def wrapped(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if not set(mode) & set("wax+") or not self._concerns(file):
                return call(file, mode, *rest, **options)
            opened = self.at(f"open {_name(file)}", lambda: call(file, mode, *rest, **options))
            return _Written(opened, self, _name(file))

        return wrapped


class _Written:
    """A file opened for writing. Each write is flushed, so that it is on disk after the call."""

    def __init__(self, file: Any, calls: Calls, name: str) -> None:
        self._file, self._calls, self._name = file, calls, name

    def write(self, data: Any) -> Any:
        if isinstance(data, str):
            self._calls.written += len(data.encode())
        else:
            data = memoryview(data).cast("B")
            self._calls.written += len(data)

        def put(part: Any) -> Any:
            written = self._file.write(part)
            self._file.flush()
            return written

        half = data[: len(data) // 2]
        return self._calls.at(f"write {self._name}", lambda: put(data), lambda: put(half))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def truncate(self, size: int | None = None) -> Any:
        return self._calls.at(f"truncate {self._name}", lambda: self._file.truncate(size))

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def load(path: Path) -> tuple[int, list[Moment]]:
    """(bytes written, moments), as written by :meth:`Calls.save`."""
    written, moments = json.loads(path.read_text())
    return written, [Moment(**moment) for moment in moments]


def _name(path: Any) -> str:
    """A file's name; a temporary name without process id and random part."""
    return re.sub(r"\d+-[0-9a-f]{8}", "*", os.path.basename(os.fspath(path)))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
