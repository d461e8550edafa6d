"""Choose the reference: our reading of AutoML's network, or a file that holds the network.

``ops`` is :mod:`tf_reference`. The others run a file: ``meta`` the graph saved with a checkpoint,
``savedmodel`` an exported model or a frozen graph, ``tflite`` a TFLite file. A file computes in float32 or
coarser, usually takes images of one size, and may not show every activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from porting.checkpoint import Checkpoint, open_checkpoint
from porting.checkpoint.base import read_head
from porting.checkpoint.frozen_graph import is_frozen_graph
from porting.checkpoint.tflite.checkpoint import is_tflite
from porting.convert import Conversion, convert
from porting.errors import EfficientDetError
from porting.parity.lockstep import Reference
from porting.parity.reference import META, OPS, SAVED_MODEL
from porting.parity.reference.graph import meta_beside, open_frozen, open_meta, open_saved_model
from porting.parity.reference.tflite import TFLiteReference
from pytorch_model.config import EfficientDetConfig


class FileReference(Protocol):
    """A network in a file.

    ``source``: the file. ``size``: the (height, width) of its images, None for any. ``exact``: it computes in
    float32 throughout, so that the float32 tolerances apply. ``taps``: those that it shows, known after
    :meth:`on`.
    """

    @property
    def source(self) -> str: ...
    @property
    def size(self) -> tuple[int, int] | None: ...
    @property
    def exact(self) -> bool: ...
    @property
    def taps(self) -> frozenset[str]: ...

    def on(self, images: np.ndarray) -> Reference:
        """The reference on ``images``: float32 [N, H, W, 3], normalised. Raises EfficientDetError."""


def choose_reference(
    kind: str, graph: Path | None, checkpoint: Checkpoint, conversion: Conversion
) -> FileReference | None:
    """The file that ``--reference`` and ``--graph`` name; None for ``ops``.

    Raises :class:`EfficientDetError`, also if TensorFlow is not installed.
    """
    require_tensorflow()
    if kind != OPS:
        return open_reference(kind, checkpoint, graph, conversion.config, conversion.variables)
    if graph:
        raise EfficientDetError("--graph is for --reference meta, savedmodel or tflite; say which it is")
    return None


def require_tensorflow() -> None:
    """Raises :class:`EfficientDetError` if TensorFlow is not installed."""
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        raise EfficientDetError(
            "the reference needs TensorFlow, which is not installed: pip install -e '.[tensorflow]'"
        ) from None


def open_reference(
    kind: str,
    checkpoint: Checkpoint,
    graph: Path | None,
    config: EfficientDetConfig,
    variables: Mapping[str, np.ndarray],
) -> FileReference:
    """The reference of ``kind`` (any of ``KINDS`` except ``ops``), from ``graph`` or the checkpoint's own.

    ``checkpoint`` is open. ``variables``: its values, moving averages or raw. A ``meta`` graph computes with
    them; the other kinds have their own. Imports TensorFlow. Raises :class:`EfficientDetError` if there is no
    such file or it is not ``config``'s network.
    """
    if kind == META:
        path = graph or meta_beside(checkpoint.location)
        return open_meta(path, config, variables)
    if kind == SAVED_MODEL:
        frozen = graph or Path(checkpoint.location)
        if is_frozen_graph(b"", frozen):
            return open_frozen(frozen, config)
        folder = graph or _saved_model_of(checkpoint)
        if graph is not None:
            if not graph.is_dir():
                raise EfficientDetError(
                    f"{graph} is neither the folder of a SavedModel nor a frozen graph (.pb); point --graph "
                    "at one of them"
                )
            with open_checkpoint(graph) as served:
                variables = convert(served, config).variables
        return open_saved_model(folder, config, variables)
    path = graph or Path(checkpoint.location)
    if not is_tflite(read_head(path), path):
        raise EfficientDetError(f"{path} is not a TFLite file; give the one to compare with by --graph")
    return TFLiteReference(path, config)


def _saved_model_of(checkpoint: Checkpoint) -> Path:
    folder = Path(checkpoint.location).parent.parent  # …/variables/variables
    if not (folder / "saved_model.pb").is_file():
        raise EfficientDetError(
            f"{checkpoint.source} is not a SavedModel ({checkpoint.format}); give the folder of one with "
            "--graph"
        )
    return folder
