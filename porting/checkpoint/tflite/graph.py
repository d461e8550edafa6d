"""A TFLite file as a graph: tensors and the operators between them, in execution order.

Source: TensorFlow ``tensorflow/compiler/mlir/lite/schema/schema.fbs``; field numbers below are its order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from porting.checkpoint.tflite.flatbuffer import Table
from pytorch_model.formats.wire import Malformed

IDENTIFIER = b"TFL3"  # bytes 4…7 of every TFLite file

# schema.fbs TensorType → the dtype of a constant in the file
_DTYPES: dict[int, np.dtype] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f2"),
    2: np.dtype("<i4"),
    3: np.dtype("u1"),
    4: np.dtype("<i8"),
    7: np.dtype("<i2"),
    9: np.dtype("i1"),
}

# schema.fbs BuiltinOperator: those in an EfficientDet, and some that occur in other networks
_BUILTIN = {
    0: "ADD",
    1: "AVERAGE_POOL_2D",
    2: "CONCATENATION",
    3: "CONV_2D",
    4: "DEPTHWISE_CONV_2D",
    6: "DEQUANTIZE",
    9: "FULLY_CONNECTED",
    14: "LOGISTIC",
    17: "MAX_POOL_2D",
    18: "MUL",
    21: "RELU6",
    22: "RESHAPE",
    23: "RESIZE_BILINEAR",
    25: "SOFTMAX",
    34: "PAD",
    36: "GATHER",
    40: "MEAN",
    41: "SUB",
    42: "DIV",
    43: "SQUEEZE",
    45: "STRIDED_SLICE",
    47: "EXP",
    48: "TOPK_V2",
    53: "CAST",
    56: "ARG_MAX",
    82: "REDUCE_MAX",
    83: "PACK",
    88: "UNPACK",
    97: "RESIZE_NEAREST_NEIGHBOR",
    106: "ADD_N",
    114: "QUANTIZE",
    117: "HARD_SWISH",
}
_CUSTOM = 32

# Lite4 has about 700 operators. The bounds limit what a damaged length can cost.
_MOST_OPERATORS = 4096
_MOST_TENSORS = 16384
_MOST_INPUTS = 64
_MOST_DIMENSIONS = 8


@dataclass(frozen=True, eq=False)
class Tensor:
    """An activation, or a constant with its bytes.

    ``scale`` and ``zero_point`` have one value per channel of ``axis``, or one for the whole tensor, or none
    if the tensor is not quantised.
    """

    index: int
    shape: tuple[int, ...]
    type: int  # schema.fbs TensorType
    buffer: int
    data: np.ndarray = field(repr=False)  # uint8 [bytes], empty for an activation
    scale: np.ndarray  # float32 [n]
    zero_point: np.ndarray  # int64 [n]
    axis: int

    @property
    def is_constant(self) -> bool:
        return len(self.data) > 0

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype of the stored values; None for a type that does not occur in an EfficientDet."""
        return _DTYPES.get(self.type)

    @property
    def is_quantized(self) -> bool:
        return len(self.scale) > 0

    def stored(self) -> np.ndarray:
        """The constant as stored, a read-only view of ``shape``. Raises :class:`Malformed`."""
        dtype = self.dtype
        if dtype is None:
            raise Malformed(f"tensor {self.index} is of type number {self.type}, which cannot be read")
        if len(self.data) != math.prod(self.shape) * dtype.itemsize:
            raise Malformed(
                f"tensor {self.index} ({dtype} of shape {list(self.shape)}) has {len(self.data)} bytes"
            )
        return self.data.view(dtype).reshape(self.shape)

    def values(self) -> np.ndarray:
        """The constant's real values, float64: scale · (stored − zero point) if it is quantised."""
        stored = self.stored()
        if not self.is_quantized:
            return stored.astype(np.float64)
        scale, zero_point = self.along_axis(self.scale), self.along_axis(self.zero_point)
        return (stored.astype(np.float64) - zero_point) * scale

    def along_axis(self, per_channel: np.ndarray) -> np.ndarray:
        """``per_channel`` ([channels] or [1]) as float64, shaped to broadcast against the tensor."""
        if len(per_channel) == 1:
            return per_channel.astype(np.float64)
        shape = [1] * len(self.shape)
        shape[self.axis] = len(per_channel)
        return per_channel.astype(np.float64).reshape(shape)


@dataclass(frozen=True, eq=False)
class Operator:
    """One operation. ``kind`` is schema.fbs's name, or the name of a custom operator. Input −1: left out."""

    index: int
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Table | None
    custom_options: np.ndarray = field(repr=False)  # uint8 [bytes]

    def __str__(self) -> str:
        return f"operator {self.index} ({self.kind})"

    def option(self, number: int, code: str, default: int = 0) -> int:
        """Field ``number`` of the operator's options; ``code`` as for :meth:`Table.number`."""
        return default if self.options is None else self.options.number(number, code, default)


@dataclass(frozen=True, eq=False)
class Graph:
    """A whole file. ``unused``: the number of bytes of constants that no operator reads; normally 0."""

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    unused: int


