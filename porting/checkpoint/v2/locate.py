"""From the path that a user gives (a folder, a prefix, one of the files) to one V2 checkpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath

from porting.errors import CheckpointError
from pytorch_model.files import check_regular

STATE_FILE = "checkpoint"

_FILE_SUFFIX = re.compile(r"\.(index|meta|data-\d{5,}-of-\d{5,})$")
_STATE_LINE = re.compile(
    rb"""^[ \t]*model_checkpoint_path\s*:\s*(?:"((?:[^"\\\n]|\\.)*)"|'((?:[^'\\\n]|\\.)*)')""", re.M
)
_ESCAPE = re.compile(rb"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|(.))")
_ESCAPED = dict(zip(b"abfnrtv?\"'\\", b"\a\b\f\n\r\t\v?\"'\\", strict=True))
_STATE_LIMIT = 1 << 20  # bytes; the newest path is in the first line, older ones follow
_MOST_LISTED = 10


def locate(path: str | os.PathLike[str], step: int | None) -> Path:
    """The ``.index`` file of the checkpoint that ``path`` means.

    ``path`` is one of:

    - a folder. Its state file ``checkpoint`` decides; without it, or with ``step``, the index files in the
      folder do. If it has neither, the folder ``checkpoint`` inside it is used.
    - a prefix, with or without its step number;
    - the ``.index``, ``.data-…`` or ``.meta`` file of a checkpoint.

    ``step``: take the checkpoint ``…-STEP``. Raises CheckpointError if this does not lead to exactly one.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _in_folder(path, step)
        if path.name == STATE_FILE and path.is_file() and not _index_of(path).is_file():
            return _in_folder(path.parent, step)
        return _from_prefix(path, step)
    except OSError as error:
        place = error.filename or path
        raise CheckpointError(f"{place} cannot be read: {error.strerror or error}; check the path") from None


def _in_folder(folder: Path, step: int | None) -> Path:
    prefixes = _prefixes(folder)
    state = folder / STATE_FILE
    if step is None and state.is_file():
        return _named_by_state(folder, state, prefixes)
    if not prefixes and state.is_dir() and _prefixes(state):  # as the Object Detection API packs its models
        return _in_folder(state, step)
    if not prefixes:
        raise CheckpointError(
            f"{folder} holds no TensorFlow V2 checkpoint: no file in it ends in .index; "
            "give the folder or prefix of one"
        )
    return _pick(folder, prefixes, step)


def _from_prefix(path: Path, step: int | None) -> Path:
    prefix = path.with_name(_FILE_SUFFIX.sub("", path.name))
    index = _index_of(prefix)
    if index.is_file():
        if step not in (None, _step_of(prefix.name)):
            raise CheckpointError(f"{prefix} is not step {step}; leave out the step or name another prefix")
        return index
    if prefix == path and not path.exists() and path.parent.is_dir():
        steps = [name for name in _prefixes(path.parent) if _stem_of(name) == path.name]
        if steps:
            return _pick(path.parent, steps, step)
    if prefix != path and path.exists():
        raise CheckpointError(f"{path} exists but its index {index.name} does not; put both in one folder")
    if path.exists():
        raise CheckpointError(
            f"{path} is not a TensorFlow V2 checkpoint: there is no {index.name} beside it; "
            "give the folder or prefix of one"
        )
    missing = f"{path} does not exist" if path == index else f"neither {path} nor {index} exists"
    raise CheckpointError(f"{missing}; check the path")


def _pick(folder: Path, prefixes: list[str], step: int | None) -> Path:
    """The index of the only checkpoint, the one at ``step``, or the newest of those named ``stem-N``."""
    if step is not None:
        chosen = [name for name in prefixes if _step_of(name) == step]
        if not chosen:
            raise CheckpointError(
                f"{folder} holds no step {step}, only {_listing(prefixes)}; name one of them"
            )
        if len(chosen) > 1:
            raise CheckpointError(
                f"{folder} holds step {step} as {_listing(chosen)}; name the prefix you mean"
            )
        return _index_of(folder / chosen[0])
    if len({_stem_of(name) for name in prefixes}) > 1:
        raise CheckpointError(
            f"{folder} holds several checkpoints: {_listing(prefixes)}; "
            "name the prefix you mean, or use --step"
        )
    return _index_of(folder / max(prefixes, key=lambda name: _step_of(name) or 0))


def _named_by_state(folder: Path, state: Path, prefixes: list[str]) -> Path:
    """The index of the checkpoint that the state file calls the latest.

    The paths in a state file may be those of another machine.
    """
    check_regular(state)
    with open(state, "rb") as file:
        match = _STATE_LINE.search(file.read(_STATE_LIMIT))
    if not match:
        raise CheckpointError(
            f"{state} is not a checkpoint state file: it has no model_checkpoint_path; "
            "remove it, or name the prefix you mean"
        )
    named = _unescape(state, match[1] or match[2] or b"")
    # The folder may have been copied: a checkpoint in it has priority over an absolute path.
    basename = PureWindowsPath(PurePosixPath(named).name).name
    candidates = (
        [folder / basename, Path(named)] if os.path.isabs(named) else [folder / named, folder / basename]
    )
    for candidate in candidates:
        if basename and _index_of(candidate).is_file():
            return _index_of(candidate)
    found = f"it holds {_listing(prefixes)}" if prefixes else "no file in it ends in .index"
    raise CheckpointError(
        f"{state} names {named!r}, but there is no {basename}.index in {folder} ({found}); "
        "fetch the missing files or name another prefix"
    )


def _prefixes(folder: Path) -> list[str]:
    with os.scandir(folder) as files:
        names = [file.name for file in files if file.name.endswith(".index") and file.is_file()]
    return sorted(name.removesuffix(".index") for name in names)


def _index_of(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".index")


def _step_of(prefix: str) -> int | None:
    """N of ``stem-N``."""
    match = re.search(r"-([0-9]{1,18})$", prefix)
    return int(match[1]) if match else None


def _stem_of(prefix: str) -> str:
    """``stem`` of ``stem-N``; the prefix itself if it has no step."""
    return re.sub(r"-[0-9]{1,18}$", "", prefix)


def _unescape(state: Path, text: bytes) -> str:
    """The path in a protocol buffer text string, in which characters other than ASCII are octal escapes."""

    def character(match: re.Match[bytes]) -> bytes:
        octal, hexadecimal, other = match.groups()
        value = int(octal, 8) if octal else int(hexadecimal, 16) if hexadecimal else _ESCAPED.get(other[0])
        if not value or value > 0xFF:  # a path cannot hold a zero
            raise CheckpointError(
                f"{state} names a path with {os.fsdecode(match[0])!r}, which is not a character of a path; "
                "correct the file, or name the prefix you mean"
            )
        return bytes([value])

    return os.fsdecode(_ESCAPE.sub(character, text))


def _listing(prefixes: Iterable[str]) -> str:
    names = sorted(prefixes, key=lambda name: (_stem_of(name), _step_of(name) or 0))
    more = len(names) - _MOST_LISTED
    return ", ".join(names[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
