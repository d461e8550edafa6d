"""AutoML's names of the constants of a graph that TensorFlow 2 froze: by the operations that use them.

``convert_variables_to_constants_v2`` names a constant after the operation that read the variable. The name of
an operation holds the scope of its layer, and its kind says which of the layer's variables it reads.

Source: AutoML ``tf2/efficientdet_keras.py`` (scopes; a layer called again gets a number).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from porting import scopes
from porting.checkpoint.graph.nodes import GraphNode
from pytorch_model.formats.wire import Malformed

#: Operations that pass on their first input unchanged.
SAME_VALUE = frozenset({"Identity", "ReadVariableOp", "Enter", "StopGradient"})

_BN = ("gamma", "beta", "moving_mean", "moving_variance")
# Kind of operation → number of the input → the variable that it reads
_READS = {
    "Conv2D": {1: "kernel"},
    "DepthwiseConv2dNative": {1: "depthwise_kernel"},
    "BiasAdd": {1: "bias"},
    "AddV2": {1: "bias"},
    **{f"FusedBatchNorm{version}": dict(enumerate(_BN, 1)) for version in ("", "V2", "V3")},
}
# Scopes of layers with one kernel or none, and of those with a depthwise and a pointwise kernel.
_LAYER = re.compile(
    r"(?:^|/)((?:efficientnet-[^/]+/(?:stem|blocks_\d+)|resample_p\d+|fpn_cells/cell_\d+/fnode\d+/resample_\w+)"
    r"/(?:se/)?(?:conv2d|depthwise_conv2d|tpu_batch_normalization|bn)(?:_\d+)?)/"
)
_SEPARABLE = re.compile(
    r"(?:^|/)(fpn_cells/cell_\d+/fnode\d+/op_after_combine\d+/(?:conv|bn)"
    r"|(class|box)_net/\2-(?:\d+-bn-\d+|\d+|predict))(?:_\d+)?/"
)
_FUSION = re.compile(r"(?:^|/)(fpn_cells/cell_\d+/fnode\d+)/Relu(?:_(\d+))?$")


def names_by_use(nodes: Iterable[GraphNode]) -> dict[str, str]:
    """AutoML name → name of the constant. Raises :class:`Malformed` if a variable has two constants."""
    by_name = {node.name: node for node in nodes if not node.function}
    found: dict[str, str] = {}
    for node in by_name.values():
        for index, variable in _variables_of(node):
            constant = constant_behind(node.inputs[index], by_name)
            if constant is None:
                continue
            if found.setdefault(variable, constant.name) != constant.name:
                raise Malformed(f"it has two constants for {variable}")
    return found


def constant_behind(name: str, nodes: dict[str, GraphNode]) -> GraphNode | None:
    """The constant that the node ``name`` is or passes on; None if it is computed."""
    for _ in range(20):
        node = nodes.get(name)
        if node is None or node.op == "Const":
            return node
        if node.op not in SAME_VALUE or not node.inputs:
            return None
        name = node.inputs[0]
    return None


def _variables_of(node: GraphNode) -> Iterator[tuple[int, str]]:
    """(number of an input, the variable that it should be)."""
    fusion = _FUSION.search(node.name)
    if fusion and node.op == "Relu" and node.inputs:
        yield 0, f"{fusion[1]}/{scopes.numbered('WSM', int(fusion[2] or 0))}"
    for index, leaf in _READS.get(node.op, {}).items():
        layer, separable = _LAYER.search(node.name), _SEPARABLE.search(node.name)
        if index >= len(node.inputs):
            return
        if layer:
            yield index, f"{layer[1]}/{leaf}"
        elif separable:
            yield index, f"{separable[1]}/{'pointwise_kernel' if leaf == 'kernel' else leaf}"
