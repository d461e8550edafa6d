"""A reference from a file: a graph that TensorFlow saved, such as the ``model.meta`` next to a checkpoint.

This is Google's network as Google's code built it, whereas :mod:`tf_reference` is our reading of it. The part
between the normalised image and the heads is cut out of the graph, its variables are replaced by values, and
the result runs in a TensorFlow 1 session, operation by operation as it was saved. Nothing depends on the
names of operations: the image is fed to the input of the stem's convolution.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from porting.errors import EfficientDetError
from porting.parity.lockstep import Reference
from porting.parity.reference.graph_session import run_graph
from porting.parity.reference.graph_taps import SAME_VALUE, find_taps
from pytorch_model.config import EfficientDetConfig
from pytorch_model.files import check_regular
from tf_reference.variables import variable_shapes

_IMAGE = "parity/picture"  # the node that replaces the input of the stem
_VARIABLES = frozenset({"Variable", "VariableV2", "VarHandleOp", "AutoReloadVariable"})
_RANDOM = frozenset(
    {"RandomUniform", "RandomStandardNormal", "StatelessRandomUniform", "StatelessRandomUniformV2"}
)
_FLOAT32 = 1  # DT_FLOAT of types.proto
_BIASED = frozenset({"BiasAdd", "Add", "AddV2"})
_LAST_BIASES = frozenset({"class_net/class-predict/bias", "box_net/box-predict/bias"})
_ELSEWHERE = "use --reference ops"


@dataclass
class GraphReference:
    """A saved graph, reduced to the network, with its weights in it. It is a ``FileReference``.

    ``source``: the file, for messages. ``size``: the (height, width) of the images it was built for, None for
    any. ``taps`` are known after :meth:`on`.
    """

    source: str
    config: EfficientDetConfig
    graph_def: Any  # tf.compat.v1.GraphDef
    variables: Mapping[str, str]  # name of a node → AutoML's name of the variable it holds
    size: tuple[int, int] | None = None
    exact: bool = field(default=True, init=False)
    taps: frozenset[str] = field(default=frozenset(), init=False)

    def on(self, images: np.ndarray) -> Reference:
        """The reference on ``images``, float32 [N, H, W, 3], normalised.

        Raises :class:`EfficientDetError` if the graph does not take such images or lacks an output.
        """
        graph, image = _import(self, images.shape)
        tensors = find_taps(graph, self.variables, self.config)
        self.taps = frozenset(tensors)

        def run(emit: Callable[[str, np.ndarray], None]) -> None:
            run_graph(graph, image, tensors, images, emit)

        return run


def open_meta(
    path: str | os.PathLike[str], config: EfficientDetConfig, variables: Mapping[str, np.ndarray]
) -> GraphReference:
    """The graph in a ``.meta`` file, with the values of ``variables``: AutoML name → float array.

    Imports TensorFlow. Raises :class:`EfficientDetError` for a damaged file or one of another kind, for a
    graph of a training run, and for a graph of another model than ``config``.
    """
    import tensorflow as tf

    meta = _parse(tf.compat.v1.MetaGraphDef, path, "a graph that tf.train.Saver wrote (.meta)")
    return _reference(meta.graph_def, str(path), config, variables)


def open_saved_model(
    folder: str | os.PathLike[str], config: EfficientDetConfig, variables: Mapping[str, np.ndarray]
) -> GraphReference:
    """The graph of a SavedModel of TensorFlow 1 or 2, with the values of ``variables``: the folder's own.

    Raises the same errors as :func:`open_meta`.
    """
    from tensorflow.core.protobuf import saved_model_pb2

    path = Path(folder) / "saved_model.pb"
    model = _parse(saved_model_pb2.SavedModel, path, "a SavedModel's graph")
    if not model.meta_graphs:
        raise EfficientDetError(f"{path} holds no graph; export the model again, or {_ELSEWHERE}")
    meta = next((m for m in model.meta_graphs if "serve" in m.meta_info_def.tags), model.meta_graphs[0])
    if meta.HasField("object_graph_def"):
        return _keras_reference(folder, config, variables)
    return _reference(meta.graph_def, str(path), config, variables)


def meta_beside(source: str) -> Path:
    """The ``.meta`` file of the checkpoint with prefix ``source``. Raises EfficientDetError if absent."""
    path = Path(f"{source}.meta")
    if path.is_file():
        return path
    raise EfficientDetError(
        f"there is no {path}, the graph that TensorFlow saves with a checkpoint; give one with --graph, or "
        f"{_ELSEWHERE}"
    )


# --- from a file to a graph of constants -------------------------------------------------------------


def _parse(kind: Any, path: str | os.PathLike[str], what: str) -> Any:
    from google.protobuf.message import DecodeError

    try:
        check_regular(path)
        message = kind.FromString(Path(path).read_bytes())
    except OSError as error:
        raise EfficientDetError(f"cannot read {path}: {error.strerror or error}; check --graph") from None
    except DecodeError:
        raise EfficientDetError(
            f"{path} is not {what}, or is damaged; download it again, or {_ELSEWHERE}"
        ) from None
    return message


def _reference(
    graph_def: Any, source: str, config: EfficientDetConfig, variables: Mapping[str, np.ndarray]
) -> GraphReference:
    nodes = {node.name: node for node in graph_def.node}
    holders = {
        name: name
        for name, node in nodes.items()
        if node.op in _VARIABLES and name in variable_shapes(config)
    }
    return _cut(graph_def, nodes, holders, source, config, variables)


def _keras_reference(
    folder: str | os.PathLike[str], config: EfficientDetConfig, variables: Mapping[str, np.ndarray]
) -> GraphReference:
    """The graph of a SavedModel of TensorFlow 2.

    It consists of functions that call functions, over variables without AutoML's names. Frozen, they are one
    graph of constants, and the variable of a constant is the one with the same values.
    """
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    try:
        loaded = tf.saved_model.load(
            os.fspath(folder)
        )  # kept, because its functions do not own its variables
        served = loaded.signatures["serving_default"]
        graph_def = convert_variables_to_constants_v2(served).graph.as_graph_def()
    except KeyError:
        raise EfficientDetError(
            f"{folder} has no serving signature; export the model again, or {_ELSEWHERE}"
        ) from None
    except (OSError, ValueError, tf.errors.OpError) as error:
        raise EfficientDetError(
            f"TensorFlow cannot load {folder}: {_first_line(error)}; {_ELSEWHERE}"
        ) from None
    by_value: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for name, value in variables.items():
        by_value.setdefault(_identity(value), []).append(name)
    holders = {}
    for node in graph_def.node:
        if node.op == "Const" and node.attr["dtype"].type == tf.float32.as_datatype_enum:
            same = by_value.get(_identity(tf.make_ndarray(node.attr["value"].tensor)), [])
            # Of variables with equal values, such as biases of zero, the scope in the node's name decides.
            mine = (
                same
                if len(same) == 1
                else [name for name in same if f"{name.rpartition('/')[0]}/" in node.name]
            )
            if mine:
                holders[node.name] = mine[0]
    nodes = {node.name: node for node in graph_def.node}
    return _cut(graph_def, nodes, holders, str(folder), config, variables)


def _identity(value: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return value.shape, np.ascontiguousarray(value, np.float32).tobytes()


def _cut(
    graph_def: Any,
    nodes: dict[str, Any],
    holders: dict[str, str],
    source: str,
    config: EfficientDetConfig,
    values: Mapping[str, np.ndarray],
) -> GraphReference:
    """Keep the nodes between the stem and the predictions; replace variables by ``values``."""
    import tensorflow as tf

    variable_of = {name: _variable_of(name, nodes, holders) for name in nodes}
    stem = _stem(nodes, variable_of, source, config)
    ends = [
        name
        for name, node in nodes.items()
        if node.op in _BIASED and any(variable_of.get(_node_of(x)) in _LAST_BIASES for x in node.input)
    ]
    kept = _ancestors(nodes, ends, stem)
    _reject_training(nodes, kept, holders, source)
    cut = tf.compat.v1.GraphDef(library=graph_def.library, versions=graph_def.versions)
    for name in kept:
        node = cut.node.add()
        node.CopyFrom(nodes[name])
        del node.input[:]
        node.input.extend(x for x in nodes[name].input if not x.startswith("^"))
        node.device = ""
        for attribute in ("_class", "_output_shapes"):
            node.attr.pop(attribute, None)
        _fill(node, holders, values, source)
    first = next(node for node in cut.node if node.name == stem)
    first.input[0] = _IMAGE
    size = _size(cut, config)
    return GraphReference(source, config, cut, {n: holders[n] for n in kept if n in holders}, size)


def _node_of(tensor: str) -> str:
    return tensor.lstrip("^").partition(":")[0]


def _variable_of(name: str, nodes: Mapping[str, Any], holders: Mapping[str, str]) -> str | None:
    """The variable whose value the node passes on, or None."""
    for _ in range(20):
        if name in holders:
            return holders[name]
        node = nodes.get(name)
        if node is None or node.op not in SAME_VALUE or not node.input:
            return None
        name = _node_of(node.input[0])
    return None


def _stem(
    nodes: Mapping[str, Any], variable_of: Mapping[str, str | None], source: str, config: EfficientDetConfig
) -> str:
    kernel = f"{config.backbone.name}/stem/conv2d/kernel"
    found = [
        name
        for name, node in nodes.items()
        if node.op == "Conv2D" and len(node.input) > 1 and variable_of.get(_node_of(node.input[1])) == kernel
    ]
    if len(found) != 1:
        have = "none" if not found else f"{len(found)}"
        raise EfficientDetError(
            f"{source} has {have} of the one convolution that reads {kernel}, the input of the image; it is "
            f"not a graph of {config.name}, or {_ELSEWHERE}"
        )
    if nodes[found[0]].attr["T"].type != _FLOAT32:
        raise EfficientDetError(
            f"{source} does not compute in float32, and a coarser type proves nothing; export it without "
            f"mixed precision, or {_ELSEWHERE}"
        )
    if nodes[found[0]].attr["data_format"].s not in (b"", b"NHWC"):
        raise EfficientDetError(
            f"{source} was built for {nodes[found[0]].attr['data_format'].s.decode()} maps, which TensorFlow "
            f"cannot run on a CPU; {_ELSEWHERE}"
        )
    return found[0]


def _ancestors(nodes: Mapping[str, Any], ends: list[str], stem: str) -> list[str]:
    """The nodes that ``ends`` depend on, in the graph's order, without those before the stem."""
    wanted, pending = set(ends), list(ends)
    while pending:
        name = pending.pop()
        inputs = nodes[name].input[1:] if name == stem else nodes[name].input
        for parent in (_node_of(x) for x in inputs if not x.startswith("^")):
            if parent in nodes and parent not in wanted:
                wanted.add(parent)
                pending.append(parent)
    return [name for name in nodes if name in wanted]


