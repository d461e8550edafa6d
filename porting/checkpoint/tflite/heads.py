"""Match the heads of a TFLite graph, and what follows them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from porting.checkpoint.tflite.around.boxes import are_scores, decoding_anchors, operators_after
from porting.checkpoint.tflite.flow import NONE, POSTPROCESS, Mismatch, Step
from porting.checkpoint.tflite.graph import Operator
from porting.checkpoint.tflite.layers import LayerMatcher
from porting.checkpoint.tflite.structure import BOX_VALUES, Head, Separable

_RELEASED_ANCHORS = 9  # per location, in every model AutoML released


@dataclass
class End:
    """What follows a head.

    ``values``: the number of values per prediction. ``is_joined``: the levels are concatenated. ``is_score``:
    a sigmoid is applied. ``position``: the input of ``postprocess`` that reads it, −1 without one.
    ``joined``: the tensor of all levels that ordinary operators make detections of; None without them.
    """

    values: int | None = None
    is_joined: bool = False
    is_score: bool = False
    postprocess: Operator | None = None
    position: int = -1
    joined: int | None = None


class HeadMatcher(LayerMatcher):
    """Matches the heads."""

    def heads(self, features: list[int]) -> tuple[Head, Head, End]:
        """(class net, box net, what follows the box net)."""
        chains: dict[str, list[tuple[Separable, ...]]] = {"class": [], "box": []}
        ends: dict[str, list[End]] = {"class": [], "box": []}
        for level, x in enumerate(features):
            begins = self.reading(x, "DEPTHWISE_CONV_2D")
            if len(begins) != 2:
                raise Mismatch(f"{len(begins)} heads, not two, read level {level} of the last cell")
            pair = [self.head(begin, f"the head at level {level}") for begin in begins]
            pair_ends = [self.end(chain[-1].output, level, len(features)) for chain in pair]
            for kind, chain, end in zip(_kinds_of(pair, pair_ends), pair, pair_ends, strict=True):
                chains[kind].append(chain)
                ends[kind].append(end)
        class_net, box_net = (_head(kind, chains[kind], ends[kind]) for kind in ("class", "box"))
        _check_predictions(class_net, box_net)
        return class_net, box_net, ends["box"][0]

    def head(self, begin: Step, where: str) -> tuple[Separable, ...]:
        """One head at one level: separable convolutions with an activation, then one without it."""
        layers = [self.separable(begin, where, None)]
        while layers[-1].pointwise.step.activation == self.act:
            begin = self.only(layers[-1].output, "DEPTHWISE_CONV_2D", where)
            layers.append(self.separable(begin, where, None))
        return tuple(layers)

    def end(self, x: int, level: int, levels: int) -> End:
        """Follow the output ``x`` of a head: it is flattened, joined with other levels, made a score."""
        end = End()
        size = math.prod(self.flow.shape(x))
        while self.flow.consumers[x] and end.postprocess is None:
            usual = (POSTPROCESS,) if end.is_score else (POSTPROCESS, "LOGISTIC")
            if end.is_joined and not self.reading(x, *usual):
                return self.end_in_operators(end, x)
            if len(self.flow.consumers[x]) > 1:
                raise Mismatch(f"{self.after(x)} after a head")
            step = self.flow.consumers[x][0]
            shape = self.flow.shape(step.output)
            if step.kind == "RESHAPE" and end.values is None and len(shape) == 3:
                end.values = shape[2]
                fits = shape[0] == 1 and math.prod(shape) == size
            elif step.kind == "CONCATENATION" and end.values and not end.is_joined:
                end.is_joined = True
                fits = len(step.inputs) == levels and step.inputs[level] == x
                fits &= step.operator.option(0, "i") in (1, -2) and step.activation == NONE
            elif step.kind == "LOGISTIC" and not end.is_score:
                end.is_score = fits = True
            else:
                end.postprocess, end.position = step.operator, step.inputs.index(x)
                fits = step.kind == POSTPROCESS and end.is_joined
            if not fits:
                raise Mismatch(f"{step.operator} does not list a head's predictions as AutoML does")
            self.place(step)
            x = step.output
        return end

    def end_in_operators(self, end: End, x: int) -> End:
        """Ordinary operators make detections of ``x``: whatever they do, they are not part of the network."""
        end.joined, end.is_score = x, end.is_score or are_scores(self.graph, x)
        self.placed.update(operator.index for operator in operators_after(self.graph, [x]))
        return end

    def anchors(self, end: End, image_size: tuple[int, int]) -> np.ndarray | None:
        if end.joined is not None:
            return decoding_anchors(self.flow, end.joined, image_size)
        if end.postprocess is None:
            return None
        found = self.flow.constants.get((*end.postprocess.inputs, -1, -1, -1)[2])
        if found is None:
            raise Mismatch(f"{end.postprocess} has no constant list of anchors")
        if len(found.shape) != 2 or found.shape[1] != 4 or found.dtype not in (np.float32, np.float16):
            raise Mismatch("it does not have a list of anchors, four numbers each")
        return found.values()


def _kinds_of(pair: list[tuple[Separable, ...]], ends: list[End]) -> tuple[str, str]:
    """("class", "box") or the reverse, for the two heads of a level.

    The class net has scores. Without them, the box net is the one whose width fits the 9 released anchors.
    """
    scores = [end.is_score for end in ends]
    if scores == [False, False]:
        widths = [chain[-1].pointwise.out_filters for chain in pair]
        scores = [width != BOX_VALUES * _RELEASED_ANCHORS for width in widths]
    if scores == [True, False]:
        return "class", "box"
    if scores == [False, True]:
        return "box", "class"
    raise Mismatch("its class net and its box net cannot be distinguished")


def _head(kind: str, chains: list[tuple[Separable, ...]], ends: list[End]) -> Head:
    if len({(len(chain), chain[-1].pointwise.out_filters) for chain in chains}) != 1:
        raise Mismatch(f"its {kind} net differs from level to level")
    if any(end != ends[0] for end in ends):
        raise Mismatch(f"its {kind} net's outputs are treated differently from level to level")
    if ends[0].postprocess is not None and ends[0].position != ("box", "class").index(kind):
        raise Mismatch(f"{ends[0].postprocess} does not take boxes, then scores")
    return Head(tuple(chains), ends[0].values)


def _check_predictions(class_net: Head, box_net: Head) -> None:
    anchors, rest = divmod(box_net.out_filters, BOX_VALUES)
    classes, left = divmod(class_net.out_filters, anchors) if anchors else (0, 1)
    if rest or left or len(class_net.levels[0]) != len(box_net.levels[0]):
        raise Mismatch(
            f"its heads predict {class_net.out_filters} and {box_net.out_filters} values per location, after "
            f"{len(class_net.levels[0])} and {len(box_net.levels[0])} layers"
        )
    if box_net.values not in (None, BOX_VALUES) or class_net.values not in (None, classes):
        raise Mismatch("it does not list its predictions anchor by anchor")
