"""Find the format of a file or folder, and open it. One :class:`Reader` per format.

To add a format, write a module with two functions, ``is_…(head, path)`` and ``open_…(path, step)``, and add a
line to :data:`READERS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from porting.checkpoint.archive import is_archive, open_archive
from porting.checkpoint.base import Checkpoint, read_head
from porting.checkpoint.beside import add_run_config
from porting.checkpoint.frozen_graph import is_frozen_graph, open_frozen_graph
from porting.checkpoint.keras_h5 import is_h5, open_h5
from porting.checkpoint.messages import unreadable
from porting.checkpoint.objects.graph import is_object_based
from porting.checkpoint.objects.open import open_object_checkpoint
from porting.checkpoint.renamed import without_counts, without_outer_scope
from porting.checkpoint.saved_model import as_served, is_saved_model, saved_model_prefix, with_meta_settings
from porting.checkpoint.tflite.checkpoint import is_tflite, open_tflite
from porting.checkpoint.v2.bundle import TensorBundle
from porting.checkpoint.v2.index import read_index
from porting.checkpoint.v2.locate import ARCHIVE, locate
from porting.errors import CheckpointError
from pytorch_model.files import check_regular, is_special


@dataclass(frozen=True)
class Reader:
    """A format. ``matches``: whether a file is of this format, from its first bytes and its path.

    ``contains``: it opens a checkpoint inside the file with :func:`open_checkpoint`.
    """

    name: str
    matches: Callable[[bytes, Path], bool]
    open: Callable[[Path, int | None], Checkpoint]
    contains: bool = False


def open_checkpoint(path: str | os.PathLike[str], step: int | None = None) -> Checkpoint:
    """Open the checkpoint at ``path`` without reading its variables' values.

    ``path``: a checkpoint folder, a prefix (``…/model``, ``…/model.ckpt-1000``), or one of the files of a
    checkpoint; a SavedModel folder; a frozen graph (``.pb``); Keras weights (``.h5``); an EfficientDet-Lite
    ``.tflite`` file; or a ``.tar.gz``, ``.tar`` or ``.zip`` of one of these. ``step`` selects one of several
    checkpoints in a folder; the default is the one that the state file names, or the newest. The
    ``config.yaml`` that AutoML's training leaves with a checkpoint is read too (:attr:`Checkpoint.settings`).

    Raises :class:`~porting.errors.CheckpointError`: ``path`` does not exist, names several checkpoints, or is
    damaged, incomplete or not a checkpoint.
    """
    if is_special(path):
        raise CheckpointError(f"{path} is a pipe or a device, not a file; copy what it gives into a file")
    path = Path(path)
    try:
        check_regular(path)
    except OSError as error:
        raise unreadable(path, error) from None
    head = read_head(path)
    reader = next(reader for reader in READERS if reader.matches(head, path))
    checkpoint = without_counts(without_outer_scope(reader.open(path, step)))
    if not reader.contains:
        try:
            add_run_config(checkpoint)
        except BaseException:
            checkpoint.close()
            raise
    return checkpoint


def _open_archive(path: Path, step: int | None) -> Checkpoint:
    return open_archive(path, step, open_checkpoint)


def _open_v2(path: Path, step: int | None) -> Checkpoint:
    """A V2 checkpoint, name-based or object-based, also the one inside a SavedModel."""
    index = locate(saved_model_prefix(path) or path, step)
    bundle = TensorBundle(read_index(index))
    if index.parent == path / ARCHIVE:
        where = f"read from {ARCHIVE}/, where AutoML's evaluation keeps the best checkpoint"
        bundle.notes = (*bundle.notes, f"{where}; {path} itself holds none")
    try:
        checkpoint = open_object_checkpoint(bundle) if is_object_based(bundle) else bundle
    except BaseException:
        bundle.close()
        raise
    return as_served(checkpoint) if is_saved_model(bundle.source) else with_meta_settings(checkpoint)


#: The first that matches is used. The last one takes everything: folders, prefixes, and wrong paths, for
#: which it has the error messages.
READERS = (
    Reader("archive", is_archive, _open_archive, contains=True),
    Reader("TFLite file", is_tflite, open_tflite),
    Reader("Keras HDF5 weights", is_h5, open_h5),
    Reader("frozen graph", is_frozen_graph, open_frozen_graph),
    Reader("TensorFlow V2 checkpoint", lambda head, path: True, _open_v2),
)
