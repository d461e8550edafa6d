"""Frozen graphs (``efficientdet-d0_frozen.pb``): the network as a ``GraphDef`` with its weights inside.

AutoML's ``model_inspect.py`` freezes with TensorFlow 1's ``convert_variables_to_constants``, which turns each
variable into a constant of the same name. These are the values that the graph computes with: the moving
averages, if the exported checkpoint had them.

Source: TensorFlow ``core/framework/{graph,node_def,attr_value,tensor}.proto``; AutoML ``inference.py``.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from porting.checkpoint import wire
from porting.checkpoint.base import MOST_VARIABLES, Checkpoint
from porting.checkpoint.messages import parse_shape, unreadable
from porting.checkpoint.wire import Malformed
from porting.errors import CheckpointError
from pytorch_model.files import read_bounded

FORMAT = "frozen TensorFlow graph"
SUFFIX = ".pb"

_VARIABLE = re.compile(
    r"(efficientnet-[^/]+|resample_p\d+|fpn_cells|class_net|box_net)/(.+/)?"
    r"(kernel|depthwise_kernel|pointwise_kernel|bias|gamma|beta|moving_mean|moving_variance|WSM(_\d+)?)"
)
_DT_FLOAT = 1
_FROZEN_BY_TF2 = "/ReadVariableOp/resource"
_UNFROZEN = ("VarHandleOp", "VariableV2", "Variable")
_MOST_BYTES = (1 << 31) - 1  # protocol buffers allow no larger message


def is_frozen_graph(head: bytes, path: Path) -> bool:
    """Whether ``path`` is a file with the name of a graph, other than that of a SavedModel's."""
    return path.suffix == SUFFIX and path.name != "saved_model.pb" and os.path.isfile(path)


def open_frozen_graph(path: str | os.PathLike[str], step: int | None = None) -> FrozenGraph:
    """Open the graph at ``path``; a graph has no steps. Raises CheckpointError."""
    if step is not None:
        raise CheckpointError(f"{path} is a frozen graph, which has no step {step}; leave out the step")
    return FrozenGraph(path)


class _Constant(NamedTuple):
    shape: tuple[int, ...]
    content: memoryview | bytearray  # the values, float32 little-endian …
    repeats_last: bool  # … whose last value is repeated until the shape is full


class FrozenGraph(Checkpoint):
    """The weights among the constants of the ``GraphDef`` at ``path``. The file is kept in memory.

    Raises CheckpointError if the file is damaged, or if the graph does not have AutoML's variables.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        try:
            data = memoryview(read_bounded(self._path, _MOST_BYTES))
        except OSError as error:
            raise unreadable(self._path, error) from None
        try:
            self._constants, kinds = _read_graph(data)
        except Malformed as error:
            raise CheckpointError(f"{path} is damaged, or not a frozen graph: {error}") from None
        if not self._constants:
            raise CheckpointError(f"{path} {_why_nothing(kinds)}")
        super().__init__(
            source=str(self._path),
            format=FORMAT,
            shapes={name: constant.shape for name, constant in self._constants.items()},
            dtypes=dict.fromkeys(self._constants, np.dtype(np.float32)),
        )

    def _read(self, name: str) -> np.ndarray:
        constant = self._constants[name]
        values = np.frombuffer(constant.content, "<f4")
        array = np.zeros(constant.shape, np.float32)
        flat = array.reshape(-1)
        flat[: values.size] = values
        if constant.repeats_last and values.size:
            flat[values.size :] = values[-1]
        return array


def _why_nothing(kinds: Counter[str]) -> str:
    if kinds[_FROZEN_BY_TF2]:
        return (
            "was frozen by TensorFlow 2, which names constants after operations and not after variables; "
            "give the SavedModel folder that AutoML exports with it"
        )
    if any(kinds[op] for op in _UNFROZEN):
        return "is a graph whose variables are not in it; give the checkpoint that belongs to it"
    return (
        "is a graph without AutoML's variables: no constant in it has a name like "
        "efficientnet-…/stem/conv2d/kernel; give the checkpoint or the SavedModel instead"
    )


def _read_graph(data: memoryview) -> tuple[dict[str, _Constant], Counter[str]]:
    """The variables among a ``GraphDef``'s constants, and counts of operations for error messages."""
    constants: dict[str, _Constant] = {}
    kinds: Counter[str] = Counter()
    for number, wire_type, value in wire.read_fields(data):
        if number != 1:
            continue
        if wire_type != wire.BYTES:
            raise Malformed("it is the saved_model.pb of a SavedModel, renamed; give its folder")
        name, op, tensor = _read_node(wire.expect_bytes(number, value))
        if op in _UNFROZEN:
            kinds[op] += 1
        kinds[_FROZEN_BY_TF2] += name.endswith(_FROZEN_BY_TF2)
        if op == "Const" and _VARIABLE.fullmatch(name):
            if name in constants:
                raise Malformed(f"the constant {name} is in it twice")
            constants[name] = _read_tensor(name, tensor, len(data))
            if len(constants) > MOST_VARIABLES:
                raise Malformed(f"it has more than {MOST_VARIABLES} constants, which no EfficientDet has")
    return constants, kinds


def _read_node(message: memoryview) -> tuple[str, str, memoryview]:
    """(name, operation, the ``TensorProto`` of the attribute ``value``) of a ``NodeDef``."""
    name = op = b""
    tensor = nothing = memoryview(b"")
    for number, _, value in wire.read_fields(message):
        if number == 1:
            name = bytes(wire.expect_bytes(number, value))
        elif number == 2:
            op = bytes(wire.expect_bytes(number, value))
        elif number == 5:
            entry = wire.last_values(wire.expect_bytes(number, value), 1, 2)
            if bytes(wire.expect_bytes(1, entry.get(1, nothing))) == b"value":
                attribute = wire.last_values(wire.expect_bytes(2, entry.get(2, nothing)), 8)
                tensor = wire.expect_bytes(8, attribute.get(8, nothing))
    try:
        return name.decode(), op.decode(), tensor
    except UnicodeDecodeError:
        raise Malformed("the name of a node is not UTF-8") from None


def _read_tensor(name: str, message: memoryview, most_bytes: int) -> _Constant:
    """A float32 ``TensorProto``: raw bytes, or a list of values of which the last is repeated."""
    dtype, listed = 0, bytearray()
    shape: tuple[int, ...] = ()
    raw: memoryview | None = None
    for number, wire_type, value in wire.read_fields(message):
        if number == 1:
            dtype = wire.expect_int(number, value)
        elif number == 2:
            shape = _read_shape(name, wire.expect_bytes(number, value))
        elif number == 4:
            raw = wire.expect_bytes(number, value)
        elif number == 5 and wire_type == wire.FIXED32:
            listed += wire.expect_int(number, value).to_bytes(4, "little")
        elif number == 5:
            listed += wire.expect_bytes(number, value)
    size = 4 * math.prod(shape)
    if dtype != _DT_FLOAT:
        raise Malformed(f"the constant {name} is of type number {dtype}, but weights are float32")
    if size > most_bytes:
        raise Malformed(f"the constant {name} claims {size} bytes, more than the file has")
    content = listed if raw is None else raw
    if len(content) % 4 or len(content) > size or (raw is not None and len(raw) != size):
        raise Malformed(f"the constant {name} of shape {list(shape)} holds {len(content)} bytes")
    return _Constant(shape, content, raw is None)


def _read_shape(name: str, message: memoryview) -> tuple[int, ...]:
    try:
        return parse_shape(message)
    except Malformed as error:
        raise Malformed(f"the constant {name} has an impossible shape: {error}") from None
