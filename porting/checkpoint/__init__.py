"""Open any source of AutoML EfficientDet weights as one thing: a mapping from variable name to array."""

from __future__ import annotations

import os

from porting.checkpoint.base import Checkpoint
from porting.errors import CheckpointError
from pytorch_model.files import is_special

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: str | os.PathLike[str], step: int | None = None) -> Checkpoint:
    """Open the checkpoint at ``path`` without reading its variables' values.

    ``path``: a checkpoint folder, a prefix (``…/model``, ``…/model.ckpt-1000``), or one of a checkpoint's
    files; a SavedModel folder; a frozen graph (``.pb``); Keras weights (``.h5``); an EfficientDet-Lite
    ``.tflite`` file; or a ``.tar.gz``, ``.tar`` or ``.zip`` of one. ``step`` picks one of several in a
    folder; by default the one its state file names, or the newest.

    Raises :class:`~porting.errors.CheckpointError`: nothing there, several and no way to choose, damaged,
    incomplete, or not a checkpoint.
    """
    from porting.checkpoint.archive import is_archive, open_archive
    from porting.checkpoint.frozen_graph import is_frozen_graph, open_frozen_graph
    from porting.checkpoint.keras_h5 import is_h5, open_h5
    from porting.checkpoint.saved_model import saved_model_prefix, understood
    from porting.checkpoint.tflite.checkpoint import is_tflite, open_tflite
    from porting.checkpoint.v2.bundle import TensorBundle, read_index
    from porting.checkpoint.v2.locate import locate

    if is_special(path):
        raise CheckpointError(f"{path} is a pipe or a device, not a file; copy what it gives into a file")
    if is_archive(path):
        return open_archive(path, step)
    if is_tflite(path):
        return open_tflite(path, step)
    if is_h5(path):
        return open_h5(path, step)
    if is_frozen_graph(path):
        return open_frozen_graph(path, step)
    return understood(TensorBundle(read_index(locate(saved_model_prefix(path) or path, step))))
