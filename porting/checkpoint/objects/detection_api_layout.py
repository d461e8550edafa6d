"""The variables of the Object Detection API's EfficientDet, mapped from their paths to AutoML's names.

The sources are those of :mod:`.detection_api`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, NoReturn

import numpy as np

from porting import scopes
from porting.checkpoint.messages import shortened
from porting.checkpoint.objects.assemble import Piece
from porting.checkpoint.objects.backbones import backbone_named
from porting.checkpoint.objects.graph import Variable
from porting.errors import CheckpointError
from pytorch_model.config import MAX_BACKBONE_LEVEL, BackboneConfig, Node, backbone_config, model_config

_BN = frozenset({"beta", "gamma", "moving_mean", "moving_variance"})
_SEPARABLE = frozenset({"bias", "depthwise_kernel", "pointwise_kernel"})
_CONV = frozenset({"bias", "kernel"})
_HEADS = {  # AutoML's head → the API's batch norms, convolutions and predicting layer
    "class_net": (
        "_base_tower_layers_for_heads/class_predictions_with_background",
        "_head_scope_conv_layers/ClassPredictionTower",
        "_prediction_heads/class_predictions_with_background/_class_predictor_layers",
    ),
    "box_net": (
        "_base_tower_layers_for_heads/box_encodings",
        "_head_scope_conv_layers/BoxPredictionTower",
        "_box_prediction_head/_box_encoder_layers",
    ),
}
_BACKBONE = ("_feature_extractor/_efficientnet", "_feature_extractor/classification_backbone")
_LAYERS_PER_REPEAT = 3  # convolution, batch norm, activation


@dataclass(frozen=True)
class Layout:
    """The meaning of every variable: in ``pieces`` (AutoML name → what it is made of), or ``unused``.

    ``detector_blocks``: how many blocks of the backbone the detector runs; the rest belong to a classifier.
    """

    backbone: BackboneConfig
    detector_blocks: int
    num_levels: int
    max_level: int
    pieces: Mapping[str, Piece]
    unused: frozenset[str]


def read_layout(variables: Mapping[str, Variable], source: str = "the checkpoint") -> Layout:
    """Map every variable (path from the detector → variable). Raises CheckpointError if one does not fit."""
    reader = _Reader(variables, source)
    reader.check_detector()
    backbone = reader.read_backbone()
    reader.read_heads()
    reader.read_bifpn()
    left = variables.keys() - {piece.path for piece in reader.pieces.values()} - reader.unused
    left = {path for path in left if not path.startswith(("optimizer/", "_optimizer/"))}
    if left:
        reader.reject(f"{min(left)} ({len(left)} in all) is not part of an EfficientDet")
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

    def reject(self, reason: str) -> NoReturn:
        raise CheckpointError(
            f"{self.source} is not an EfficientDet that AutoML's network could take over: {reason}"
        )

    def place(self, layer: str, scope: str, leaves: frozenset[str]) -> None:
        """Map the variables ``leaves`` of the API's ``layer`` to those of AutoML's ``scope``."""
        found = self.layers[layer].leaves if layer in self.layers else frozenset()
        if found != leaves:
            missing, extra = sorted(leaves - found), sorted(found - leaves)
            without = missing == ["bias"] and not layer.startswith(_BACKBONE)
            reason = "; it was trained with force_use_bias: false" if without else ""
            self.reject(
                f"{layer} has {', '.join(extra) or 'nothing'} that {scope} does not need, and lacks "
                f"{', '.join(missing) or 'nothing'}{reason}"
            )
        for leaf in sorted(leaves):
            self.pieces[f"{scope}/{leaf}"] = Piece(f"{layer}/{leaf}")

    def numbers(self, pattern: str) -> list[int]:
        """The different numbers that the group of ``pattern`` matches in the layers' paths, ascending."""
        regex = re.compile(pattern)
        return sorted({int(found[1]) for path in self.layers if (found := regex.fullmatch(path))})

    def check_detector(self) -> None:
        """Reject another detector of the API by the parts of its feature extractor."""
        extractor = "_feature_extractor/"
        parts = {path.split("/")[1] for path in self.variables if path.startswith(extractor)}
        missing = [part for part in ("_efficientnet", "_bifpn_stage") if part not in parts]
        if missing:
            found = ", ".join(shortened(part) for part in sorted(parts)[:8]) or "nothing"
            self.reject(
                f"it is another detector: its _feature_extractor has {found}, and lacks "
                f"{' and '.join(missing)}"
            )

    # Keras numbers the layers that have weights in the order of execution. EfficientNet is a chain of them.

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
            self.reject(f"its backbone of {block} blocks is not one of EfficientNet-B0…B7")
        behind = tuple(f"blocks_{index}/" for index in range(self.detector_blocks, block))
        self.unused |= {piece.path for inner, piece in self.pieces.items() if inner.startswith(behind)}
        self.pieces = {
            f"{name}/{inner}": piece for inner, piece in self.pieces.items() if not inner.startswith(behind)
        }
        self.unused |= {f"{layer.path}/{leaf}" for layer in chain for leaf in layer.leaves}
        if any(self._in_detector(layer) for layer in chain):
            self.reject(f"{chain[0].path} does not belong to a block")
        return backbone_config(name)

    def _chain(self) -> list[_Layer]:
        pattern = re.compile(
            r"_feature_extractor/(?:_efficientnet|classification_backbone)/layer_with_weights-(\d+)"
        )
        numbered = {
            int(found[1]): layer for path, layer in self.layers.items() if (found := pattern.fullmatch(path))
        }
        if sorted(numbered) != list(range(len(numbered))) or not numbered:
            self.reject(f"its {len(numbered)} backbone layers are not numbered from 0 without gaps")
        return [numbered[i] for i in range(len(numbered))]

    @staticmethod
    def _in_detector(layer: _Layer) -> bool:
        return layer.path.startswith("_feature_extractor/_efficientnet/")

    @staticmethod
    def _is_top(chain: list[_Layer]) -> bool:
        """Whether the rest is the classifier, which has no depthwise convolution."""
        return not any(layer.leaves == {"depthwise_kernel"} for layer in chain[:3])

    def take(self, chain: list[_Layer], scope: str, leaves: frozenset[str] | set[str]) -> None:
        if not chain:
            self.reject(f"its backbone ends before {scope}")
        self.place(chain.pop(0).path, scope, frozenset(leaves))

    def _block(self, chain: list[_Layer], scope: str) -> None:
        bns = iter(f"{scope}/{scopes.numbered('tpu_batch_normalization', i)}" for i in range(3))
        convs = iter(f"{scope}/{scopes.numbered('conv2d', i)}" for i in range(2))
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
        """The box tower gives the number of levels and of repeats; both heads must have as many."""
        norms, convolutions, _ = _HEADS["box_net"]
        levels = self.numbers(rf"_box_predictor/{norms}/(\d+)/\d+")
        repeats = self.numbers(rf"_box_predictor/{convolutions}/(\d+)")
        if (
            not levels
            or not repeats
            or "_box_predictor/_head_scope_conv_layers/PredictionTower/0" in self.layers
        ):
            self.reject("its heads are not two towers of convolutions (share_prediction_tower?)")
        self.num_levels = len(levels)
        for head, (_, convolutions, predictor) in _HEADS.items():
            for repeat in range(len(repeats)):
                layer = f"_box_predictor/{convolutions}/{repeat}"
                self.place(layer, scopes.head_layer(head, repeat), _SEPARABLE)
            self.place(f"_box_predictor/{predictor}/0", scopes.head_predictor(head), _SEPARABLE)
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
            self.reject(
                f"{len(numbers)} BiFPN nodes after {self.extra_levels} levels above P{MAX_BACKBONE_LEVEL} "
                f"do not make whole cells of {per_cell}"
            )
        min_level = MAX_BACKBONE_LEVEL + self.extra_levels - self.num_levels + 1
        for head, (norms, _, _) in _HEADS.items():
            for repeat, index in self._bn_layers:
                layer = f"_box_predictor/{norms}/{index}/{_LAYERS_PER_REPEAT * repeat + 1}"
                self.place(layer, scopes.head_norm(head, repeat, min_level + index), _BN)
        nodes = _cell_nodes(self.num_levels)
        for number in range(self.extra_levels):
            self._resample(
                f"{stage}/node_input_blocks/{number}/0/1", scopes.extra_level(MAX_BACKBONE_LEVEL + 1 + number)
            )
        for number in numbers:
            cell, index = divmod(number - self.extra_levels, per_cell)
            self._node(stage, number, scopes.bifpn_node(cell, index), nodes[index])

    def _node(self, stage: str, number: int, scope: str, node: Node) -> None:
        for i in range(len(node.inputs)):
            layer = f"{stage}/node_input_blocks/{number}/{i}/1"
            self._resample(layer, f"{scope}/{scopes.resampled_input(node, i)}")
        self._fusion(f"{stage}/node_combine_op/{number}/bifpn_combine_weights", scope, len(node.inputs))
        after = f"{stage}/node_post_combine_block/{number}"  # its layer 0 is the activation
        self.place(f"{after}/1", f"{scope}/{scopes.after_combine(node)}/conv", _SEPARABLE)
        self.place(f"{after}/2", f"{scope}/{scopes.after_combine(node)}/bn", _BN)

    def _resample(self, layer: str, scope: str) -> None:
        """Map a 1×1 convolution and its batch norm, which are there if the width changes."""
        if f"{layer}/0" in self.layers or f"{layer}/1" in self.layers:
            self.place(f"{layer}/0", f"{scope}/conv2d", _CONV)
            self.place(f"{layer}/1", f"{scope}/bn", _BN)

    def _fusion(self, path: str, scope: str, inputs: int) -> None:
        """Map the fusion weights of a node: one variable here, one per input in AutoML, none for sums."""
        if path not in self.variables:
            return
        if self.variables[path].shape != (inputs, 1):
            self.reject(f"{path} has shape {list(self.variables[path].shape)}, not [{inputs}, 1]")
        for i in range(inputs):
            self.pieces[f"{scope}/{scopes.numbered('WSM', i)}"] = Piece(path, partial(_element, index=i))


def _element(array: np.ndarray, index: int) -> np.ndarray:
    return array[index, 0]


def _cell_nodes(num_levels: int) -> tuple[Node, ...]:
    """The nodes of a BiFPN cell. They depend only on the number of levels."""
    return model_config("efficientdet-d0", min_level=3, max_level=2 + num_levels).bifpn_nodes
