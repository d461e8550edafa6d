"""Frozen graphs (``efficientdet-d0_frozen.pb``): the network as a ``GraphDef`` with its weights inside.

AutoML's ``model_inspect.py`` freezes with TensorFlow 1's ``convert_variables_to_constants``, which turns each
variable into a constant of the same name; TensorFlow 2's names it after the operation that read it. These are
the values that the graph computes with: the moving averages, if the exported checkpoint had them.

Source: AutoML ``inference.py``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from porting.checkpoint.base import MOST_VARIABLES, Checkpoint
from porting.checkpoint.graph.by_use import names_by_use
from porting.checkpoint.graph.nodes import Constant, GraphNode, read_graph_def
from porting.checkpoint.graph.settings import read_settings
from porting.checkpoint.messages import shortened, unreadable
from porting.errors import CheckpointError
from pytorch_model.files import read_bounded
from pytorch_model.formats.wire import Malformed

FORMAT = "frozen TensorFlow graph"
SUFFIX = ".pb"

_VARIABLE = re.compile(
    r"(?:.+/)?(efficientnet-[^/]+|resample_p\d+|fpn_cells|class_net|box_net)/(.+/)?"
    r"(kernel|depthwise_kernel|pointwise_kernel|bias|gamma|beta|moving_mean|moving_variance|WSM(_\d+)?)"
)
_PARTITION = re.compile(_VARIABLE.pattern + r"/part_\d+")
_FOLDED_NAME = "_bn_offset"  # of the constants that TensorFlow's fold_batch_norms adds
_UNFROZEN = ("VarHandleOp", "VariableV2", "Variable")
_MOST_BYTES = (1 << 31) - 1  # protocol buffers allow no larger message
_GIVE = "give the checkpoint or the SavedModel that it was made from"


def is_frozen_graph(head: bytes, path: Path) -> bool:
    """Whether ``path`` is a file with the name of a graph, other than that of a SavedModel's."""
    return path.suffix == SUFFIX and path.name != "saved_model.pb" and os.path.isfile(path)


def open_frozen_graph(path: str | os.PathLike[str], step: int | None = None) -> FrozenGraph:
    """Open the graph at ``path``; a graph has no steps. Raises CheckpointError."""
    if step is not None:
        raise CheckpointError(f"{path} is a frozen graph, which has no step {step}; leave out the step")
    return FrozenGraph(path)


class FrozenGraph(Checkpoint):
    """The weights among the constants of the ``GraphDef`` at ``path``. The file is kept in memory.

    ``nodes``: AutoML name → name of the node. Raises CheckpointError if the file is damaged, or if the graph
    does not have AutoML's variables.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        try:
            data = memoryview(read_bounded(self._path, _MOST_BYTES))
        except OSError as error:
            raise unreadable(self._path, error) from None
        try:
            nodes = list(read_graph_def(data))
            self.nodes = _variable_nodes(nodes)
            self._constants = _constants(nodes, self.nodes, len(data))
        except Malformed as error:
            raise CheckpointError(f"{path} is damaged, or not a frozen graph: {error}") from None
        why = _why_unusable(nodes, self.nodes)
        if why:
            raise CheckpointError(f"{path} {why}")
        stated = read_settings(nodes)
        super().__init__(
            source=str(self._path),
            format=FORMAT,
            shapes={name: constant.shape for name, constant in self._constants.items()},
            dtypes=dict.fromkeys(self._constants, np.dtype(np.float32)),
            notes=stated.notes,
            settings=stated.fields,
        )

    def _read(self, name: str) -> np.ndarray:
        return self._constants[name].array()


def _variable_nodes(nodes: list[GraphNode]) -> dict[str, str]:
    """AutoML name, possibly in an outer scope → the name of its constant."""
    named: dict[str, str] = {}
    for node in nodes:
        if node.op == "Const" and not node.function and _VARIABLE.fullmatch(node.name):
            if node.name in named:
                raise Malformed(f"the constant {node.name} is in it twice")
            named[node.name] = node.name
    named = named or names_by_use(nodes)
    if len(named) > MOST_VARIABLES:
        raise Malformed(f"it has more than {MOST_VARIABLES} constants, which no EfficientDet has")
    return named


def _constants(nodes: list[GraphNode], names: dict[str, str], most_bytes: int) -> dict[str, Constant]:
    """The value of each variable; removes from ``names`` the constants of activations."""
    by_name = {node.name: node for node in nodes if not node.function}
    constants = {}
    for name, node in list(names.items()):
        constant = by_name[node].constant()
        if constant.shape == () and name.endswith("/beta") and f"{name[:-5]}/gamma" not in names:
            del names[name]  # the factor of tf.nn.swish
            continue
        if constant.dtype != np.float32:
            raise Malformed(f"the constant {node} is {constant.dtype}, but weights are float32")
        size = 4 * math.prod(constant.shape)
        if size > most_bytes:
            raise Malformed(f"the constant {node} claims {size} bytes, more than the file has")
        constants[name] = constant
    return constants


def _why_unusable(nodes: Iterable[GraphNode], names: Mapping[str, str]) -> str | None:
    """Why the network cannot be ported from this graph; None if it can, as far as names show."""
    for node in nodes:
        if _PARTITION.fullmatch(node.name):
            return (
                f"holds partitioned variables ({shortened(node.name)}): each is cut into slices, which this "
                "project does not join; save the model without a partitioner and freeze it again"
            )
        if node.name.endswith(_FOLDED_NAME):
            return _folded(node.name)
    kernels = [name for name in names if "class_net/" in name and name.endswith("kernel")]
    if kernels and not any(name.endswith("/moving_variance") for name in names):
        return _folded(f"it has {shortened(kernels[0])} and no moving_variance")
    if names:
        return None
    if any(node.op in _UNFROZEN for node in nodes):
        return "is a graph whose variables are not in it; give the checkpoint that belongs to it"
    if any("/ReadVariableOp" in node.name for node in nodes):
        return f"was frozen by TensorFlow 2 without the names of AutoML's layers; {_GIVE}"
    return (
        "is a graph without AutoML's variables: no constant in it has a name like "
        "efficientnet-…/stem/conv2d/kernel; give the checkpoint or the SavedModel instead"
    )


def _folded(what: str) -> str:
    return (
        f"was optimised for inference: its batch norms are folded into the convolutions ({shortened(what)}), "
        f"and this reader needs them apart; {_GIVE}"
    )
