"""EfficientDet of the TensorFlow 2 Object Detection API (``ckpt-0``): the same layers in another tree.

What differs from AutoML, and what becomes of it:

- Anchors at a location go by aspect ratio, then by scale; AutoML's go by scale, then by aspect ratio. The
  predicting layers' channels are put in AutoML's order.
- The box coder's scale factors divide the predicted boxes, and a background class may come first. Both are
  in ``pipeline.config``, nowhere in the weights. The scales are divided into the box predictor, the
  background is left out.
- P3, P4 and P5 come from fixed blocks (:data:`ENDPOINTS`), which are the last of their resolution in b0
  alone. With a deeper backbone this is another network than AutoML's, though the variables fit: the
  configuration says which blocks, and those after the last are left out.
- Image size and anchors are those of ``pipeline.config``, not of a variant.

Source: TensorFlow Models: ``research/object_detection``, in it
``models/ssd_efficientnet_bifpn_feature_extractor.py``, ``utils/bifpn_utils.py``,
``models/bidirectional_feature_pyramid_generators.py``, ``predictors/convolutional_keras_box_predictor.py``,
``anchor_generators/`` and ``box_coders/``; ``official/vision/image_classification/efficientnet/``.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from porting.checkpoint.base import Checkpoint
from porting.checkpoint.objects.automl_keras import backbone_named
from porting.checkpoint.objects.graph import ObjectTree, Piece, Variable, assemble
from porting.checkpoint.objects.pipeline_config import NAME as PIPELINE
from porting.checkpoint.objects.pipeline_config import Pipeline, read_pipeline
from porting.errors import CheckpointError
from pytorch_model.config import (
    BN_EPSILON,
    MAX_BACKBONE_LEVEL,
    BackboneConfig,
    Node,
    backbone_config,
    model_config,
)

PARTS = ("_feature_extractor", "_box_predictor")
FORMAT = "TensorFlow Object Detection API checkpoint"

#: Level → (stage, block in the stage) that the API takes it from, whatever the depth of the backbone.
ENDPOINTS = {3: (2, 1), 4: (4, 2), 5: (6, 0)}

_AUTOML_RATIOS = (1.0, 2.0, 0.5)  # AutoML's aspect_ratios, in its order
_BN = frozenset({"beta", "gamma", "moving_mean", "moving_variance"})
_SEPARABLE = frozenset({"bias", "depthwise_kernel", "pointwise_kernel"})
_CONV = frozenset({"bias", "kernel"})
_HEADS = {  # AutoML's scope → its layers' prefix, the API's BNs, convolutions and predicting layer
    "class_net": (
        "class",
        "_base_tower_layers_for_heads/class_predictions_with_background",
        "_head_scope_conv_layers/ClassPredictionTower",
        "_prediction_heads/class_predictions_with_background/_class_predictor_layers",
    ),
    "box_net": (
        "box",
        "_base_tower_layers_for_heads/box_encodings",
        "_head_scope_conv_layers/BoxPredictionTower",
        "_box_prediction_head/_box_encoder_layers",
    ),
}
_LAYERS_PER_REPEAT = 3  # convolution, batch norm, activation


def read(tree: ObjectTree, root: int) -> Checkpoint:
    """The detector at ``root``, an object that has all of :data:`PARTS`, under AutoML's names.

    Needs the model's ``pipeline.config``: in the folder of the checkpoint or SavedModel, as training leaves
    it, or else beside that folder, as the API exports it. Raises CheckpointError without it, and for anything
    that AutoML's network cannot do.
    """
    source = tree.bundle.source
    variables = tree.variables(root)
    layout = read_layout(variables, source)
    endpoints = _endpoints(layout, source)
    pipeline = read_pipeline(_find_pipeline(source))
    _check_pipeline(pipeline, layout, variables)
    pieces = {**layout.pieces, **dict(_predictors(layout, pipeline, variables))}
    notes = [
        "an Object Detection API checkpoint: no real weights of this layout were at hand to run, nor was the "
        "API's way of resizing images compared",
        *_about_pipeline(pipeline),
    ]
    kept = {path: variable for path, variable in variables.items() if path not in layout.unused}
    return assemble(tree, kept, pieces, FORMAT, notes, settings=_settings(pipeline, endpoints))


# --- the tree -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The whole tree explained: every variable is in ``pieces`` (AutoML name → what it is made of) or unused.

    ``detector_blocks``: how many of the backbone's blocks the detector runs; the classifier has the rest.
    """

    backbone: BackboneConfig
    detector_blocks: int
    num_levels: int
    max_level: int
    pieces: Mapping[str, Piece]
    unused: frozenset[str]


