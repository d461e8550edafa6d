"""TensorFlow 2 object-based checkpoints (``ckpt-N``): the objects that own the variables.

Such a checkpoint names a variable by the attributes that lead to it (``backbone/_stem/_bn/gamma``), and holds
the whole graph of objects as one string. :mod:`.automl_keras` and :mod:`.detection_api` map the objects of
the two known models to AutoML's variable names; :mod:`.assemble` makes a checkpoint of the result.

Source: TensorFlow ``core/protobuf/trackable_object_graph.proto`` and ``python/checkpoint/``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from porting.checkpoint.messages import shortened
from porting.checkpoint.v2.bundle import TensorBundle
from porting.errors import CheckpointError
from pytorch_model.formats import wire
from pytorch_model.formats.wire import Malformed

GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"  # the end of the key of every variable's value
SLOT = "/.OPTIMIZER_SLOT/"  # in the key of an optimizer slot, between its variable and the slot

#: Attributes with which Keras lists an object's variables a second time. They are skipped: in a SavedModel
#: they would be the shortest paths to the variables.
_BOOKKEEPING = frozenset(
    {"variables", "trainable_variables", "non_trainable_variables", "keras_api", "vars", "signatures"}
)
_MOST_NODES = 1 << 15  # objects of a graph, about 500 bytes each; Lite0's has 1,176
_LONGEST_PATH = 1000  # characters of the attributes that lead to a variable; an EfficientDet's have about 100
_NOTHING = memoryview(b"")


class Node(NamedTuple):
    """One object: its attributes (name → node number), and the key of its value if it is a variable."""

    children: dict[str, int]
    key: str = ""  # in the checkpoint, without VALUE at the end
    full_name: str = ""  # the variable's own name when it was saved: "efficientnet-b0/stem/conv2d/kernel"


class Variable(NamedTuple):
    """A variable of a model. ``key`` and ``full_name`` as in :class:`Node`."""

    key: str
    full_name: str
    shape: tuple[int, ...]


def is_object_based(bundle: TensorBundle) -> bool:
    """Whether ``bundle`` names its variables by objects instead of TensorFlow's variable names."""
    return GRAPH_KEY in bundle or any(key.endswith(VALUE) for key in bundle)


class ObjectTree:
    """The objects of ``bundle``. No values are read. Raises CheckpointError if the graph is damaged."""

    def __init__(self, bundle: TensorBundle) -> None:
        self.bundle = bundle
        self.is_whole = GRAPH_KEY in bundle  # otherwise only objects with variables are known
        try:
            if self.is_whole:
                self.nodes = _parse_graph(bundle.read_string(GRAPH_KEY))
            else:
                self.nodes = _nodes_of_keys(bundle)
        except Malformed as error:
            raise CheckpointError(
                f"the object graph in {bundle.source} is damaged: {error}; fetch the file again"
            ) from None

    def root(self, parts: Collection[str]) -> int | None:
        """The object that has all of ``parts`` as attributes; None if there is none.

        Raises CheckpointError if there are several different ones.
        """
        found = [node for node in self._walk(0) if set(parts) <= self.nodes[node].children.keys()]
        bodies = {self.nodes[node].children[part] for node in found for part in parts}
        if len(bodies) > len(parts):
            raise CheckpointError(f"{self.bundle.source} holds {len(found)} models; save only one of them")
        return found[0] if found else None

    def variables(self, root: int) -> dict[str, Variable]:
        """Path from ``root`` → variable, along the shortest path of attributes."""
        found = {}
        came_from = self._walk(root)
        for node in came_from:
            _, key, full_name = self.nodes[node]
            if key:
                path = self._path(came_from, node)
                if key + VALUE not in self.bundle:
                    raise CheckpointError(
                        f"the object graph in {self.bundle.source} lists {path} as {key}, which the index "
                        "does not hold; fetch the files again"
                    )
                found[path] = Variable(key, full_name, self.bundle.shapes[key + VALUE])
        return found

    def count(self, root: int, part: str) -> int | None:
        """The number of objects in the list ``part`` of ``root``; None if it is not known."""
        child = self.nodes[root].children.get(part)
        return len(self.nodes[child].children) if self.is_whole and child is not None else None

    def _walk(self, start: int) -> dict[int, tuple[int, str]]:
        """Object → (the object that led to it, the attribute), breadth first; the graph may have circles."""
        queue, came_from = deque([start]), {start: (start, "")}
        while queue:
            node = queue.popleft()
            for name, child in self.nodes[node].children.items():
                if child not in came_from and name not in _BOOKKEEPING:
                    came_from[child] = (node, name)
                    queue.append(child)
        return came_from

    def _path(self, came_from: Mapping[int, tuple[int, str]], node: int) -> str:
        """The attributes that lead to ``node`` from the start of :meth:`_walk`."""
        names: list[str] = []
        length = 0
        while came_from[node][0] != node:
            node, name = came_from[node]
            names.append(name)
            length += len(name) + 1
            if length > _LONGEST_PATH:
                raise CheckpointError(
                    f"the object graph in {self.bundle.source} has a variable more than {_LONGEST_PATH} "
                    "characters of attributes deep, which no EfficientDet has; is it the right file?"
                )
        return "/".join(reversed(names))


