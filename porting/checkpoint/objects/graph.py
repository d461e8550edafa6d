"""TensorFlow 2 object-based checkpoints (``ckpt-N``): the objects that owned the variables, and their slots.

Such a checkpoint names a variable by the attributes that lead to it (``backbone/_stem/_bn/gamma``), and holds
the whole graph of objects as a string. Which AutoML variable an object's is, the readers of the two known
trees say: :mod:`.keras_tree` (AutoML's own) and :mod:`.odapi`.

Source: TensorFlow ``core/protobuf/trackable_object_graph.proto`` and ``python/checkpoint/``.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from porting.checkpoint import wire
from porting.checkpoint.base import STEP_VARIABLE, Checkpoint
from porting.checkpoint.renamed import Renamed, Source
from porting.checkpoint.v2.bundle import TensorBundle
from porting.checkpoint.wire import Malformed
from porting.errors import CheckpointError
from porting.scopes import EMA_SUFFIX

GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
FORMAT = "TensorFlow 2 object-based checkpoint"

_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
_SLOT = "/.OPTIMIZER_SLOT/"
_AVERAGE = "average"  # tfa MovingAverage's slot

#: A slot's name in TensorFlow 2 → the suffix of the same thing in a name-based checkpoint.
_SLOT_SUFFIXES = {"momentum": "/Momentum", "m": "/Adam", "v": "/Adam_1", "rms": "/RMSProp"}

#: Where Keras lists an object's variables once more; in a SavedModel these are the shortest paths to them.
_BOOKKEEPING = frozenset(
    {"variables", "trainable_variables", "non_trainable_variables", "keras_api", "vars", "signatures"}
)
#: Attributes of a model, or of the checkpoint around it, that hold the state of training.
_TRAINING = frozenset(
    {"optimizer", "_optimizer", "save_counter", "step", "epoch", "global_step", "keras_api", "metrics"}
)
_MOST_NODES = 1 << 15  # objects of a graph; Lite0's has 1,176. Each takes some 500 bytes
_LONGEST_PATH = 1000  # characters of the attributes that lead to a variable; an EfficientDet's have about 100
_NOTHING = memoryview(b"")
_STEP_KEY = re.compile(r"(.*/)?\w*optimizer/(iter|_iterations)|step|global_step")


class Node(NamedTuple):
    """One object: its attributes (name → node), and where its value lies if it is a variable."""

    children: dict[str, int]
    key: str = ""  # of the checkpoint, without the ending that all variables' keys share
    full_name: str = ""  # the variable's own name when it was saved: "efficientnet-b0/stem/conv2d/kernel"


class Variable(NamedTuple):
    key: str
    full_name: str
    shape: tuple[int, ...]


class Piece(NamedTuple):
    """What an AutoML variable is made of: the variable at ``path``, or ``take`` of it, of ``shape``."""

    path: str
    take: Callable[[np.ndarray], np.ndarray] | None = None
    shape: tuple[int, ...] = ()


def is_object_based(bundle: TensorBundle) -> bool:
    return GRAPH_KEY in bundle or any(key.endswith(_VALUE) for key in bundle)


def open_object_checkpoint(bundle: TensorBundle) -> Checkpoint:
    """The AutoML variables of an object-based checkpoint, with moving averages and optimizer slots.

    Raises CheckpointError if it holds neither AutoML's Keras EfficientDet nor the Object Detection API's, or
    one that cannot be told apart or ported exactly, with the reason.
    """
    from porting.checkpoint.objects import automl_keras as keras_tree
    from porting.checkpoint.objects import detection_api as odapi

    tree = ObjectTree(bundle)
    for reader in (keras_tree, odapi):
        root = tree.root(reader.PARTS)
        if root is not None:
            return reader.read(tree, root)
    hub = tree.root(keras_tree.HUB_PARTS)
    if hub is not None:
        return keras_tree.read_hub(tree, hub)
    parts = ", ".join(_shown(name) for name in list(tree.nodes[0].children)[:8]) or "no attributes"
    raise CheckpointError(
        f"{bundle.source} is an object-based checkpoint, but no EfficientDet's: nothing in it has the parts "
        f"{', '.join(keras_tree.PARTS)}; at its top are {parts}"
    )


class ObjectTree:
    """The objects of ``bundle``, whose data are not read. Raises CheckpointError if the graph is damaged."""

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
        """The one object that has all of ``parts`` as attributes; None without one."""
        found = [node for node in self._walk(0) if set(parts) <= self.nodes[node].children.keys()]
        bodies = {self.nodes[node].children[part] for node in found for part in parts}
        if len(bodies) > len(parts):
            raise CheckpointError(f"{self.bundle.source} holds {len(found)} models; save one of them alone")
        return found[0] if found else None

    def variables(self, root: int) -> dict[str, Variable]:
        """Path from ``root`` → variable, along the shortest path of attributes."""
        found = {}
        came_from = self._walk(root)
        for node in came_from:
            _, key, full_name = self.nodes[node]
            if key:
                path = self._path(came_from, node)
                if key + _VALUE not in self.bundle:
                    raise CheckpointError(
                        f"the object graph in {self.bundle.source} lists {path} as {key}, which the index "
                        "does not hold; fetch the files again"
                    )
                found[path] = Variable(key, full_name, self.bundle.shapes[key + _VALUE])
        return found

    def count(self, root: int, part: str) -> int | None:
        """How many objects the list ``part`` of ``root`` holds; None where that is not known."""
        child = self.nodes[root].children.get(part)
        return len(self.nodes[child].children) if self.is_whole and child is not None else None

    def _walk(self, start: int) -> dict[int, tuple[int, str]]:
        """Every object once, breadth first: which one led to it, by what name; they may lead in circles."""
        queue, came_from = deque([start]), {start: (start, "")}
        while queue:
            node = queue.popleft()
            for name, child in self.nodes[node].children.items():
                if child not in came_from and name not in _BOOKKEEPING:
                    came_from[child] = (node, name)
                    queue.append(child)
        return came_from

    def _path(self, came_from: Mapping[int, tuple[int, str]], node: int) -> str:
        """The attributes that lead to ``node``, where :meth:`_walk` began."""
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
                raise Malformed(f"attribute {_shown(name)!r} is object {child} of {len(nodes)}")
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
                key = _text(3, attribute.get(3, _NOTHING)).removesuffix(_VALUE)
    return Node(children, key, full_name)


def _shown(name: str) -> str:
    return name if len(name) <= 100 else f"{name[:100]}…"


def _text(number: int, value: int | memoryview) -> str:
    try:
        return str(wire.expect_bytes(number, value), "utf-8")
    except UnicodeDecodeError:
        raise Malformed("a name in it is not UTF-8") from None


def _nodes_of_keys(keys: Iterable[str]) -> list[Node]:
    """The tree that the keys themselves spell out, for a checkpoint without its graph."""
    nodes = [Node({})]
    for key in keys:
        if not key.endswith(_VALUE) or _SLOT in key:
            continue
        key, at = key.removesuffix(_VALUE), 0
        *parents, leaf = (part.replace(".S", "/").replace("..", ".") for part in key.split("/"))
        for part in parents:
            if part not in nodes[at].children:
                nodes[at].children[part] = len(nodes)
                nodes.append(Node({}))
            at = nodes[at].children[part]
        nodes[at].children[leaf] = len(nodes)
        nodes.append(Node({}, key))
    return nodes


def assemble(
    tree: ObjectTree,
    variables: Mapping[str, Variable],
    pieces: Mapping[str, Piece],
    format: str,
    notes: Iterable[str] = (),
    stale_statistics: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """The checkpoint whose variables are ``pieces`` (AutoML name → what it is made of).

    ``settings``: what the source tells of the configuration, as :class:`Checkpoint` keeps it.
    ``stale_statistics``: averages of batch-norm statistics are never updated and must not be used. Slots
    follow their variable, under AutoML's suffixes. What belongs to the model but is nobody's piece keeps its
    path for a name, so that conversion refuses it; what belongs to training is left out and counted in the
    notes.
    """
    bundle = tree.bundle
    slots, unknown_slots = _slots(bundle, variables.values())
    sources: dict[str, Source] = {}
    for name, piece in pieces.items():
        variable = variables[piece.path]
        sources[name] = Source(variable.key + _VALUE, piece.take, piece.shape)
        for slot, key in slots[variable.key].items():
            if slot != _AVERAGE:
                sources[name + _SLOT_SUFFIXES[slot]] = Source(key, piece.take, piece.shape)
    averages, about_averages = _averages(variables, pieces, slots, stale_statistics)
    sources.update(averages)
    used = {variables[piece.path].key for piece in pieces.values()}
    for path, variable in variables.items():
        if variable.key not in used and path.split("/")[0] not in _TRAINING:
            sources[path] = Source(variable.key + _VALUE)
            used.add(variable.key)
    left = [key for key in bundle if key.endswith(_VALUE) and _SLOT not in key]
    left = [key for key in left if key.removesuffix(_VALUE) not in used]
    step = next((key for key in left if _is_step(bundle, key)), None)
    if step:
        sources[STEP_VARIABLE] = Source(step)
        left.remove(step)
    about = [*notes, *about_averages, *_about_left_out(left, unknown_slots)]
    return Renamed(bundle, sources, format, about, settings)


def _slots(
    bundle: TensorBundle, variables: Iterable[Variable]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Key of a variable → slot → key of the slot variable; and the keys of slots of a kind not known.

    Raises CheckpointError for a known slot that has not its variable's shape.
    """
    shapes = {variable.key: variable.shape for variable in variables}
    slots: dict[str, dict[str, str]] = defaultdict(dict)
    unknown = []
    for key in bundle:
        if _SLOT not in key or not key.endswith(_VALUE):
            continue
        variable, _, slot = key.removesuffix(_VALUE).partition(_SLOT)
        slot = slot.rsplit("/", 1)[-1]
        if slot not in _SLOT_SUFFIXES and slot != _AVERAGE:
            unknown.append(key)
        elif bundle.shapes[key] != shapes.get(variable, bundle.shapes[key]):
            raise CheckpointError(
                f"{bundle.source} holds {variable} of shape {list(shapes[variable])}, but its {slot} of "
                f"shape {list(bundle.shapes[key])}; this checkpoint mixes two models"
            )
        else:
            slots[variable][slot] = key
    return slots, unknown