def _reject_training(
    nodes: Mapping[str, Any], kept: list[str], holders: Mapping[str, str], source: str
) -> None:
    """Reject the graph of a training run: it normalises by the batch and drops connections at random."""
    for name in kept:
        node = nodes[name]
        batch = node.op.startswith("FusedBatchNorm") and node.attr["is_training"].b
        if batch or node.op in _RANDOM:
            what = "normalises by the batch's own statistics" if batch else "draws random numbers"
            raise EfficientDetError(
                f"{source} is the graph of a training run ({name} {what}), which no evaluation can be "
                f"compared with; export one for inference, or {_ELSEWHERE}"
            )
    read = {holders[name] for name in kept if name in holders}
    means = {name for name in holders.values() if name.endswith("/moving_mean")}
    if means - read:
        raise EfficientDetError(
            f"{source} is the graph of a training run ({min(means - read)} is never read), which no "
            f"evaluation can be compared with; export one for inference, or {_ELSEWHERE}"
        )


def _fill(node: Any, holders: Mapping[str, str], values: Mapping[str, np.ndarray], source: str) -> None:
    """Turn a variable into a constant, and an operation that reads a variable into an identity."""
    import tensorflow as tf

    if node.op == "ReadVariableOp":
        dtype = node.attr["dtype"].type
        node.op = "Identity"
        node.attr.clear()
        node.attr["T"].type = dtype
    elif node.op in _VARIABLES:
        name = holders.get(node.name)
        if name is None or name not in values:
            raise EfficientDetError(
                f"{source} reads the variable {node.name}, which the checkpoint does not have; it is another "
                f"model's graph, or {_ELSEWHERE}"
            )
        dtype = tf.dtypes.as_dtype(node.attr["dtype"].type)
        node.op = "Const"
        node.attr.clear()
        node.attr["dtype"].type = dtype.as_datatype_enum
        value = np.asarray(values[name], dtype.as_numpy_dtype)
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(value, dtype))