def read_layout(variables: Mapping[str, Variable], source: str = "the checkpoint") -> Layout:
    """Explain every variable (path from the detector → variable). Raises CheckpointError where it cannot."""
    reader = _Reader(variables, source)
    backbone = reader.read_backbone()
    reader.read_heads()
    reader.read_bifpn()
    left = variables.keys() - {piece.path for piece in reader.pieces.values()} - reader.unused
    left = {path for path in left if not path.startswith(("optimizer/", "_optimizer/"))}
    if left:
        reader.refuse(f"{min(left)} ({len(left)} in all) is no part of an EfficientDet")
    return Layout(
        backbone,
        reader.detector_blocks,
        reader.num_levels,
        MAX_BACKBONE_LEVEL + reader.extra_levels,
        reader.pieces,
        frozenset(reader.unused),
    )


class _Layer(NamedTuple):
    path: str
    leaves: frozenset[str]


@dataclass
class _Reader:
    variables: Mapping[str, Variable]
    source: str
    pieces: dict[str, Piece] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    detector_blocks: int = 0
    num_levels: int = 0
    extra_levels: int = 0

    def __post_init__(self) -> None:
        leaves = defaultdict(set)
        for path in self.variables:
            layer, _, leaf = path.rpartition("/")
            leaves[layer].add(leaf)
        self.layers = {path: _Layer(path, frozenset(found)) for path, found in leaves.items()}

    def refuse(self, reason: str) -> NoReturn:
        raise CheckpointError(
            f"{self.source} is not an EfficientDet that AutoML's network could take over: {reason}"
        )

    def place(self, layer: str, scope: str, leaves: frozenset[str]) -> None:
        """The variables ``leaves`` of the API's ``layer`` are those of AutoML's ``scope``."""
        found = self.layers[layer].leaves if layer in self.layers else frozenset()
        if found != leaves:
            missing, extra = sorted(leaves - found), sorted(found - leaves)
            reason = "; it was trained with force_use_bias: false" if missing == ["bias"] else ""
            self.refuse(
                f"{layer} has {', '.join(extra) or 'nothing'} beyond what {scope} needs, and lacks "
                f"{', '.join(missing) or 'nothing'}{reason}"
            )
        for leaf in sorted(leaves):
            self.pieces[f"{scope}/{leaf}"] = Piece(f"{layer}/{leaf}")

    def numbers(self, pattern: str) -> list[int]:
        """The different numbers that ``pattern``'s group finds among the layers, in order."""
        regex = re.compile(pattern)
        return sorted({int(found[1]) for path in self.layers if (found := regex.fullmatch(path))})

    # Keras numbers the layers with weights as they follow each other; EfficientNet is a chain of them.

    def read_backbone(self) -> BackboneConfig:
        chain = self._chain()
        self.take(chain, "stem/conv2d", {"kernel"})
        self.take(chain, "stem/tpu_batch_normalization", _BN)
        block = 0
        while chain and not self._is_top(chain):
            in_detector = self._in_detector(chain[0])
            self._block(chain, f"blocks_{block}")
            block += 1
            if in_detector:
                self.detector_blocks = block
        shapes = {name: self.variables[piece.path].shape for name, piece in self.pieces.items()}
        name = backbone_named(shapes)
        if name is None:
            self.refuse(f"its backbone of {block} blocks is not one of EfficientNet-B0…B7")
        behind = tuple(f"blocks_{index}/" for index in range(self.detector_blocks, block))
        self.unused |= {piece.path for inner, piece in self.pieces.items() if inner.startswith(behind)}
        self.pieces = {
            f"{name}/{inner}": piece for inner, piece in self.pieces.items() if not inner.startswith(behind)
        }
        self.unused |= {f"{layer.path}/{leaf}" for layer in chain for leaf in layer.leaves}
        if any(self._in_detector(layer) for layer in chain):
            self.refuse(f"{chain[0].path} belongs to no block")
        return backbone_config(name)

    def _chain(self) -> list[_Layer]:
        pattern = re.compile(
            r"_feature_extractor/(?:_efficientnet|classification_backbone)/layer_with_weights-(\d+)"
        )
        numbered = {
            int(found[1]): layer for path, layer in self.layers.items() if (found := pattern.fullmatch(path))
        }
        if sorted(numbered) != list(range(len(numbered))) or not numbered:
            self.refuse(f"its {len(numbered)} backbone layers are not numbered from 0 without gaps")
        return [numbered[i] for i in range(len(numbered))]

    @staticmethod
    def _in_detector(layer: _Layer) -> bool:
        return layer.path.startswith("_feature_extractor/_efficientnet/")

    @staticmethod
    def _is_top(chain: list[_Layer]) -> bool:
        """Is this the classifier: a convolution and a batch norm that no depthwise convolution follows?"""
        return not any(layer.leaves == {"depthwise_kernel"} for layer in chain[:3])

    def take(self, chain: list[_Layer], scope: str, leaves: frozenset[str] | set[str]) -> None:
        if not chain:
            self.refuse(f"its backbone ends before {scope}")
        self.place(chain.pop(0).path, scope, frozenset(leaves))

    def _block(self, chain: list[_Layer], scope: str) -> None:
        bns = iter(f"{scope}/tpu_batch_normalization{suffix}" for suffix in ("", "_1", "_2"))
        convs = iter((f"{scope}/conv2d", f"{scope}/conv2d_1"))
        if chain[0].leaves == {"kernel"}:
            self.take(chain, next(convs), {"kernel"})
            self.take(chain, next(bns), _BN)
        self.take(chain, f"{scope}/depthwise_conv2d", {"depthwise_kernel"})
        self.take(chain, next(bns), _BN)
        self.take(chain, f"{scope}/se/conv2d", _CONV)
        self.take(chain, f"{scope}/se/conv2d_1", _CONV)
        self.take(chain, next(convs), {"kernel"})
        self.take(chain, next(bns), _BN)

    def read_heads(self) -> None:
        """The box tower tells the number of levels; both heads must have as many, and as many repeats."""
        levels = self.numbers(rf"_box_predictor/{_HEADS['box_net'][1]}/(\d+)/\d+")
        repeats = self.numbers(rf"_box_predictor/{_HEADS['box_net'][2]}/(\d+)")
        if (
            not levels
            or not repeats
            or "_box_predictor/_head_scope_conv_layers/PredictionTower/0" in self.layers
        ):
            self.refuse("its heads are not two towers of convolutions (share_prediction_tower?)")
        self.num_levels = len(levels)
        for scope, (prefix, _, convs, predict) in _HEADS.items():
            for repeat in range(len(repeats)):
                self.place(f"_box_predictor/{convs}/{repeat}", f"{scope}/{prefix}-{repeat}", _SEPARABLE)
            self.place(f"_box_predictor/{predict}/0", f"{scope}/{prefix}-predict", _SEPARABLE)
        self._bn_layers = [(repeat, index) for repeat in range(len(repeats)) for index in levels]

    def read_bifpn(self) -> None:
        stage = "_feature_extractor/_bifpn_stage"
        numbers = self.numbers(rf"{stage}/node_post_combine_block/(\d+)/1")
        per_cell = 2 * (self.num_levels - 1)
        self.extra_levels = numbers[0] if numbers else 0  # nodes before the first cell make these levels
        total = self.extra_levels + len(numbers)
        if (
            numbers != list(range(self.extra_levels, total))
            or not self.extra_levels
            or len(numbers) % per_cell
        ):
            self.refuse(
                f"{len(numbers)} BiFPN nodes after {self.extra_levels} levels above P{MAX_BACKBONE_LEVEL} "
                f"are no whole cells of {per_cell}"
            )
        min_level = MAX_BACKBONE_LEVEL + self.extra_levels - self.num_levels + 1
        for scope, (prefix, bns, _, _) in _HEADS.items():
            for repeat, index in self._bn_layers:
                layer = f"_box_predictor/{bns}/{index}/{_LAYERS_PER_REPEAT * repeat + 1}"
                self.place(layer, f"{scope}/{prefix}-{repeat}-bn-{min_level + index}", _BN)
        nodes = _cell_nodes(self.num_levels)
        for number in range(self.extra_levels):
            self._resample(
                f"{stage}/node_input_blocks/{number}/0/1", f"resample_p{MAX_BACKBONE_LEVEL + 1 + number}"
            )
        for number in numbers:
            cell, index = divmod(number - self.extra_levels, per_cell)
            self._node(stage, number, f"fpn_cells/cell_{cell}/fnode{index}", nodes[index])

    def _node(self, stage: str, number: int, scope: str, node: Node) -> None:
        for i, node_input in enumerate(node.inputs):
            self._resample(
                f"{stage}/node_input_blocks/{number}/{i}/1", f"{scope}/resample_{i}_{node_input}_{node.id}"
            )
        self._fusion(f"{stage}/node_combine_op/{number}/bifpn_combine_weights", scope, len(node.inputs))
        after = f"{stage}/node_post_combine_block/{number}"  # 0 is the activation
        self.place(f"{after}/1", f"{scope}/op_after_combine{node.id}/conv", _SEPARABLE)
        self.place(f"{after}/2", f"{scope}/op_after_combine{node.id}/bn", _BN)

    def _resample(self, layer: str, scope: str) -> None:
        """A 1×1 convolution and its batch norm, where the width changes."""
        if f"{layer}/0" in self.layers or f"{layer}/1" in self.layers:
            self.place(f"{layer}/0", f"{scope}/conv2d", _CONV)
            self.place(f"{layer}/1", f"{scope}/bn", _BN)

    def _fusion(self, path: str, scope: str, inputs: int) -> None:
        """One variable holds the weights of all inputs; AutoML has one each. Plain sums have none."""
        if path not in self.variables:
            return
        if self.variables[path].shape != (inputs, 1):
            self.refuse(f"{path} has shape {list(self.variables[path].shape)}, not [{inputs}, 1]")
        for i in range(inputs):
            self.pieces[f"{scope}/WSM" + (f"_{i}" if i else "")] = Piece(path, partial(_element, index=i))