def _averages(
    variables: Mapping[str, Variable],
    pieces: Mapping[str, Piece],
    slots: Mapping[str, Mapping[str, str]],
    stale_statistics: bool,
) -> tuple[dict[str, Source], list[str]]:
    """The moving averages, and what to say about them.

    Optimizers that average do so for what they update and nothing else. AutoML's ``emackpt`` pairs these
    averages with the batch-norm statistics and frozen weights as they are, so those are their own averages.
    """
    sources: dict[str, Source] = {}
    if not any(_AVERAGE in slots.get(variable.key, {}) for variable in variables.values()):
        return sources, []
    own = {"batch-norm statistics": 0, "weights that the optimizer never touched": 0}
    stale = 0
    for name, (path, take, shape) in pieces.items():
        key, its_slots = variables[path].key, slots.get(variables[path].key, {})
        is_statistic = name.endswith(("/moving_mean", "/moving_variance"))
        if _AVERAGE in its_slots and not (is_statistic and stale_statistics):
            sources[name + EMA_SUFFIX] = Source(its_slots[_AVERAGE], take, shape)
            continue
        if is_statistic:
            own["batch-norm statistics"] += 1
            stale += _AVERAGE in its_slots
        elif not its_slots:
            own["weights that the optimizer never touched"] += 1
        else:
            continue  # trained without being averaged: conversion says so
        sources[name + EMA_SUFFIX] = Source(key + _VALUE, take, shape)
    kinds = " and ".join(f"{count} {what}" for what, count in own.items() if count)
    notes = []
    if kinds:
        notes.append(f"the optimizer does not average {kinds}: they stand for their own averages")
    if stale:
        notes.append(
            f"{stale} averages of batch-norm statistics were left out: training does not update them"
        )
    return sources, notes


def _is_step(bundle: TensorBundle, key: str) -> bool:
    return bool(
        _STEP_KEY.fullmatch(key.removesuffix(_VALUE))
        and bundle.shapes[key] == ()
        and np.issubdtype(bundle.dtypes[key], np.integer)
    )


def _about_left_out(left: list[str], unknown_slots: list[str]) -> Iterator[str]:
    """What was left out, in sentences."""
    training = [key for key in left if _TRAINING & set(key.split("/"))]
    others = [key for key in left if key not in set(training)]
    for keys, what in (
        (training, "of the training loop"),
        (unknown_slots, "of the optimizer, of a kind not known,"),
        (others, "outside the detector"),
    ):
        if keys:
            names = ", ".join(key.removesuffix(_VALUE) for key in keys[:3]) + ("…" if len(keys) > 3 else "")
            yield f"left out {len(keys)} variable{'s' if len(keys) > 1 else ''} {what} ({names})"