def read_graph(data: bytes) -> Graph:
    """The graph in the bytes of a TFLite file. Constants are views of ``data``.

    Raises :class:`Malformed` if the bytes break the format. In the returned graph the operators are in
    execution order: each reads only tensors that were written before.
    """
    if data[4:8] != IDENTIFIER:
        raise Malformed("it does not begin like a TFLite file")
    model = Table.root(data)
    if model.number(0, "I") != 3:
        raise Malformed(f"it is of version {model.number(0, 'I')} of the format, not 3")
    subgraphs = model.tables(2, 64)
    if len(subgraphs) != 1:
        raise Malformed(f"it holds {len(subgraphs)} graphs, not one")
    buffers = [_buffer(table) for table in model.tables(4, _MOST_TENSORS)]
    kinds = [_kind(table) for table in model.tables(1, 1024)]
    graph = subgraphs[0]
    tensors = tuple(_tensor(i, table, buffers) for i, table in enumerate(graph.tables(0, _MOST_TENSORS)))
    operators = tuple(
        _operator(i, table, kinds, len(tensors)) for i, table in enumerate(graph.tables(3, _MOST_OPERATORS))
    )
    inputs = _indices(graph, 1, len(tensors), "the graph's inputs")
    outputs = _indices(graph, 2, len(tensors), "the graph's outputs")
    _check_order(tensors, operators, inputs)
    read = {tensors[i].buffer for operator in operators for i in operator.inputs if i >= 0}
    read.update(table.number(1, "I") for table in model.tables(6, _MOST_TENSORS))  # metadata
    unused = sum(len(buffer) for i, buffer in enumerate(buffers) if i not in read)
    return Graph(tensors, operators, inputs, outputs, unused)


def _buffer(table: Table) -> np.ndarray:
    if table.number(1, "Q") > 1:
        raise Malformed("its weights are stored after the FlatBuffer, as in models above 2 GB")
    return table.array(0, np.dtype("u1"))


def _kind(table: Table) -> str:
    # Old files have the code in one byte, new ones in an additional int32.
    code = max(table.number(0, "b"), table.number(3, "i"))
    if code == _CUSTOM:
        return "".join(c if c.isprintable() else "?" for c in table.text(1))
    return _BUILTIN.get(code, f"operator code {code}")


def _tensor(index: int, table: Table, buffers: list[np.ndarray]) -> Tensor:
    dimensions = table.array(0, np.dtype("<i4"))
    if len(dimensions) > _MOST_DIMENSIONS or (len(dimensions) and dimensions.min() < 0):
        raise Malformed(f"tensor {index} has an impossible shape")
    buffer = table.number(2, "I")
    if buffer >= len(buffers):
        raise Malformed(f"tensor {index} is in buffer {buffer} of {len(buffers)}")
    if table.has(6):
        raise Malformed(f"tensor {index} is sparse, which is not supported")
    shape = tuple(int(n) for n in dimensions)
    scale, zero_point, axis = _quantization(index, shape, table.table(4))
    return Tensor(index, shape, table.number(1, "b"), buffer, buffers[buffer], scale, zero_point, axis)


def _quantization(
    index: int, shape: tuple[int, ...], table: Table | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """(scale, zero point, axis); empty if the tensor is not quantised."""
    nothing = np.empty(0, np.float32), np.empty(0, np.int64), 0
    if table is None:
        return nothing
    scale, zero_point = table.array(2, np.dtype("<f4")), table.array(3, np.dtype("<i8"))
    axis = table.number(6, "i")
    if not len(scale):
        return nothing
    if len(zero_point) != len(scale) or (
        len(scale) > 1 and not (0 <= axis < len(shape) and shape[axis] == len(scale))
    ):
        raise Malformed(f"tensor {index} of shape {list(shape)} has {len(scale)} scales along axis {axis}")
    if not (np.isfinite(scale).all() and scale.min() > 0):
        raise Malformed(f"tensor {index} has a quantisation scale that is not positive")
    return scale, zero_point, axis


def _operator(index: int, table: Table, kinds: list[str], tensors: int) -> Operator:
    opcode = table.number(0, "I")
    if opcode >= len(kinds):
        raise Malformed(f"operator {index} is of kind {opcode} of {len(kinds)}")
    where = f"operator {index} ({kinds[opcode]})"
    return Operator(
        index,
        kinds[opcode],
        _indices(table, 1, tensors, f"the inputs of {where}", lowest=-1),
        _indices(table, 2, tensors, f"the outputs of {where}"),
        table.table(4),
        table.array(5, np.dtype("u1")),
    )


def _indices(table: Table, field: int, tensors: int, what: str, lowest: int = 0) -> tuple[int, ...]:
    """A vector of tensor numbers."""
    found = table.array(field, np.dtype("<i4"))
    if len(found) > _MOST_INPUTS or (len(found) and not (lowest <= found.min() <= found.max() < tensors)):
        raise Malformed(f"{what} are not among its tensors")
    return tuple(int(i) for i in found)


def _check_order(tensors: tuple[Tensor, ...], operators: Iterable[Operator], inputs: tuple[int, ...]) -> None:
    """Check that each tensor is written once, before it is read. So following the operators always ends."""
    ready = {tensor.index for tensor in tensors if tensor.is_constant} | {-1}
    if not ready.isdisjoint(inputs):
        raise Malformed("one of the graph's inputs is a constant")
    ready.update(inputs)
    for operator in operators:
        if not ready.issuperset(operator.inputs):
            raise Malformed(f"{operator} reads a tensor that nothing has written")
        if not ready.isdisjoint(operator.outputs):
            raise Malformed(f"{operator} writes a tensor a second time")
        ready.update(operator.outputs)
