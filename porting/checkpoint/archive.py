"""Checkpoints inside ``.tar.gz``, ``.tgz``, ``.tar`` and ``.zip`` files, as AutoML releases them.

The files that a reader may need are unpacked into a private temporary folder and opened there like any other
checkpoint. Closing the checkpoint removes the folder.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path, PurePosixPath

import numpy as np

from porting.checkpoint.base import Checkpoint, read_head
from porting.checkpoint.unpack import kind_of, no_room, unpack
from porting.checkpoint.v2.locate import locate
from porting.errors import CheckpointError, EfficientDetError

SUFFIXES = (".tar.gz", ".tgz", ".tar", ".zip")

_SAVED_MODEL = "saved_model.pb"
#: The folder in the temporary folder. Readers also look in the folder above a checkpoint, so we own that too.
_UNPACKED = "unpacked"

#: Opens the checkpoint at a path; the second argument is the step, or None.
Opener = Callable[[Path, int | None], Checkpoint]


def is_archive(head: bytes, path: Path) -> bool:
    """Whether the file at ``path`` has an archive's name, or ``head``, its first bytes, are an archive's."""
    named = path.name.lower().endswith(SUFFIXES) and os.path.isfile(path)
    return named or kind_of(head) is not None


def open_archive(path: Path, step: int | None, open_inside: Opener) -> Checkpoint:
    """Open the one checkpoint inside the archive at ``path``. ``open_inside`` opens the unpacked files.

    If there are several kinds of weights, the most complete is used: a V2 checkpoint, then ``.h5``,
    SavedModel, frozen graph (``.pb``), ``.tflite``. Raises :class:`~porting.errors.CheckpointError`: the
    archive is damaged, hostile or too large, holds no weights, or holds two checkpoints of one kind.
    """
    try:
        private = Path(tempfile.mkdtemp(prefix="efficientdet-"))
    except OSError as error:
        no_room(path, error)
    folder = private / _UNPACKED
    try:
        found = unpack(path, folder)
        with _translated(path, folder):
            return _ArchivedCheckpoint(_open_one(path, folder, found, step, open_inside), path, folder)
    except BaseException:
        shutil.rmtree(private, ignore_errors=True)
        raise


class _ArchivedCheckpoint(Checkpoint):
    """A checkpoint in the unpacked ``folder``. Its texts name the archive instead of the folder.

    It owns the folder above ``folder`` and removes it when it is closed.
    """

    def __init__(self, inner: Checkpoint, archive: Path, folder: Path) -> None:
        source, *notes = (_spoken(text, archive, folder) for text in (inner.source, *inner.notes))
        super().__init__(source, inner.format, inner.shapes, inner.dtypes, notes, inner.settings)
        self.stated_by = {
            field: _spoken(witness, archive, folder) for field, witness in inner.stated_by.items()
        }
        self.location = inner.location
        self.made_up_statistics = inner.made_up_statistics
        self._inner, self._archive, self._folder = inner, archive, folder
        self._remove = weakref.finalize(self, _close_and_remove, inner, folder.parent)

    def close(self) -> None:
        self._remove()

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        with _translated(self._archive, self._folder):
            yield from self._inner.read_many(names)

    @cached_property
    def step(self) -> int | None:
        with _translated(self._archive, self._folder):
            return self._inner.step

    def _read(self, name: str) -> np.ndarray:
        with _translated(self._archive, self._folder):
            return self._inner[name]


def _close_and_remove(inner: Checkpoint, folder: Path) -> None:
    inner.close()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _translated(archive: Path, folder: Path) -> Iterator[None]:
    """Replace the temporary folder by the archive in the messages of errors raised inside."""
    try:
        yield
    except EfficientDetError as error:
        raise type(error)(_spoken(str(error), archive, folder)) from None


def _spoken(text: str, archive: Path, folder: Path) -> str:
    return text.replace(f"{folder}{os.sep}", f"{archive}:").replace(str(folder), str(archive))


# Choosing


def _open_one(
    archive: Path, folder: Path, found: list[PurePosixPath], step: int | None, open_inside: Opener
) -> Checkpoint:
    saved_models = {path.parent for path in found if path.name == _SAVED_MODEL}
    folders = {path.parent for path in found if path.suffix == ".index"}
    folders -= {parent / "variables" for parent in saved_models}
    h5 = {path for path in found if path.suffix in (".h5", ".hdf5")}
    frozen = {path for path in found if path.suffix == ".pb" and path.parent not in saved_models}
    tflite = {path for path in found if path.suffix == ".tflite"}
    choices = next(filter(None, (folders, h5, saved_models, frozen, tflite)), set())
    if not choices:
        raise CheckpointError(
            f"{archive} holds no weights: no TensorFlow checkpoint, .h5, SavedModel, frozen graph or .tflite "
            "is in it; is it the right file?"
        )
    if len(choices) > 1:
        listing = ", ".join(str(choice) for choice in sorted(choices))
        raise CheckpointError(
            f"{archive} holds several checkpoints: {listing}; unpack it and name the one you mean"
        )
    (only,) = choices
    chosen = folder / only
    if not folders:
        _reject_nesting(chosen)
        return open_inside(chosen, step)
    index = locate(chosen, step)
    _reject_nesting(index)
    if not index.resolve().is_relative_to(folder.resolve()):
        # A state file may hold any path, and locate() follows those.
        raise CheckpointError(
            f"the checkpoint state file in {archive} names {index.with_suffix('')}, which is not in the "
            "archive; unpack it and name the prefix you mean"
        )
    return open_inside(index, None)


def _reject_nesting(path: Path) -> None:
    # An archive can contain itself, without end.
    if is_archive(read_head(path), path):
        raise CheckpointError(f"{path} is an archive in an archive; unpack the outer one first")
