"""A TFLite graph as a dataflow of activations, without the differences that converters introduce.

Values may be quantised and dequantised on the way, constants may be dequantised before use, an activation may
be part of the operator before it or an operator by itself: here all of these look the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from porting.checkpoint.tflite.graph import Graph, Operator, Tensor
from porting.errors import Reason

POSTPROCESS = "TFLite_Detection_PostProcess"
ADDS = ("ADD", "ADD_N")
NONE, RELU6 = 0, 3  # schema.fbs ActivationFunctionType
SWISH = -1  # a sigmoid and a product, here one activation

#: Activation → AutoML's name of it.
ACT_TYPES = {RELU6: "relu6", SWISH: "swish"}

_CASTS = ("QUANTIZE", "DEQUANTIZE")

# Where schema.fbs puts the fused activation among an operator's options.
_ACTIVATION_FIELD = {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 4,
    "MAX_POOL_2D": 5,
    "ADD": 0,
    "MUL": 0,
    "CONCATENATION": 1,
}


class Mismatch(Reason):
    """A TFLite file is not an EfficientDet. The text says where it first differs."""


@dataclass(frozen=True)
class Step:
    """An operator, with the activation after it if there is one.

    ``inputs`` and ``output`` are the numbers of activation tensors only; a tensor and its quantised or
    dequantised copies have the number of the first of them. ``after``: the operators of the activation, if it
    is not part of ``operator``.
    """

    operator: Operator
    inputs: tuple[int, ...]
    output: int
    activation: int
    after: tuple[Operator, ...] = ()

    @property
    def kind(self) -> str:
        return self.operator.kind

    @property
    def operators(self) -> tuple[Operator, ...]:
        return (self.operator, *self.after)


class Flow:
    """The steps of ``graph`` and what connects them.

    ``consumers``: tensor → the steps that read it. ``producers``: tensor → the step that writes it.
    ``constants``: tensor → the constant that it is, or that it is dequantised from. ``casts``: the numbers of
    the operators that only change how values are stored.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.constants = {tensor.index: tensor for tensor in graph.tensors if tensor.is_constant}
        self.consumers: dict[int, list[Step]] = defaultdict(list)
        self.producers: dict[int, Step] = {}
        self._first: dict[int, int] = {}  # a cast tensor → the tensor it is a copy of
        self.casts = {operator.index for operator in graph.operators if self._is_cast(operator)}
        for step in self._steps():
            self.producers[step.output] = step
            for tensor in dict.fromkeys(step.inputs):
                self.consumers[tensor].append(step)

    def first(self, tensor: int) -> int:
        return self._first.get(tensor, tensor)

    def shape(self, tensor: int) -> tuple[int, ...]:
        return self.graph.tensors[tensor].shape

    def factor(self, step: Step) -> Tensor | None:
        """The constant that ``step`` multiplies a map with; None if it does something else."""
        if step.kind != "MUL" or len(step.inputs) != 1 or step.activation != NONE:
            return None
        return next((self.constants[i] for i in step.operator.inputs if i in self.constants), None)

    def _is_cast(self, operator: Operator) -> bool:
        """Whether ``operator`` only changes how values are stored. If so, record its output as a copy."""
        if operator.kind not in _CASTS or len(operator.inputs) != 1 or len(operator.outputs) != 1:
            return False
        (source,), (target,) = operator.inputs, operator.outputs
        if source in self.constants:
            self.constants[target] = self.constants[source]
        else:
            self._first[target] = self.first(source)
        return True

    def _steps(self) -> list[Step]:
        operators = [operator for operator in self.graph.operators if operator.index not in self.casts]
        uses = Counter(self.first(tensor) for operator in operators for tensor in operator.inputs)
        uses.update(self.first(tensor) for tensor in self.graph.outputs)
        steps: dict[int, Step] = {}  # by the tensor that they write
        for operator in operators:
            step = self._step(operator)
            parts = _activated(step, steps)
            # Nothing else may read what is between the operators of an activation.
            if parts and all(uses[part.output] == len(parts) - i for i, part in enumerate(parts)):
                for part in parts:
                    del steps[part.output]
                after = (*(part.operator for part in parts[1:]), operator)
                activation = SWISH if len(parts) == 2 else RELU6
                step = Step(parts[0].operator, parts[0].inputs, step.output, activation, after)
            steps[step.output] = step
        return list(steps.values())

    def _step(self, operator: Operator) -> Step:
        if not operator.inputs or not operator.outputs:
            raise Mismatch(f"{operator} has no input or no output")
        read = operator.inputs
        if operator.kind == POSTPROCESS:
            read = read[:2]  # boxes and scores; the third is the anchors
        elif operator.kind == "MUL":
            read = tuple(i for i in read if i not in self.constants) or read[:1]
        elif operator.kind not in (*ADDS, "CONCATENATION", "PACK"):
            read = read[:1]  # the other inputs are kernel, bias, sizes
        field = _ACTIVATION_FIELD.get(operator.kind)
        activation = NONE if field is None else operator.option(field, "b")
        return Step(operator, tuple(self.first(i) for i in read), operator.outputs[0], activation)


def _activated(step: Step, steps: dict[int, Step]) -> list[Step]:
    """The steps that ``step`` completes to an activation: what it is applied to, and the sigmoid of swish."""
    if step.kind == "RELU6":
        parts = [steps.get(step.inputs[0])]
    elif step.kind == "MUL" and len(step.inputs) == 2 and step.activation == NONE:
        gates = (steps.get(tensor) for tensor in step.inputs)
        gate = next((g for g in gates if g and g.kind == "LOGISTIC" and g.inputs[0] in step.inputs), None)
        parts = [steps.get(gate.inputs[0]), gate] if gate else []
    else:
        parts = []
    found = [part for part in parts if part is not None]
    return found if found and len(found) == len(parts) and found[0].activation == NONE else []
