"""Compare an engine with the eager network and with the TensorFlow reference, on the same images.

First the head outputs, level by level, then the detections in them. An engine fuses layers, so it shows no
activations between. Its outputs are taken before the proof of the port, whose float32 run shows those of the
reference to :class:`ReferenceHeads`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from porting.parity.engines.agreement import SCORE_TOLERANCE, Agreement, agreement
from porting.parity.inputs import unresized
from porting.parity.lockstep import Observer, tf32
from porting.parity.measure import FLOAT32_ACCUMULATED_TOLERANCE, Difference, difference
from porting.rules import TapPair
from pytorch_model.anchors import generate_anchors
from pytorch_model.detection.detector import HeadOutputs, detections_in
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import EAGER
from pytorch_model.engines.choose import make_engine
from pytorch_model.errors import WeightsError

#: Largest relative L2 of a head output to the eager network's, in float32.
ENGINE_TOLERANCE = 1e-5

#: The eager float32 can itself be further than that from the exact values. There an output passes that is
#: as exact, but for this factor: another order of summation changes rounding by less. Scores
#: may then differ by more in the same proportion, times this factor: the largest of a hundred is compared.
ROUNDING_TIMES = 3.0

#: Largest difference of a score to the reference's, for a detection to count as the same one.
REFERENCE_SCORE_TOLERANCE = 1e-3

_NMS = NMSConfig()

#: Head outputs, classes before boxes and levels in order, by tap: [N, C, h, w], on the CPU.
Heads: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class OutputResult:
    """One head output on one level. ``tap``: its name, such as ``class_outputs/3``.

    ``eager``, ``reference``: the differences to the eager network and to the TensorFlow reference (None if
    that does not show this output). ``exact``, ``eager_exact``: those of the engine and of the eager network
    to the network in float64; None if the first passes alone, or is not finite.
    ``judged``: whether the reference is exact enough to fail an output.
    """

    tap: str
    eager: Difference
    reference: Difference | None = None
    exact: Difference | None = None
    eager_exact: Difference | None = None
    judged: bool = True

    @property
    def is_rounding(self) -> bool:
        """Whether the engine is as near to the exact values as the eager network, so that both are right."""
        if self.exact is None or self.eager_exact is None:
            return False
        return self.exact.relative <= ROUNDING_TIMES * self.eager_exact.relative

    @property
    def passed(self) -> bool:
        right = self.eager.relative <= ENGINE_TOLERANCE or self.is_rounding
        if self.reference is None or not self.judged:
            return right
        return right and self.reference.relative <= FLOAT32_ACCUMULATED_TOLERANCE


@dataclass(frozen=True)
class EngineResult:
    """The proof of one engine: ``outputs``, classes before boxes, then ``detections`` against eager's.

    ``reference_detections``: against the reference's, measured and not judged, because scores that are almost
    equal may swap. Both are None if an output is not finite or has another shape, the latter also if the
    reference does not show all of them. ``failure``: why the engine could not compute; then there are no
    outputs.
    """

    name: str
    outputs: tuple[OutputResult, ...] = ()
    detections: Agreement | None = None
    reference_detections: Agreement | None = None
    failure: str | None = None

    @property
    def passed(self) -> bool:
        if self.failure is not None or self.detections is None:
            return False
        return self.detections.passed and all(output.passed for output in self.outputs)

    @property
    def worst(self) -> OutputResult:
        """The output that is furthest from the eager network's; among failed ones, if there are any."""
        return max(self.outputs, key=lambda output: (not output.passed, output.eager.relative))


class ReferenceHeads:
    """An observer of a run that keeps the reference's head outputs, and lets ``then`` see everything."""

    def __init__(self, then: Observer | None = None) -> None:
        self.outputs: dict[str, Tensor] = {}
        self._then = then

    def __call__(self, pair: TapPair, ours: np.ndarray, expected: np.ndarray) -> None:
        if pair.output is not None:
            self.outputs[pair.tap] = torch.from_numpy(np.ascontiguousarray(expected.transpose(0, 3, 1, 2)))
        if self._then:
            self._then(pair, ours, expected)