def _element(array: np.ndarray, index: int) -> np.ndarray:
    return array[index, 0]


def _cell_nodes(num_levels: int) -> tuple[Node, ...]:
    """The nodes of a BiFPN cell, which depend on the number of levels alone."""
    return model_config("efficientdet-d0", min_level=3, max_level=2 + num_levels).bifpn_nodes


# --- what the weights do not say -----------------------------------------------------------------------


def _endpoints(layout: Layout, source: str) -> tuple[int, int, int]:
    """The blocks of P3, P4 and P5. Raises CheckpointError unless the detector ends at the last of them."""
    stages = layout.backbone.stages
    third, fourth, fifth = (sum(s.repeats for s in stages[:stage]) + b for stage, b in ENDPOINTS.values())
    if layout.detector_blocks != fifth + 1:
        raise CheckpointError(
            f"{source} runs {layout.detector_blocks} blocks of {layout.backbone.name}, the Object Detection "
            f"API runs {fifth + 1}; where this one takes its pyramid from cannot be known"
        )
    return third, fourth, fifth


def _settings(pipeline: Pipeline, endpoints: tuple[int, int, int]) -> dict[str, Any]:
    """What the configuration takes from elsewhere than the weights."""
    ratios = pipeline.aspect_ratios
    settings = {
        "endpoints": endpoints,
        "num_scales": pipeline.scales_per_octave,
        "anchor_scale": pipeline.anchor_scale,
        "aspect_ratios": _AUTOML_RATIOS if sorted(ratios) == sorted(_AUTOML_RATIOS) else ratios,
    }
    return settings | ({"image_size": pipeline.image_size} if pipeline.image_size else {})


