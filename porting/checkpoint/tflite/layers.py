"""Match single layers of a TFLite graph with AutoML's: convolutions, sums and resampling."""

from __future__ import annotations

from porting.checkpoint.tflite.flow import ACT_TYPES, NONE, Flow, Mismatch, Step
from porting.checkpoint.tflite.graph import Graph, Operator, Tensor
from porting.checkpoint.tflite.structure import Convolution, Separable

_SAME = 0  # schema.fbs Padding


class LayerMatcher:
    """Finds layers in ``graph`` and notes their operators as placed. ``act``: the network's activation.

    Every method raises :class:`Mismatch` if a layer is different from AutoML's.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.flow = Flow(graph)
        self.act = NONE  # until the stem is found
        self.placed = set(self.flow.casts)  # numbers of the operators that belong to a matched layer

    def only(self, tensor: int, kind: str, where: str) -> Step:
        """The only step that reads ``tensor``; it must be of ``kind``."""
        found = self.flow.consumers[tensor]
        if [step.kind for step in found] != [kind]:
            raise Mismatch(f"{self.after(tensor)}, but {where} needs {kind}")
        return found[0]

    def reading(self, tensor: int, *kinds: str) -> list[Step]:
        return [step for step in self.flow.consumers[tensor] if step.kind in kinds]

    def after(self, tensor: int) -> str:
        before, found = self.flow.producers.get(tensor), self.flow.consumers[tensor]
        kinds = " and ".join(sorted({step.kind for step in found})) or "nothing"
        return f"{before.operator if before else 'its input'} is followed by {kinds}"

    def place(self, step: Step) -> None:
        self.placed.update(operator.index for operator in step.operators)

    def check_shape(self, step: Step, expected: tuple[int, ...]) -> None:
        """Check that the declared shape of the output is the one that the operators result in."""
        found = self.flow.shape(step.output)
        if found != expected:
            raise Mismatch(f"{step.operator} writes the shape {list(found)}, not {list(expected)}")

    def convolution(
        self, step: Step, where: str, size: int | None = 1, stride: int | None = 1, activation: int = NONE
    ) -> Convolution:
        """``step`` as a convolution of this size, stride and activation; None accepts any."""
        operator, depthwise = step.operator, step.kind == "DEPTHWISE_CONV_2D"
        kernel, bias = self.kernel_and_bias(operator)
        _, height, width, in_filters = self.flow.shape(step.inputs[0])
        if len(kernel.shape) != 4 or kernel.shape[1] != kernel.shape[2]:
            raise Mismatch(f"the kernel of {operator} has the shape {list(kernel.shape)}")
        first, found_size, _, last = kernel.shape
        out_filters = last if depthwise else first
        if not out_filters or (first, last) != ((1, in_filters) if depthwise else (first, in_filters)):
            raise Mismatch(f"the kernel of {operator} does not fit its {in_filters} input channels")
        found_stride = _stride(operator, found_size)
        if (
            size not in (None, found_size)
            or stride not in (None, found_stride)
            or activation != step.activation
        ):
            raise Mismatch(
                f"{operator} {_describe(found_size, found_stride, step.activation)}, but {where} "
                f"{_describe(size, stride, activation)}"
            )
        self.check_shape(step, (1, -(-height // found_stride), -(-width // found_stride), out_filters))
        self.place(step)
        return Convolution(step, kernel, bias, depthwise, found_size, found_stride, in_filters, out_filters)

    def kernel_and_bias(self, operator: Operator) -> tuple[Tensor, Tensor | None]:
        kernel, bias = (*operator.inputs[1:3], -1, -1)[:2]  # −1: left out
        if kernel not in self.flow.constants or (bias >= 0 and bias not in self.flow.constants):
            raise Mismatch(f"the kernel and bias of {operator} are not constants")
        return self.flow.constants[kernel], self.flow.constants.get(bias)

    def separable(self, depthwise: Step, where: str, activation: int | None = NONE) -> Separable:
        """A 3×3 depthwise convolution and the pointwise one after it; None accepts any activation."""
        first = self.convolution(depthwise, where, size=3)
        step = self.only(first.output, "CONV_2D", where)
        if activation is None:
            activation = self.act if step.activation == self.act else NONE
        return Separable(first, self.convolution(step, where, activation=activation))

    def place_sum(self, step: Step, shape: tuple[int, ...], activation: int) -> None:
        if step.activation != activation or any(self.flow.shape(i) != shape for i in step.inputs):
            raise Mismatch(f"{step.operator} does not add maps of one shape, or has another activation")
        self.check_shape(step, shape)
        self.place(step)

    def place_max_pool(self, step: Step, where: str) -> None:
        """Max-pooling with stride 2, window 3 and SAME: AutoML's resampling from one level to the next."""
        options = [step.operator.option(i, code) for i, code in enumerate("biiiib")]
        if options != [_SAME, 2, 2, 3, 3, NONE]:
            raise Mismatch(f"{step.operator} does not pool 3×3 with stride 2 like {where}")
        _, height, width, filters = self.flow.shape(step.inputs[0])
        self.check_shape(step, (1, (height + 1) // 2, (width + 1) // 2, filters))
        self.place(step)

    def place_resize(self, step: Step, where: str) -> None:
        """Nearest-neighbour resizing to the size of the output: pixel ``floor(i · in / out)``."""
        if step.operator.option(0, "?") or step.operator.option(1, "?"):
            raise Mismatch(f"{step.operator} aligns corners or pixel centres, which {where} does not")
        size = self.flow.constants.get((*step.operator.inputs, -1)[1])
        shape = self.flow.shape(step.output)
        if size is None or tuple(size.stored().reshape(-1).tolist()) != shape[1:3]:
            raise Mismatch(f"{step.operator} does not resize to the shape {list(shape)} that it writes")
        self.check_shape(step, (1, *shape[1:3], self.flow.shape(step.inputs[0])[3]))
        self.place(step)

    def check_all_placed(self) -> None:
        for operator in self.graph.operators:
            if operator.index not in self.placed:
                raise Mismatch(f"{operator} does not belong to one")


def _stride(operator: Operator, size: int) -> int:
    """The stride of a convolution. Raises :class:`Mismatch` for options that AutoML never uses."""
    depthwise = operator.kind == "DEPTHWISE_CONV_2D"
    strides = {operator.option(1, "i"), operator.option(2, "i")}
    dilations = {operator.option(i, "i", 1) for i in ((5, 6) if depthwise else (4, 5))}
    if strides not in ({1}, {2}) or dilations != {1} or size % 2 == 0:
        raise Mismatch(f"{operator} has strides, dilations or a kernel that are not AutoML's")
    # A 1×1 convolution needs no padding; TensorFlow's separable one is declared VALID.
    if operator.option(0, "b") != _SAME and (size != 1 or strides == {2}):
        raise Mismatch(f"{operator} does not pad as SAME does")
    return strides.pop()


def _describe(size: int | None, stride: int | None, activation: int) -> str:
    name = {NONE: "no activation", **ACT_TYPES}.get(activation, "another activation")
    return f"is {size or 'n'}×{size or 'n'} with stride {stride or 'n'} and {name}"
