"""Keras HDF5 weights, as ``save_weights`` writes them for AutoML's Keras model.

Keras loads such a file by position: the layers in ``layer_names``, and the ``weight_names`` of each layer,
must be in the order in which its model tracks them. In each layer, all trainable variables come first, then
the batch norms' statistics. The backbone's stem comes after its blocks, a node's fusion weights before its
convolutions, and a head's convolutions before its batch norms.

Source: Keras 2 ``saving/legacy/hdf5_format.py``; AutoML ``tf2/efficientdet_keras.py``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from porting.checkpoint import open_checkpoint
from porting.errors import OutputError
from porting.export import Weights, Written
from porting.export.check import check_comes_back, rounding
from porting.reverse import reverse
from pytorch_model.config import EfficientDetConfig
from pytorch_model.files import check_writable, replacing
from tf_reference.variables import Variable, variables

KERAS_VERSION = b"2.15.0"  # the version with this layout
#: Keras splits an attribute with more bytes than this, after all strings are padded to the longest.
ATTRIBUTE_LIMIT = 64512

_NODE = re.compile(r"fpn_cells/cell_(\d+)/fnode(\d+)/(WSM)?")


def write(weights: Weights, out: Path) -> Written:
    """Write ``out``, a file whose name ends in ``.h5``. Needs h5py."""
    if out.suffix != ".h5":
        raise OutputError(f"cannot write {out}: use a name that ends in .h5")
    try:
        import h5py
    except ImportError:
        raise OutputError(
            f"cannot write {out}: HDF5 needs h5py: pip install 'efficientdet-porting[h5]'"
        ) from None
    check_writable(out)
    values = reverse(weights.state_dict, weights.config)
    with replacing(out) as temporary:
        buffer = io.BytesIO()  # HDF5's own writer hides errors of the disk
        with h5py.File(buffer, "w") as file:
            _fill(file, values, weights.config)
        temporary.write_bytes(buffer.getbuffer())
        with open_checkpoint(temporary) as checkpoint:
            check_comes_back(checkpoint, weights, ("raw",))
    return Written(
        (out,),
        (
            f"{len(values)} variables in Keras's order",
            "read back and converted again: every tensor is equal to the given one",
            *rounding(weights),
        ),
    )


def keras_layers(config: EfficientDetConfig) -> Iterator[tuple[str, list[str]]]:
    """Each layer of AutoML's Keras model with the names of its variables. Both are in Keras's order."""
    catalogue = list(variables(config))
    resamples = [f"resample_p{level}" for level in config.extra_levels]
    for layer in (config.backbone.name, *resamples, "fpn_cells", "class_net", "box_net"):
        own = sorted((v for v in catalogue if v.name.startswith(f"{layer}/")), key=_tracked)
        yield layer, [v.name for v in own if v.trainable] + [v.name for v in own if not v.trainable]


def _tracked(variable: Variable) -> tuple[int, ...]:
    """The sort key within a layer: Keras's order of tracking; ties keep the catalogue's order."""
    name = variable.name
    node = _NODE.match(name)
    if node:
        return int(node[1]), int(node[2]), 0 if node[3] else 1
    if name.startswith(("class_net/", "box_net/")):
        return (2,) if "-predict/" in name else (1,) if "-bn-" in name else (0,)
    return (1,) if "/stem/" in name else (0,)


def _fill(file: Any, values: dict[str, np.ndarray], config: EfficientDetConfig) -> None:
    layers = dict(keras_layers(config))
    _write_names(file, "layer_names", list(layers))
    file.attrs["backend"] = b"tensorflow"
    file.attrs["keras_version"] = KERAS_VERSION
    for layer, names in layers.items():
        group = file.create_group(layer)
        _write_names(group, "weight_names", [f"{name}:0" for name in names])
        for name in names:
            group.create_dataset(f"{name}:0", data=values[name])
    _write_names(file.create_group("top_level_model_weights"), "weight_names", [])


def _write_names(group: Any, attribute: str, names: Sequence[str]) -> None:
    """Write an attribute of strings. As Keras does, split it if HDF5 might not accept it as a whole."""
    encoded = [name.encode() for name in names]
    pieces = [np.asarray(encoded)]
    while any(piece.nbytes > ATTRIBUTE_LIMIT for piece in pieces):
        pieces = np.array_split(np.asarray(encoded), len(pieces) + 1)
    if len(pieces) == 1:
        group.attrs[attribute] = encoded
        return
    for i, piece in enumerate(pieces):
        group.attrs[f"{attribute}{i}"] = piece
