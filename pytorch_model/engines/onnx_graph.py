"""The folded network as an ONNX graph. Needs the package onnx, and neither torch.onnx nor a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from pytorch_model.config import EfficientDetConfig
from pytorch_model.engines.inference import Feature, network
from pytorch_model.engines.weights import FoldedWeights
from pytorch_model.layers import same_padding

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import Tensor

OPSET = 18  # ReduceMean with axes as an input, Mish, Resize with an anti-alias flag
IR_VERSION = 8  # the first that OPSET allows; readable by ONNX Runtime from 1.14

Value = Feature[str]


class OnnxOps:
    """Adds a node for each operation. The values are the names of the nodes' outputs.

    A layer's output has the layer's name in the state dict, as far as it is one value; what is computed from
    it without a layer has a suffix. A name that is taken gets a number: the heads share layers.
    """

    def __init__(self, weights: FoldedWeights) -> None:
        self.nodes: list = []
        self.initializers: dict[str, object] = {}
        self._weights = weights
        self._uses: Counter[str] = Counter()

    def conv(
        self,
        x: Value,
        conv: str,
        bn: str | None = None,
        *,
        filters: int,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        act: str | None = None,
    ) -> Value:
        weight, bias = self._weights.conv(conv, bn)
        names = [x.value, self._tensor(f"{bn or conv}.folded" if bn else f"{conv}.weight", weight)]
        if bias is not None:
            names.append(self._tensor(f"{bn or conv}.bias", bias))
        pads = [same_padding(side, kernel, stride) for side in x.size]
        value = self._node(
            "Conv",
            names,
            bn or conv,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            pads=[pads[0][0], pads[1][0], pads[0][1], pads[1][1]],
            group=filters if depthwise else 1,
        )
        size = (-(-x.size[0] // stride), -(-x.size[1] // stride))
        out = Feature(value, filters, size)
        return self.act(out, act) if act else out

    def act(self, x: Value, act: str) -> Value:
        name = f"{x.value}.act"
        if act in ("swish", "silu", "swish_native"):
            sigmoid = self._node("Sigmoid", [x.value], f"{x.value}.sigmoid")
            value = self._node("Mul", [x.value, sigmoid], name)
        elif act == "relu6":
            limits = [self._number("zero", 0.0), self._number("six", 6.0)]
            value = self._node("Clip", [x.value, *limits], name)
        else:
            value = self._node({"relu": "Relu", "hswish": "HardSwish", "mish": "Mish"}[act], [x.value], name)
        return Feature(value, x.channels, x.size)

    def gate(self, x: Value, se: str, filters: int, act: str) -> Value:
        # One axis after the other: ONNX Runtime adds a whole map up one by one, which loses two more digits.
        value = x.value
        for axis in (3, 2):
            axes = self._array(f"axis_{axis}", np.array([axis]))
            value = self._node("ReduceMean", [value, axes], f"{se}.mean_{axis}", keepdims=1)
        mean = Feature(value, x.channels, (1, 1))
        inner = self.conv(mean, f"{se}.reduce", filters=filters, act=act)
        outer = self.conv(inner, f"{se}.expand", filters=x.channels)
        gate = self._node("Sigmoid", [outer.value], f"{se}.gate")
        return Feature(self._node("Mul", [x.value, gate], se), x.channels, x.size)

    def add(self, x: Value, y: Value) -> Value:
        return Feature(self._node("Add", [x.value, y.value], f"{x.value}.add"), x.channels, x.size)

    def fuse(self, inputs: list[Value], weights: str | None) -> Value:
        values = [x.value for x in inputs]
        if weights is not None:
            fusion = self._weights.fusion(weights)
            values = [
                self._node("Mul", [value, self._tensor(f"{weights}.{i}", fusion[i])], f"{weights}.scaled")
                for i, value in enumerate(values)
            ]
        name = f"{values[0]}.add" if weights is None else weights.removesuffix(".weights")
        total = values[0]
        for i, value in enumerate(values[1:], start=2):
            total = self._node("Add", [total, value], name if i == len(values) else f"{name}.part")
        return Feature(total, inputs[0].channels, inputs[0].size)

    def max_pool(self, x: Value, size: tuple[int, int]) -> Value:
        strides = [(side - 1) // target + 1 for side, target in zip(x.size, size, strict=True)]
        pads = [same_padding(side, stride + 1, stride) for side, stride in zip(x.size, strides, strict=True)]
        value = self._node(
            "MaxPool",
            [x.value],
            f"{x.value}.pool",
            kernel_shape=[stride + 1 for stride in strides],
            strides=strides,
            pads=[pads[0][0], pads[1][0], pads[0][1], pads[1][1]],
        )
        return Feature(value, x.channels, size)

    def resize(self, x: Value, size: tuple[int, int]) -> Value:
        """A Resize by whole factors, which runtimes do by copying; other sizes gather rows and columns."""
        if size[0] % x.size[0] == size[1] % x.size[1] == 0:
            scales = np.array([1, 1, size[0] // x.size[0], size[1] // x.size[1]], np.float32)
            value = self._node(
                "Resize",
                [x.value, "", self._array(f"scales_{scales[2]:g}_{scales[3]:g}", scales)],
                f"{x.value}.resize",
                mode="nearest",
                coordinate_transformation_mode="asymmetric",
                nearest_mode="floor",
            )
            return Feature(value, x.channels, size)
        value = x.value
        for axis, side, target in zip((2, 3), x.size, size, strict=True):
            indices = np.arange(target, dtype=np.int64) * side // target
            rows = self._array(f"nearest_{side}_{target}", indices)
            value = self._node("Gather", [value, rows], f"{x.value}.resize_{axis}", axis=axis)
        return Feature(value, x.channels, size)

    def _node(self, kind: str, inputs: Sequence[str], name: str, **attributes: object) -> str:
        """Add a node. Returns the name of its output, which begins with ``name``."""
        self._uses[name] += 1
        if self._uses[name] > 1:
            name = f"{name}.{self._uses[name]}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def _tensor(self, name: str, tensor: Tensor) -> str:
        return self._array(name, tensor.cpu().numpy())

    def _number(self, name: str, value: float) -> str:
        return self._array(name, np.array(value, np.float32))

    def _array(self, name: str, array: np.ndarray) -> str:
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name


def onnx_model(config: EfficientDetConfig, weights: FoldedWeights, image_size: tuple[int, int]) -> ModelProto:
    """``images`` float32 [batch, 3, *image_size] → ``class_p3``…, ``box_p3``…; the batch is free."""
    ops = OnnxOps(weights)
    outputs = network(config, ops, Feature("images", 3, image_size))
    described = []
    for head, features in zip(("class", "box"), outputs, strict=True):
        for level, x in zip(config.levels, features, strict=True):
            name = f"{head}_p{level}"
            next(node for node in reversed(ops.nodes) if node.output[0] == x.value).output[0] = name
            shape = ["batch", x.channels, *x.size]
            described.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, *image_size])
    graph = helper.make_graph(ops.nodes, config.name, [images], described, list(ops.initializers.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
