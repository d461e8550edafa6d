"""EfficientDet in TFLite form, float or quantised, as AutoML's variables.

Sources: AutoML ``tf2/efficientdet_keras.py`` (names, shared kernels of the heads), ``tf2/postprocess.py``
(order of predictions, inputs of the postprocessing operator).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from porting import scopes
from porting.checkpoint.base import Checkpoint
from porting.checkpoint.graph.anchors import anchor_settings
from porting.checkpoint.messages import unreadable
from porting.checkpoint.tflite.around.labels import read_class_names
from porting.checkpoint.tflite.flatbuffer import flexbuffer_map
from porting.checkpoint.tflite.flow import Mismatch
from porting.checkpoint.tflite.graph import IDENTIFIER, Graph, Operator, Tensor, read_graph
from porting.checkpoint.tflite.match import match
from porting.checkpoint.tflite.structure import BlockMatch, Convolution, Head, Separable, Structure
from porting.checkpoint.tflite.weights import Layer, Variable, check_layers, fusion_weights, variables
from porting.errors import CheckpointError
from pytorch_model.config import EfficientDetConfig
from pytorch_model.files import read_bounded
from pytorch_model.formats.wire import Malformed

SUFFIX = ".tflite"

_MOST_BYTES = (1 << 31) - 1  # a FlatBuffer's offsets are signed 32-bit numbers

# Rounding errors of the anchors in the file, relative, in float32 and in float16
_ANCHOR_TOLERANCE = {False: 1e-5, True: 1e-3}

_FOLDED = (
    "batch norms are folded into the convolutions: evaluation computes the same function, but gamma and the "
    "moving statistics are placeholders, so freeze the batch norms before training or calibrate them"
)
_UNUSED = (
    "the file holds {} bytes of constants that no operator reads, which converters do not leave: it may be "
    "damaged, so compare it with the original"
)
_INT8 = (
    "weights are dequantised from int8 and keep its rounding errors; activations are not quantised, so "
    "detections differ slightly from the file's"
)
_FLOAT16 = "weights are widened from float16 and keep its rounding errors"


class TFLiteCheckpoint(Checkpoint):
    """A TFLite file, which is read and checked as a whole: ``TFLiteCheckpoint("efficientdet_lite0.tflite")``.

    ``settings``: image size, activation, … and, if the file has them, anchors and input normalisation.
    ``pixels``: the normalisation in the graph, None if it takes a normalised image.
    ``layers``: every convolution with its names. ``outputs``: ``class_outputs/3``, … → the number of its
    tensor.

    Raises :class:`CheckpointError`: not TFLite, damaged, or a different network. TFLite has no checksums:
    damage to a weight stays unnoticed if structure, scales and shared kernels still agree. If a damaged
    operator reads the constant of another one, its own constant is unused, and ``notes`` say so.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        data = _read_file(path)
        try:
            graph = read_graph(data)
            structure = match(graph)
            self.layers = tuple(_layers(structure))
            check_layers(self.layers, graph, len(data))
            listed = (*variables(self.layers), *_fusion_variables(structure))
            found = {variable.name: variable for variable in listed}
            settings = _settings(structure, graph)
        except Mismatch as error:
            raise CheckpointError(
                f"{path} is a TFLite model but not an EfficientDet: {error}; give a file that AutoML or "
                "TFLite Model Maker exported, not one compiled for an accelerator"
            ) from None
        except Malformed as error:
            raise CheckpointError(f"{path} is damaged: {error}; fetch the file again") from None
        stored_as, notes = _stored_as(self.layers)
        names, about_names = read_class_names(data, structure.config.num_classes)
        if names is not None:
            settings["class_names"] = names
        if about_names is not None:
            notes.append(about_names)
        if graph.unused:
            notes.append(_UNUSED.format(graph.unused))
        super().__init__(
            source=str(path),
            format=f"TFLite, {stored_as}",
            shapes={name: variable.shape for name, variable in found.items()},
            dtypes=dict.fromkeys(found, np.dtype(np.float32)),
            notes=[*notes, _FOLDED],
            settings=settings,
        )
        self.made_up_statistics = True
        self.pixels = structure.pixels
        self.outputs: Mapping[str, int] = MappingProxyType(dict(_outputs(structure)))
        self._variables: dict[str, Variable] | None = found

    def _read(self, name: str) -> np.ndarray:
        if self._variables is None:
            raise CheckpointError(f"{self.source} is closed; open it again to read {name!r}")
        variable = self._variables[name]
        with np.errstate(over="ignore"):  # conversion reports values that are not finite
            return np.array(np.broadcast_to(variable.read(), variable.shape), np.float32, order="C")

    def close(self) -> None:
        self._variables, self.layers = None, ()