def _find_pipeline(source: str) -> Path:
    prefix = Path(os.path.abspath(source))
    folder, neighbour = prefix.parent, f"{prefix.name}.index"
    if prefix.name == folder.name == "variables":  # of a SavedModel
        folder, neighbour = folder.parent, "its folder variables"
    for place in (folder, folder.parent):  # further up, whatever lies there is not this model's
        if (place / PIPELINE).is_file():
            return place / PIPELINE
    raise CheckpointError(
        f"{source} is an Object Detection API checkpoint, and only its {PIPELINE} tells the box coding, the "
        "anchors and the background class; put that file, which comes with the model, beside "
        f"{neighbour} (unpack an archive for that)"
    )


def _check_pipeline(pipeline: Pipeline, layout: Layout, variables: Mapping[str, Variable]) -> None:
    """Raise CheckpointError where the pipeline is another model's, or asks for what AutoML's cannot do."""
    levels = (layout.max_level - layout.num_levels + 1, layout.max_level)
    weighted = "fpn_cells/cell_0/fnode0/WSM" in layout.pieces
    expected_class = len(_class_channels(pipeline)) + _background_channels(pipeline)
    found = {
        "feature_extractor type": layout.backbone.name in pipeline.feature_extractor,
        "anchor levels": pipeline.anchor_levels == levels,
        "bifpn levels": pipeline.bifpn_levels == levels,
        "combine_method": pipeline.combine_method == ("fast_attention" if weighted else "sum"),
        "activation": set(pipeline.activations) == {"SWISH"},
        "batch_norm epsilon": all(abs(e - BN_EPSILON) < 1e-8 for e in pipeline.bn_epsilons),
        "score_converter": pipeline.score_converter == "SIGMOID" and pipeline.logit_scale == 1,
        "box_coder scales": all(scale > 0 for scale in pipeline.box_scales),
        "aspect_ratios": len(set(pipeline.aspect_ratios)) == len(pipeline.aspect_ratios) > 0,
        "anchors": _width(layout, variables, "box_net/box-predict") == 4 * _num_anchors(pipeline),
        "num_classes": pipeline.num_classes > 0
        and _width(layout, variables, "class_net/class-predict") == expected_class,
    }
    wrong = [what for what, fits in found.items() if not fits]
    if wrong:
        raise CheckpointError(
            f"{pipeline.path} does not go with the checkpoint, or describes a model that AutoML's network "
            f"cannot be: see its {', '.join(wrong)}"
        )