def _parse_graph(message: bytes) -> list[Node]:
    """A ``TrackableObjectGraph``."""
    nodes: list[Node] = []
    references = 0
    for number, _, value in wire.read_fields(memoryview(message)):
        if number == 1:
            nodes.append(_parse_node(wire.expect_bytes(number, value)))
            references += len(nodes[-1].children)
            if max(len(nodes), references // 4) > _MOST_NODES:
                raise Malformed(f"it holds more than {_MOST_NODES} objects, or references to four times that")
    for node in nodes:
        for name, child in node.children.items():
            if not 0 <= child < len(nodes):
                raise Malformed(f"attribute {shortened(name)!r} is object {child} of {len(nodes)}")
    if not nodes:
        raise Malformed("it holds no object")
    return nodes


def _parse_node(message: memoryview) -> Node:
    children: dict[str, int] = {}
    key = full_name = ""
    for number, _, value in wire.read_fields(message):
        if number == 1:  # ObjectReference: 1 node, 2 attribute
            reference = wire.last_values(wire.expect_bytes(number, value), 1, 2)
            children[_text(2, reference.get(2, _NOTHING))] = wire.expect_int(1, reference.get(1, 0))
        elif number == 2:  # SerializedTensor: 1 kind, 2 the variable's name, 3 key
            attribute = wire.last_values(wire.expect_bytes(number, value), 1, 2, 3)
            if _text(1, attribute.get(1, _NOTHING)) == "VARIABLE_VALUE":
                full_name = _text(2, attribute.get(2, _NOTHING))
                key = _text(3, attribute.get(3, _NOTHING)).removesuffix(VALUE)
    return Node(children, key, full_name)


def _text(number: int, value: int | memoryview) -> str:
    try:
        return str(wire.expect_bytes(number, value), "utf-8")
    except UnicodeDecodeError:
        raise Malformed("a name in it is not UTF-8") from None


def _nodes_of_keys(keys: Iterable[str]) -> list[Node]:
    """The tree in the keys themselves, for a checkpoint without an object graph."""
    nodes = [Node({})]
    for key in keys:
        if not key.endswith(VALUE) or SLOT in key:
            continue
        key, at = key.removesuffix(VALUE), 0
        *parents, leaf = (part.replace(".S", "/").replace("..", ".") for part in key.split("/"))
        for part in parents:
            if part not in nodes[at].children:
                nodes[at].children[part] = len(nodes)
                nodes.append(Node({}))
            at = nodes[at].children[part]
        nodes[at].children[leaf] = len(nodes)
        nodes.append(Node({}, key))
    return nodes