def _size(graph_def: Any, config: EfficientDetConfig) -> tuple[int, int] | None:
    """The image's size, from the sizes to which maps are enlarged: the largest is the finest level's."""
    import tensorflow as tf

    constants = {node.name: node for node in graph_def.node if node.op == "Const"}
    targets = []
    for node in graph_def.node:
        if node.op == "ResizeNearestNeighbor" and _node_of(node.input[1]) in constants:
            size = tf.make_ndarray(constants[_node_of(node.input[1])].attr["value"].tensor)
            targets.append((int(size[0]), int(size[1])))
    if not targets:
        return None
    finest = max(targets)
    if tuple(_halved(side, config.min_level) for side in config.image_size) == finest:
        return config.image_size
    return finest[0] << config.min_level, finest[1] << config.min_level


def _halved(side: int, times: int) -> int:
    for _ in range(times):
        side = (side - 1) // 2 + 1
    return side


def _import(reference: GraphReference, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """The graph with an image input of ``shape``, and that input."""
    import tensorflow as tf

    graph = tf.Graph()
    with graph.as_default():
        image = tf.compat.v1.placeholder(tf.float32, shape, _IMAGE)
        try:
            tf.import_graph_def(reference.graph_def, {_IMAGE: image}, name="")
        except (ValueError, tf.errors.OpError) as error:
            wanted = reference.size
            why = (
                f"it was built for images of {wanted[0]}×{wanted[1]}, not {shape[1]}×{shape[2]}; try "
                f"--size {wanted[0]}x{wanted[1]}"
                if wanted and wanted != shape[1:3]
                else f"{_first_line(error)}; {_ELSEWHERE}"
            )
            raise EfficientDetError(f"TensorFlow cannot run the graph in {reference.source}: {why}") from None
    return graph, image


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
