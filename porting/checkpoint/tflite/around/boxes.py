"""The part of a TFLite graph after the heads, where it is made of ordinary operators: the anchors in it.

AutoML's TensorFlow 1 exporter decodes and suppresses boxes in the graph (``postprocess.py``).
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator

import numpy as np

from porting.checkpoint.tflite.flow import Flow
from porting.checkpoint.tflite.graph import Graph, Operator

# Operators that follow a class net's logits, and no box net's regressions.
_PASSED_ON = ("RESHAPE", "SQUEEZE", "STRIDED_SLICE", "CAST", "DEQUANTIZE")
_OF_SCORES = ("LOGISTIC", "ARG_MAX", "REDUCE_MAX", "TOPK_V2")


def operators_after(graph: Graph, tensors: list[int]) -> list[Operator]:
    """Every operator that reads ``tensors``, or something computed from them, in execution order."""
    reached = set(tensors)
    found = []
    for operator in graph.operators:
        if not reached.isdisjoint(operator.inputs):
            reached.update(operator.outputs)
            found.append(operator)
    return found


def are_scores(graph: Graph, tensor: int) -> bool:
    """Whether ``tensor``, the joined output of a head, is the class net's."""
    pending, seen = deque([tensor]), {tensor}
    while pending:
        x = pending.popleft()
        for operator in graph.operators:
            if x in operator.inputs:
                if operator.kind in _OF_SCORES:
                    return True
                if operator.kind in _PASSED_ON:
                    pending += [y for y in operator.outputs if y not in seen]
                    seen.update(operator.outputs)
    return False


def decoding_anchors(flow: Flow, boxes: int, image_size: tuple[int, int]) -> np.ndarray | None:
    """The anchors by which the joined output ``boxes`` of the box net is decoded; None if they are not found.

    float64 [A, 4] of centre y, centre x, height, width, as fractions of the image. AutoML computes
    y = ty · ha + ya and h = exp(th) · ha from the columns ty, tx, th and tw.
    """
    readers: dict[int, list[Operator]] = defaultdict(list)
    for operator in flow.graph.operators:
        for tensor in operator.inputs:
            readers[tensor].append(operator)
    columns = next((op for op in readers[boxes] if op.kind == "UNPACK" and len(op.outputs) == 4), None)
    if columns is None:
        return None
    found = []
    for column in columns.outputs[:2]:
        pairs = [
            (centre, size)
            for product, size in _with_constant(flow, readers, column, "MUL")
            for _, centre in _with_constant(flow, readers, product, "ADD")
        ]
        if len(pairs) != 1:
            return None
        found.append(pairs[0])
    (y, height), (x, width) = found
    if len({len(values) for values in (y, x, height, width)}) != 1:
        return None
    rows, columns_ = image_size
    return np.stack([y / rows, x / columns_, height / rows, width / columns_], axis=1)


def _with_constant(
    flow: Flow, readers: dict[int, list[Operator]], tensor: int, kind: str
) -> Iterator[tuple[int, np.ndarray]]:
    """(output, the constant [n]) of each operator of ``kind`` that reads ``tensor`` and a constant."""
    for operator in readers[tensor]:
        for other in operator.inputs if operator.kind == kind else ():
            if other in flow.constants:
                yield operator.outputs[0], flow.constants[other].values().reshape(-1)