class EngineComparison:
    """Engines and the eager network, of one model and on the same images.

    ``model`` is in evaluation mode, on its device. ``images``: float32 [N, H, W, 3], normalised. The model's
    float64 copy is run only if an engine differs by more than :data:`ENGINE_TOLERANCE`.
    """

    def __init__(self, model: EfficientDet, images: np.ndarray) -> None:
        self._model = model
        self._size = (images.shape[1], images.shape[2])
        x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        self._x = x.to(next(model.parameters()).device)
        self._found: dict[str, Heads | str] = {}

    def run(self, name: str) -> None:
        """Run the engine ``name``, one of :data:`pytorch_model.engines.ENGINES`, and keep its outputs.

        Raises :class:`ConfigError` if it cannot compute on the model's device.
        """
        try:
            self._found[name] = self._heads(name, self._model)
        except WeightsError as error:
            self._found[name] = str(error)

    def results(self, reference: Heads, judged: bool = True) -> tuple[EngineResult, ...]:
        """The engines that were run, in this order.

        ``reference``: the outputs that the TensorFlow reference shows. ``judged``: see :class:`OutputResult`.
        """
        return tuple(
            EngineResult(name, failure=found)
            if isinstance(found, str)
            else self._result(name, found, reference, judged)
            for name, found in self._found.items()
        )

    def _result(self, name: str, found: Heads, reference: Heads, judged: bool) -> EngineResult:
        outputs = tuple(self._output(tap, ours, reference.get(tap), judged) for tap, ours in found.items())
        if not all(output.eager.finite for output in outputs):
            return EngineResult(name, outputs)
        ours = self._detections(found)
        rounding = [output.eager.relative for output in outputs if output.is_rounding]
        larger = ROUNDING_TIMES * max(rounding) / ENGINE_TOLERANCE if rounding else 1.0
        against = None
        if reference.keys() == found.keys():
            theirs = self._detections(reference)
            against = agreement(ours, theirs, self._size, _NMS, REFERENCE_SCORE_TOLERANCE)
        return EngineResult(
            name,
            outputs,
            agreement(ours, self._detections(self._eager), self._size, _NMS, larger * SCORE_TOLERANCE),
            against,
        )

    def _output(self, tap: str, ours: Tensor, reference: Tensor | None, judged: bool) -> OutputResult:
        eager = self._eager[tap]
        result = OutputResult(
            tap,
            _difference(ours, eager),
            None if reference is None else _difference(ours, reference),
            judged=judged,
        )
        if result.eager.relative <= ENGINE_TOLERANCE or not result.eager.finite:
            return result
        exact = self._exact[tap]
        return replace(result, exact=_difference(ours, exact), eager_exact=_difference(eager, exact))

    @cached_property
    def _eager(self) -> Heads:
        return self._heads(EAGER, self._model)

    @cached_property
    def _exact(self) -> Heads:
        return self._heads(EAGER, copy.deepcopy(self._model).double())

    def _heads(self, name: str, model: EfficientDet) -> Heads:
        with tf32(False):
            found = make_engine(name, model, self._size)(self._x)
        levels = model.config.levels
        return {
            f"{kind}_outputs/{level}": output.cpu()
            for kind, outputs in zip(("class", "box"), found, strict=True)
            for level, output in zip(levels, outputs, strict=True)
        }

    def _detections(self, heads: Heads) -> list[dict[str, Tensor]]:
        """By AutoML's evaluation, boxes in pixels of the network's input."""
        class_outputs, box_outputs = (
            [output.float() for tap, output in heads.items() if tap.startswith(kind)]
            for kind in ("class", "box")
        )
        anchors_yxyx = generate_anchors(unresized(self._model.config), self._size)
        run = (class_outputs, box_outputs)
        about = HeadOutputs([run], self._size, torch.ones(len(self._x), 2), anchors_yxyx)
        return detections_in(run, about, _NMS)


def _difference(ours: Tensor, expected: Tensor) -> Difference:
    return difference(ours.double().numpy(), expected.double().numpy())