def is_tflite(head: bytes, path: Path) -> bool:
    """Whether ``path`` ends in ``.tflite`` and is not a folder, or its first bytes ``head`` are TFLite's."""
    return head[4:8] == IDENTIFIER or (path.suffix == SUFFIX and not os.path.isdir(path))


def open_tflite(path: str | os.PathLike[str], step: int | None = None) -> TFLiteCheckpoint:
    """Open a TFLite file, which has no ``step``. Raises :class:`CheckpointError`."""
    if step is not None:
        raise CheckpointError(f"{path} is a TFLite file, which has no steps; leave out the step")
    return TFLiteCheckpoint(path)


def _read_file(path: Path) -> bytes:
    try:
        data = read_bounded(path, _MOST_BYTES)
    except OSError as error:
        raise unreadable(path, error) from None
    if data[4:8] != IDENTIFIER:
        raise CheckpointError(
            f"{path} is not a TFLite file: bytes 4 to 7 are not {IDENTIFIER.decode()}; download it again"
        )
    return data


# --- names -----------------------------------------------------------------------------------------------


def _layers(structure: Structure) -> Iterator[Layer]:
    """Every convolution with AutoML's names, in execution order; those of the heads level by level."""
    config = structure.config
    scope = config.backbone.name
    stem = f"{scope}/stem"
    yield Layer(structure.stem, f"{stem}/conv2d/kernel", None, f"{stem}/tpu_batch_normalization")
    for i, block in enumerate(structure.blocks):
        yield from _block_layers(block, f"{scope}/blocks_{i}")
    if structure.extra_level is not None:
        yield _resample_layer(structure.extra_level, scopes.extra_level(config.extra_levels[0]))
    for c, cell in enumerate(structure.cells):
        for n, (node, found) in enumerate(zip(config.bifpn_nodes, cell, strict=True)):
            scope = scopes.bifpn_node(c, n)
            factors = fusion_weights(found)[1] if found.is_weighted else {}
            for i, conv in found.resample.items():
                yield _resample_layer(conv, f"{scope}/{scopes.resampled_input(node, i)}", factors.get(i, 1.0))
            after = f"{scope}/{scopes.after_combine(node)}"
            yield from _separable_layers(found.conv, f"{after}/conv", f"{after}/bn")
    yield from _head_layers(structure.class_net, "class_net", config)
    yield from _head_layers(structure.box_net, "box_net", config)


def _block_layers(block: BlockMatch, scope: str) -> Iterator[Layer]:
    bns = iter(f"{scope}/{scopes.numbered('tpu_batch_normalization', i)}" for i in range(3))
    convs = iter(f"{scope}/{scopes.numbered('conv2d', i)}" for i in range(2))
    if block.expand is not None:
        yield Layer(block.expand, f"{next(convs)}/kernel", None, next(bns))
    yield Layer(block.depthwise, f"{scope}/depthwise_conv2d/depthwise_kernel", None, next(bns))
    if block.se is not None:
        for i, conv in enumerate(block.se):
            name = f"{scope}/se/{scopes.numbered('conv2d', i)}"
            yield Layer(conv, f"{name}/kernel", f"{name}/bias", None)
    yield Layer(block.project, f"{next(convs)}/kernel", None, next(bns))


def _resample_layer(conv: Convolution, scope: str, factor: float = 1.0) -> Layer:
    return Layer(conv, f"{scope}/conv2d/kernel", f"{scope}/conv2d/bias", f"{scope}/bn", factor)