def _width(layout: Layout, variables: Mapping[str, Variable], scope: str) -> int:
    return variables[layout.pieces[f"{scope}/bias"].path].shape[-1]


def _num_anchors(pipeline: Pipeline) -> int:
    return pipeline.scales_per_octave * len(pipeline.aspect_ratios)


def _anchor_order(pipeline: Pipeline) -> np.ndarray:
    """AutoML's anchor at a location → the API's. int [anchors]."""
    ratios = pipeline.aspect_ratios
    if sorted(ratios) == sorted(_AUTOML_RATIOS):
        order = [ratios.index(ratio) for ratio in _AUTOML_RATIOS]
    else:
        order = list(range(len(ratios)))
    scales = np.arange(pipeline.scales_per_octave)
    return (scales[:, None] + pipeline.scales_per_octave * np.array(order, int)[None, :]).reshape(-1)


def _class_channels(pipeline: Pipeline) -> np.ndarray:
    """AutoML's class logits → the API's channels. int [anchors · classes]."""
    background = int(pipeline.add_background_class)
    classes = np.arange(pipeline.num_classes) + background
    slots = pipeline.num_classes + background
    return (_anchor_order(pipeline)[:, None] * slots + classes[None, :]).reshape(-1)


def _background_channels(pipeline: Pipeline) -> int:
    return _num_anchors(pipeline) if pipeline.add_background_class else 0


def _predictors(
    layout: Layout, pipeline: Pipeline, variables: Mapping[str, Variable]
) -> Iterator[tuple[str, Piece]]:
    """The last layer of each head, with channels and box scales as AutoML reads them."""
    boxes = (_anchor_order(pipeline)[:, None] * 4 + np.arange(4)[None, :]).reshape(-1)
    divisors = np.tile(np.array(pipeline.box_scales, np.float32), _num_anchors(pipeline))
    for scope, channels, divisor in (
        ("class_net/class-predict", _class_channels(pipeline), None),
        ("box_net/box-predict", boxes, None if set(pipeline.box_scales) == {1.0} else divisors),
    ):
        for leaf in ("pointwise_kernel", "bias"):
            path = layout.pieces[f"{scope}/{leaf}"].path
            shape = (*variables[path].shape[:-1], len(channels))
            yield f"{scope}/{leaf}", Piece(path, partial(_select, channels=channels, divisor=divisor), shape)


def _select(array: np.ndarray, channels: np.ndarray, divisor: np.ndarray | None) -> np.ndarray:
    chosen = array[..., channels]
    return chosen if divisor is None else chosen / divisor


def _about_pipeline(pipeline: Pipeline) -> Iterator[str]:
    """What was done because of the pipeline."""
    yield f"image size, anchors and the blocks that P3, P4 and P5 come from as {pipeline.path} says"
    yield f"class and box channels in AutoML's order of anchors, as {pipeline.path} says"
    if set(pipeline.box_scales) != {1.0}:
        scales = ", ".join(f"{scale:g}" for scale in pipeline.box_scales)
        yield f"the box coder's scales {scales} were divided into box_net/box-predict"
    if pipeline.add_background_class:
        yield "the background class was left out of class_net/class-predict"
