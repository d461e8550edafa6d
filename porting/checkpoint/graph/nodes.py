"""A ``GraphDef`` as a list of nodes, also those inside its functions, read without TensorFlow.

Source: TensorFlow ``core/framework/{graph,function,node_def,attr_value,tensor}.proto`` and
``core/protobuf/{meta_graph,saved_model}.proto``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from porting.checkpoint.messages import parse_shape
from pytorch_model.formats import wire
from pytorch_model.formats.wire import Malformed

DT_FLOAT = 1

_MOST_NODES = 1 << 19  # D7x, exported with TensorFlow 2, has about 30,000

# types.proto DataType → (dtype, the field of a TensorProto that lists values of this type)
_DTYPES: dict[int, tuple[np.dtype, int]] = {
    DT_FLOAT: (np.dtype("<f4"), 5),
    2: (np.dtype("<f8"), 6),
    3: (np.dtype("<i4"), 7),
    9: (np.dtype("<i8"), 10),
}
_NOTHING = memoryview(b"")


class Constant(NamedTuple):
    """A constant's values, not yet as an array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    content: memoryview | bytearray  # little-endian …
    repeats_last: bool  # … whose last value is repeated until the shape is full

    def array(self) -> np.ndarray:
        values = np.frombuffer(self.content, self.dtype)
        array = np.zeros(self.shape, self.dtype)
        flat = array.reshape(-1)
        flat[: values.size] = values
        if self.repeats_last and values.size:
            flat[values.size :] = values[-1]
        return array


@dataclass(frozen=True, slots=True)
class GraphNode:
    """A ``NodeDef``. ``function``: the library function that it is in, empty for the graph itself.

    ``inputs`` are names of nodes of the same function, without output numbers and control inputs.
    ``tensor``: the ``TensorProto`` of the attribute ``value``, empty without one.
    """

    function: str
    name: str
    op: str
    inputs: tuple[str, ...]
    tensor: memoryview

    def constant(self) -> Constant:
        """The value of a ``Const``. Raises :class:`Malformed` if it is damaged or of another type."""
        return _read_tensor(self.name, self.tensor)


def read_graph_def(data: memoryview) -> Iterator[GraphNode]:
    """The nodes of a ``GraphDef``, then those of its functions. Raises :class:`Malformed`."""
    for count, (function, message) in enumerate(_node_messages(data)):
        if count >= _MOST_NODES:
            raise Malformed(f"it has more than {_MOST_NODES} nodes, which no EfficientDet has")
        yield _read_node(function, message)


def graph_of_meta(data: memoryview) -> memoryview:
    """The ``GraphDef`` in a ``MetaGraphDef``; empty if there is none. Raises :class:`Malformed`."""
    found = wire.last_values(data, 2)
    return wire.expect_bytes(2, found.get(2, _NOTHING))


def graphs_of_saved_model(data: memoryview) -> list[memoryview]:
    """The ``GraphDef`` of each ``MetaGraphDef`` in a ``SavedModel``. Raises :class:`Malformed`."""
    fields = wire.read_fields(data)
    return [graph_of_meta(wire.expect_bytes(2, value)) for number, _, value in fields if number == 2]


def _node_messages(data: memoryview) -> Iterator[tuple[str, memoryview]]:
    """(name of the function, ``NodeDef``)."""
    libraries = []
    for number, wire_type, value in wire.read_fields(data):
        if number == 1:
            if wire_type != wire.BYTES:
                raise Malformed("it is the saved_model.pb of a SavedModel, renamed; give its folder")
            yield "", wire.expect_bytes(number, value)
        elif number == 2:
            libraries.append(wire.expect_bytes(number, value))
    for library in libraries:
        for number, _, value in wire.read_fields(library):
            if number == 1:
                yield from _function_nodes(wire.expect_bytes(number, value))


def _function_nodes(message: memoryview) -> Iterator[tuple[str, memoryview]]:
    signature = wire.expect_bytes(1, wire.last_values(message, 1).get(1, _NOTHING))
    name = _text(wire.expect_bytes(1, wire.last_values(signature, 1).get(1, _NOTHING))) or "?"
    for number, _, value in wire.read_fields(message):
        if number == 3:
            yield name, wire.expect_bytes(number, value)


def _read_node(function: str, message: memoryview) -> GraphNode:
    name = op = tensor = _NOTHING
    inputs = []
    for number, _, value in wire.read_fields(message):
        if number == 1:
            name = wire.expect_bytes(number, value)
        elif number == 2:
            op = wire.expect_bytes(number, value)
        elif number == 3:
            inputs.append(_text(wire.expect_bytes(number, value)))
        elif number == 5:
            entry = wire.last_values(wire.expect_bytes(number, value), 1, 2)
            if bytes(wire.expect_bytes(1, entry.get(1, _NOTHING))) == b"value":
                attribute = wire.last_values(wire.expect_bytes(2, entry.get(2, _NOTHING)), 8)
                tensor = wire.expect_bytes(8, attribute.get(8, _NOTHING))
    read = tuple(text.partition(":")[0] for text in inputs if not text.startswith("^"))
    return GraphNode(function, _text(name), _text(op), read, tensor)


def _text(data: memoryview) -> str:
    try:
        return bytes(data).decode()
    except UnicodeDecodeError:
        raise Malformed("the name of a node is not UTF-8") from None


def _read_tensor(name: str, message: memoryview) -> Constant:
    """A ``TensorProto``: raw bytes, or a list of values of which the last is repeated."""
    kind = wire.expect_int(1, wire.last_values(message, 1).get(1, 0))
    if kind not in _DTYPES:
        raise Malformed(f"the constant {name} is of type number {kind}, which is not a plain number")
    dtype, list_field = _DTYPES[kind]
    shape: tuple[int, ...] = ()
    listed = bytearray()
    raw: memoryview | None = None
    for number, wire_type, value in wire.read_fields(message):
        if number == 2:
            shape = _read_shape(name, wire.expect_bytes(number, value))
        elif number == 4:
            raw = wire.expect_bytes(number, value)
        elif number == list_field:
            listed += _listed(dtype, wire_type, value)
    size = dtype.itemsize * math.prod(shape)
    content = listed if raw is None else raw
    if len(content) % dtype.itemsize or len(content) > size or (raw is not None and len(raw) != size):
        raise Malformed(f"the constant {name} of shape {list(shape)} holds {len(content)} bytes")
    return Constant(dtype, shape, content, raw is None)


def _listed(dtype: np.dtype, wire_type: int, value: int | memoryview) -> bytes:
    """One entry of a list of values, or a packed list, as little-endian bytes."""
    if dtype.kind == "f":
        return value.to_bytes(dtype.itemsize, "little") if isinstance(value, int) else bytes(value)
    numbers = [value] if isinstance(value, int) else _varints(value)
    return np.array([wire.expect_int(0, n) for n in numbers], np.int64).astype(dtype).tobytes()


def _varints(data: memoryview) -> list[int]:
    numbers, position = [], 0
    while position < len(data):
        number, position = wire.read_varint(data, position)
        numbers.append(number)
    return numbers


def _read_shape(name: str, message: memoryview) -> tuple[int, ...]:
    try:
        return parse_shape(message)
    except Malformed as error:
        raise Malformed(f"the constant {name} has an impossible shape: {error}") from None