def _fusion_variables(structure: Structure) -> Iterator[Variable]:
    """The weights of every node that weights its inputs."""
    per_channel = structure.config.fpn_weight_method.startswith("channel")
    shape = (structure.config.fpn_num_filters,) if per_channel else ()
    for c, cell in enumerate(structure.cells):
        for n, node in enumerate(cell):
            for i, weight in enumerate(fusion_weights(node)[0] if node.is_weighted else ()):
                name = f"{scopes.bifpn_node(c, n)}/{scopes.numbered('WSM', i)}"
                value = weight if per_channel else weight.reshape(())
                yield Variable(name, shape, partial(np.asarray, value))


def _separable_layers(conv: Separable, scope: str, bn: str | None) -> Iterator[Layer]:
    yield Layer(conv.depthwise, f"{scope}/depthwise_kernel", None, None)
    yield Layer(conv.pointwise, f"{scope}/pointwise_kernel", f"{scope}/bias", bn)


def _head_layers(head: Head, name: str, config: EfficientDetConfig) -> Iterator[Layer]:
    for level, chain in zip(config.levels, head.levels, strict=True):
        for i, conv in enumerate(chain[:-1]):
            norm = scopes.head_norm(name, i, level)
            yield from _separable_layers(conv, scopes.head_layer(name, i), norm)
        yield from _separable_layers(chain[-1], scopes.head_predictor(name), None)


def _outputs(structure: Structure) -> Iterator[tuple[str, int]]:
    for kind, head in (("class", structure.class_net), ("box", structure.box_net)):
        for level, chain in zip(structure.config.levels, head.levels, strict=True):
            yield f"{kind}_outputs/{level}", chain[-1].output


# --- settings in the file --------------------------------------------------------------------------------


def _stored_as(layers: Sequence[Layer]) -> tuple[str, list[str]]:
    """How the weights are stored, in one word, and the notes for the user about it."""
    dtypes = {layer.convolution.kernel.dtype for layer in layers}
    if np.dtype(np.int8) in dtypes:
        return "int8", [_INT8]
    if np.dtype(np.float16) in dtypes:
        return "float16", [_FLOAT16]
    return "float32", []


def _settings(structure: Structure, graph: Graph) -> dict[str, Any]:
    config = structure.config
    matched = ["image_size", "act_type", "survival_prob", "conv_after_downsample"]
    if config.fpn_weight_method != "sum":
        matched.append("fpn_weight_method")
    found: dict[str, Any] = {name: getattr(config, name) for name in matched}
    image = graph.tensors[graph.inputs[0]]
    if structure.pixels is not None:
        found.update(structure.pixels._asdict())
    elif image.is_quantized:
        found.update(_normalisation(image))
    if structure.postprocess is not None:
        _check_options(structure.postprocess, config.num_classes)
    if structure.anchors is not None:
        tolerance = _ANCHOR_TOLERANCE[structure.stem.kernel.dtype == np.float16]
        anchors = anchor_settings(structure.anchors, config, tolerance)
        if anchors is None:
            raise Mismatch("its anchors are not arranged like AutoML's")
        found.update(anchors)
    return found


def _normalisation(image: Tensor) -> dict[str, tuple[float, float, float]]:
    """Mean and stddev from the quantisation of an 8-bit image: real = scale · (pixel − zero point)."""
    black = 0 if image.dtype == np.uint8 else -128  # how grey level 0 is stored
    if image.dtype not in (np.uint8, np.int8) or len(image.scale) != 1:
        raise Mismatch("its input is neither float nor an 8-bit image")
    mean = float(image.zero_point[0]) - black
    stddev = round(1 / float(image.scale[0]), 4)  # the scale is a float32 near 1/128
    return {"mean_rgb": (mean,) * 3, "stddev_rgb": (stddev,) * 3}


def _check_options(operator: Operator, num_classes: int) -> None:
    """Check that the postprocessing operator decodes boxes in AutoML's units and has no background class."""
    options = flexbuffer_map(operator.custom_options.tobytes())
    if any(options.get(f"{side}_scale") != 1 for side in "yxhw"):
        raise Mismatch(f"{operator} scales boxes, which AutoML does not")
    if options.get("num_classes") != num_classes:
        raise Mismatch(f"{operator} is not for the {num_classes} classes of the class net")
