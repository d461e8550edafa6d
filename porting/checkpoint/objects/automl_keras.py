"""AutoML's Keras EfficientDet as a tree of objects: from paths of attributes to AutoML's variable names.

Source: AutoML ``tf2/efficientdet_keras.py``, ``tf2/util_keras.py``, ``backbone/efficientnet_model.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import PurePath

from porting import scopes
from porting.checkpoint.base import Checkpoint
from porting.checkpoint.objects.assemble import Piece, assemble
from porting.checkpoint.objects.backbones import backbone_named
from porting.checkpoint.objects.graph import ObjectTree, Variable
from porting.errors import CheckpointError
from pytorch_model.config import MAX_BACKBONE_LEVEL, Node, model_config

FORMAT = "TensorFlow 2 object-based checkpoint"
PARTS = ("backbone", "fpn_cells", "class_net", "box_net")
HUB_PARTS = ("base_model", "classes", "boxes")

_DEFAULT_MIN_LEVEL = 3
_PREDICTORS = {"class_net": "classes", "box_net": "boxes"}  # head → attribute of its predicting layer


def read(tree: ObjectTree, root: int) -> Checkpoint:
    """Read the model at ``root``, an object with all of :data:`PARTS`. Raises CheckpointError."""
    variables = tree.variables(root)
    names = KerasNames(variables, tree.count(root, "resample_layers"), tree.bundle.source)
    pieces: dict[str, Piece] = {}
    for path in variables:
        name = names.name(path)
        if name is not None and pieces.setdefault(name, Piece(path)).path != path:
            raise CheckpointError(
                f"{tree.bundle.source} holds {name} twice, as {pieces[name].path} and as {path}; "
                "this is not AutoML's EfficientDet"
            )
    _check_full_names(variables, pieces, tree.bundle.source)
    notes = list(names.notes)
    if PurePath(tree.bundle.source).name.startswith("emackpt"):
        notes.append(
            "emackpt: the trained weights are moving averages, the batch-norm statistics are the raw ones"
        )
    # Fine-tuning from a name-based checkpoint copies the averages of the statistics once. After that tfa's
    # MovingAverage does not update them.
    return assemble(tree, variables, pieces, FORMAT, notes, stale_statistics=True)


def read_hub(tree: ObjectTree, root: int) -> Checkpoint:
    """Read a model trained on top of a TensorFlow Hub module, whose variables have their full names."""
    variables = tree.variables(root)
    pieces = {}
    for path in variables:
        part, _, rest = path.partition("/")
        if part == "base_model" and rest.endswith(":0"):
            pieces[rest.removesuffix(":0")] = Piece(path)
        for head, predictor in _PREDICTORS.items():
            if part == predictor:
                pieces[f"{scopes.head_predictor(head)}/{rest}"] = Piece(path)
    notes = ["trained from a TensorFlow Hub module; this layout was not checked with a real file"]
    return assemble(tree, variables, pieces, FORMAT, notes, stale_statistics=True)


class KerasNames:
    """Path from the model → AutoML variable name.

    A name depends on the structure of the model, which is inferred from all the paths together.
    ``variables``: path → variable. ``extra_levels``: the number of pyramid levels above the backbone, which
    is the length of ``resample_layers``; None if only variables are known. Raises CheckpointError if the tree
    contradicts itself.
    """

    def __init__(
        self, variables: Mapping[str, Variable], extra_levels: int | None, source: str = "the checkpoint"
    ) -> None:
        self._variables = variables
        self._extra_levels = extra_levels
        self._source = source
        self.notes: list[str] = []

    def name(self, path: str) -> str | None:
        """AutoML's name of the variable at ``path``; None if AutoML's detector has no such variable."""
        parts = [int(part) if part.isascii() and part.isdigit() else part for part in path.split("/")]
        match parts:
            case ["backbone", "_stem", "_conv_stem", str(leaf)]:
                return f"{self.backbone}/stem/conv2d/{leaf}"
            case ["backbone", "_stem", "_bn", str(leaf)]:
                return f"{self.backbone}/stem/tpu_batch_normalization/{leaf}"
            case ["backbone", "_blocks", int(block), *rest]:
                inner = self._in_block(block, rest)
                return inner and f"{self.backbone}/blocks_{block}/{inner}"
            case ["resample_layers", int(index), ("conv2d" | "bn") as layer, str(leaf)]:
                return f"{scopes.extra_level(MAX_BACKBONE_LEVEL + 1 + index)}/{layer}/{leaf}"
            case ["fpn_cells", "cells", int(cell), "fnodes", int(index), *rest] if index < len(self.nodes):
                inner = _in_node(self.nodes[index], rest)
                return inner and f"{scopes.bifpn_node(cell, index)}/{inner}"
            case [("class_net" | "box_net") as scope, *rest]:
                return self._in_head(scope, rest)
        return None

    def _in_block(self, block: int, parts: list[int | str]) -> str | None:
        expands = f"backbone/_blocks/{block}/_expand_conv/kernel" in self._variables
        match parts:
            case ["_expand_conv", str(leaf)]:
                return f"conv2d/{leaf}"
            case ["_project_conv", str(leaf)]:
                return f"conv2d_1/{leaf}" if expands else f"conv2d/{leaf}"
            case ["_depthwise_conv", str(leaf)]:
                return f"depthwise_conv2d/{leaf}"
            case ["_se", ("_se_reduce" | "_se_expand") as layer, str(leaf)]:
                return f"se/conv2d/{leaf}" if layer == "_se_reduce" else f"se/conv2d_1/{leaf}"
            case [("_bn0" | "_bn1" | "_bn2") as bn, str(leaf)]:
                # Attributes have fixed numbers (_bn0 follows the expansion); names count the layers built.
                number = int(bn[-1]) - (0 if expands else 1)
                return f"{scopes.numbered('tpu_batch_normalization', number)}/{leaf}" if number >= 0 else None
        return None

    def _in_head(self, scope: str, parts: list[int | str]) -> str | None:
        match parts:
            case ["conv_ops", int(repeat), str(leaf)]:
                return f"{scopes.head_layer(scope, repeat)}/{leaf}"
            case ["bns", int(repeat), int(index), str(leaf)] if index < self.num_levels:
                return f"{scopes.head_norm(scope, repeat, self.min_level + index)}/{leaf}"
            case [str(layer), str(leaf)] if layer == _PREDICTORS[scope]:
                return f"{scopes.head_predictor(scope)}/{leaf}"
        return None

    @cached_property
    def num_levels(self) -> int:
        """The number of pyramid levels. A BiFPN cell has two nodes for each level but one."""
        nodes = 1 + max(self._numbers(r"fpn_cells/cells/0/fnodes/(\d+)/"), default=-1)
        bns = 1 + max(self._numbers(r"(?:class|box)_net/bns/\d+/(\d+)/"), default=-1)
        if scopes.is_qufpn(nodes, bns):
            raise CheckpointError(f"{self._source} {scopes.QUFPN}")
        if nodes < 2 or nodes % 2 or bns not in (0, nodes // 2 + 1):
            raise CheckpointError(
                f"{self._source} is not an AutoML EfficientDet: a BiFPN cell of {nodes} nodes does not fit "
                f"heads for {bns} levels"
            )
        return nodes // 2 + 1

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes of a BiFPN cell. They depend only on the number of levels."""
        return model_config(
            "efficientdet-d0",
            min_level=_DEFAULT_MIN_LEVEL,
            max_level=_DEFAULT_MIN_LEVEL + self.num_levels - 1,
        ).bifpn_nodes

    @cached_property
    def min_level(self) -> int:
        """The lowest pyramid level, from the names of the heads' batch norms, or from the levels above P5.

        Paths do not contain it.
        """
        named = self._in_full_names(r"(?:class|box)_net/bns/\d+/0/", r"(?:class|box)-\d+-bn-(\d+)/")
        if self._extra_levels:
            counted = MAX_BACKBONE_LEVEL + self._extra_levels - self.num_levels + 1
            if named not in (None, str(counted)):
                raise CheckpointError(
                    f"{self._source} contradicts itself: {self.num_levels} pyramid levels, "
                    f"{self._extra_levels} of them above P5, do not begin at P{named}, which its names say"
                )
            return counted
        if named is not None:
            return int(named)
        self.notes.append(
            f"lowest pyramid level P{_DEFAULT_MIN_LEVEL} (assumed; the file does not contain it)"
        )
        return _DEFAULT_MIN_LEVEL

    @cached_property
    def backbone(self) -> str:
        """The name of the backbone, from the full names, or of the EfficientNet with the same shapes."""
        named = self._in_full_names(r"backbone/_stem/", r"(efficientnet-[^/]+)/")
        if named is not None:
            return named
        unnamed = KerasNames(self._variables, self._extra_levels, self._source)
        unnamed.__dict__["backbone"] = "?"
        shapes = {}
        for path, variable in self._variables.items():
            name = unnamed.name(path) if path.startswith("backbone/") else None
            if name is not None:
                shapes[name.removeprefix("?/")] = variable.shape
        name = backbone_named(shapes)
        if name is None:
            name = "efficientnet-custom"
            self.notes.append(f"the shapes of the backbone fit no known EfficientNet; it is called {name}")
        return name

    def _numbers(self, pattern: str) -> set[int]:
        regex = re.compile(pattern)
        return {int(found[1]) for path in self._variables if (found := regex.match(path))}

    def _in_full_names(self, path_pattern: str, name_pattern: str) -> str | None:
        """The group of ``name_pattern`` in the full names of the variables under ``path_pattern``.

        None if there is no match, or if the matches differ.
        """
        found_texts = {
            found[1]
            for path, variable in self._variables.items()
            if re.match(path_pattern, path) and (found := re.search(name_pattern, variable.full_name))
        }
        return found_texts.pop() if len(found_texts) == 1 else None


def _in_node(node: Node, parts: list[int | str]) -> str | None:
    match parts:
        case [str(wsm)] if re.fullmatch(r"WSM(_\d+)?", wsm):
            return wsm
        case ["resample_layers", int(index), ("conv2d" | "bn") as layer, str(leaf)] if index < len(
            node.inputs
        ):
            return f"{scopes.resampled_input(node, index)}/{layer}/{leaf}"
        case ["op_after_combine", ("conv_op" | "bn") as layer, str(leaf)]:
            return f"{scopes.after_combine(node)}/{'conv' if layer == 'conv_op' else 'bn'}/{leaf}"
    return None


def _check_full_names(variables: Mapping[str, Variable], pieces: Mapping[str, Piece], source: str) -> None:
    """Raise CheckpointError if a variable's full name is the name that the paths give to another variable."""
    for name, piece in pieces.items():
        full_name = variables[piece.path].full_name
        if full_name != name and full_name in pieces:
            raise CheckpointError(
                f"{source} contradicts itself: {piece.path} should be {name}, but was saved as {full_name}; "
                "this is not AutoML's EfficientDet, or it was changed"
            )
