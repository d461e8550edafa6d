"""Results of numbered batches, kept on disk as they are computed, so that a killed run can resume.

One file per process, one line per batch, appended. The first line holds the settings that the results depend
on, so results of other settings are never mixed in. Each line starts with a SHA-256 over the rest of it and
over the settings, so damage is detected. An incomplete last line is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_model.errors import EfficientDetError, OutputError
from pytorch_model.files import check_regular


class ShardError(EfficientDetError):
    """Kept results belong to other settings, or are damaged."""


class Shards:
    """The kept batches of one network: files ``NAME-PROCESS.jsonl`` in ``folder``.

    ``settings``: all that the results depend on, in JSON's types. Reading returns the batches of every
    process, also those of an earlier run with another number of processes.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.name = name
        self.settings = json.loads(json.dumps(settings))
        self._seal = json.dumps(self.settings).encode()  # goes into the checksum of every batch

    def files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}-*.jsonl"))

    def read(self) -> dict[int, Any]:
        """Batch number → its content. Raises :class:`ShardError` for other settings and for damage."""
        kept: dict[int, Any] = {}
        for file in self.files():
            try:
                lines = _whole_lines(file)
            except OSError as error:
                raise ShardError(f"cannot read {file}: {error.strerror}; choose another --out") from None
            if not lines:
                continue
            try:
                found = dict(_unsealed(lines[0], b"")["settings"])
                if found == self.settings:
                    entries = [_unsealed(line, self._seal) for line in lines[1:]]
                    kept.update((entry["batch"], entry["content"]) for entry in entries)
            except (KeyError, TypeError, ValueError, RecursionError):
                raise damaged(file) from None
            if found != self.settings:
                raise ShardError(
                    f"{self.folder.parent} holds an evaluation with other settings ("
                    f"{_changes(found, self.settings)}); choose another --out, or --restart to overwrite it"
                )
        return kept

    def clear(self) -> None:
        """Remove every kept batch. Raises :class:`OutputError` if the disk refuses."""
        try:
            for file in self.files():
                file.unlink()
        except OSError as error:
            raise OutputError(
                f"cannot remove {error.filename}: {error.strerror}; remove it, or choose another --out"
            ) from None

    def append(self, process: int, batch: int, content: Any) -> None:
        """Keep one batch; it survives a killed process. Raises :class:`OutputError` if the disk refuses."""
        file = self.folder / f"{self.name}-{process}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(file, "ab", buffering=0) as stream:
                stream.truncate(_whole_size(file))
                lines = [_sealed({"batch": batch, "content": content}, self._seal)]
                if stream.seek(0, os.SEEK_END) == 0:
                    lines.insert(0, _sealed({"settings": self.settings}, b""))
                stream.write(b"".join(lines))
        except OSError as error:
            raise OutputError(
                f"cannot write {file}: {error.strerror or error}; free some space, then start again to resume"
            ) from None


_START, _MIDDLE = b'{"sha256": "', b'", '


def _sealed(entry: Mapping[str, Any], seal: bytes) -> bytes:
    """A line: JSON whose first member is the SHA-256 of ``seal`` and of everything after that member."""
    rest = json.dumps(entry).encode()[1:]
    return _START + hashlib.sha256(seal + rest).hexdigest().encode() + _MIDDLE + rest + b"\n"


def _unsealed(line: bytes, seal: bytes) -> Any:
    """The entry of a line (without its newline). Raises ValueError unless :func:`_sealed` wrote it."""
    start = len(_START) + 64 + len(_MIDDLE)
    rest = line[start:]
    digest = hashlib.sha256(seal + rest).hexdigest().encode()
    if line[:start] != _START + digest + _MIDDLE:
        raise ValueError("the checksum differs")
    return json.loads(b"{" + rest)


def damaged(place: Path) -> ShardError:
    """The error for kept results at ``place`` that are damaged."""
    return ShardError(
        f"{place} is damaged, or an older version of this tool wrote it; --restart removes it and "
        "starts from the beginning"
    )


def _whole_lines(file: Path) -> list[bytes]:
    """The complete lines, without their newlines; text after the last newline is an incomplete line."""
    check_regular(file)
    return file.read_bytes().split(b"\n")[:-1]


def _whole_size(file: Path) -> int:
    """Bytes up to the end of the last complete line, searched from the end."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        end = size
        while end:
            start = max(0, end - 65536)
            stream.seek(start)
            newline = stream.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


#: Settings that are digests → what it means that they differ. A digest itself says nothing to a reader.
_DIGESTS = {
    "weights": "other values",
    "config": "another configuration of the model",
    "pictures": "other images, by their list, names or content",
}
_MOST_CHANGES = 3  # named of one setting


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words; of settings within a setting, each that differs."""
    texts = []
    for key in {**before, **now}:
        old, new = before.get(key), now.get(key)
        if old == new:
            continue
        if key in _DIGESTS:
            texts.append(f"{key}: {_DIGESTS[key]}")
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            inner = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            texts += [
                _change(f"{key}.{name}", old.get(name), new.get(name)) for name in inner[:_MOST_CHANGES]
            ]
            if len(inner) > _MOST_CHANGES:
                texts.append(f"and {len(inner) - _MOST_CHANGES} more of {key}")
        else:
            texts.append(_change(key, old, new))
    return ", ".join(texts)


def _change(name: str, before: Any, now: Any) -> str:
    return f"{name}: {_shortened(before)} there, {_shortened(now)} now"


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:12]}…"
