"""From the first layer that differs to its fault.

The layer is known: it is the first whose isolated error is out of tolerance. Its fault is found by repair.
One thing at a time is set right in that layer only (its weights, an attribute, the arithmetic of one kind of
module), and the comparison runs again. If the error vanishes, that thing was wrong. Wrong weights are then
compared with the tensors that each common mistake would have made of the same variables.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from porting.convert import apply_rules
from porting.parity.diagnosis.layer import rules_of
from porting.parity.diagnosis.mistakes import kind_of_weights
from porting.parity.diagnosis.repairs import (
    ARITHMETIC,
    ATTRIBUTES,
    evaluation_mode,
    right_arithmetic,
    right_attribute,
    right_weights,
)
from porting.parity.lockstep import Reference, TapResult, tapped
from porting.parity.measure import difference, tolerances
from porting.rules import TapPair
from pytorch_model.efficientdet import EfficientDet


@dataclass(frozen=True)
class Statistics:
    """One tensor of the faulty layer, as it is and as the rules make it. ``relative``: their relative L2."""

    tensor: str
    sources: tuple[str, ...]
    ours: tuple[float, float, float, float]  # min, max, mean, standard deviation
    expected: tuple[float, float, float, float]
    relative: float


@dataclass(frozen=True)
class Diagnosis:
    """A fault. ``kind``: a name. ``detail``: a sentence. ``weights``: the layer's tensors, worst first."""

    module: str
    tap: str
    kind: str
    detail: str
    weights: tuple[Statistics, ...]


def diagnose(
    model: EfficientDet,
    variables: Mapping[str, np.ndarray],
    raw_variables: Mapping[str, np.ndarray] | None,
    reference: Reference,
    images: np.ndarray,
    first: TapResult,
) -> Diagnosis:
    """Find the fault of the layer at ``first`` (a result of :func:`compare` with the same arguments).

    ``variables``: the values that the reference uses. ``raw_variables``: the same run's values before
    averaging, if known. ``images``: [N, H, W, 3]; use small ones, because every activation of the reference
    is kept and the network runs once for each suspicion. ``model`` is not changed.
    """
    model = copy.deepcopy(model)
    lab = _Laboratory(model, reference, images, first)
    weights = _statistics(model, variables, first.pair)
    kind, detail = _find(lab, model, variables, raw_variables, first)
    return Diagnosis(first.pair.module, first.pair.tap, kind, detail, weights)


def _find(
    lab: _Laboratory,
    model: EfficientDet,
    variables: Mapping[str, np.ndarray],
    raw_variables: Mapping[str, np.ndarray] | None,
    first: TapResult,
) -> tuple[str, str]:
    if not first.accumulated.finite and not _weights_are_finite(model, first.pair):
        return "NaN or infinite weights", "a tensor of this layer holds values that are not finite"
    if lab.fixed_by(right_weights(model, variables, first.pair)):
        return kind_of_weights(model, variables, raw_variables, first.pair)
    if lab.fixed_by(evaluation_mode(model, variables, first.pair)):
        return (
            "batch norm in training mode",
            "it normalises with the statistics of the batch and changes its running ones",
        )
    for attribute, kind in ATTRIBUTES.items():
        if lab.fixed_by(right_attribute(model, first.pair, attribute)):
            return kind, f"the module's {attribute} is not the configuration's"
    for module_type, (kind, forward) in ARITHMETIC.items():
        if lab.fixed_by(right_arithmetic(model, first.pair, module_type, forward)):
            return kind, f"{module_type.__name__} computes something different from TensorFlow"
    lines = [f"{rule.target} ← {', '.join(rule.sources)}" for rule in rules_of(model, first.pair)]
    return (
        "unknown, perhaps the rules",
        "weights, attributes and arithmetic are right, so porting/rules.py may be wrong here: "
        + ("; ".join(lines) or "it has no rule for this layer"),
    )


class _Laboratory:
    """Runs the comparison again during a repair and looks at the faulty layer only."""

    def __init__(
        self, model: EfficientDet, reference: Reference, images: np.ndarray, first: TapResult
    ) -> None:
        self.model, self.first = model, first
        self.expected: dict[str, np.ndarray] = {}
        reference(self.expected.__setitem__)
        parameter = next(model.parameters())
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(parameter)

    def fixed_by(self, repair: AbstractContextManager[bool]) -> bool:
        """Whether ``repair`` brings the isolated error within tolerance. False if it changes nothing."""
        with repair as applied:
            if not applied:
                return False
            error = self._isolated_error()
        return error <= tolerances(self.first.dtype)[1]

    def _isolated_error(self) -> float:
        """Run on the reference's activations, up to the faulty layer."""

        def visit(pair: TapPair, ours: Tensor) -> Tensor:
            expected = self.expected[pair.tap]
            if pair == self.first.pair:
                raise _ReachedError(difference(ours.permute(0, 2, 3, 1).cpu().numpy(), expected).relative)
            return torch.from_numpy(expected).to(ours).permute(0, 3, 1, 2)

        try:
            with tapped(self.model, visit), torch.no_grad():
                self.model(self.images)
        except _ReachedError as reached:
            return reached.error
        raise AssertionError(f"{self.first.pair.tap} was never reached")


class _ReachedError(Exception):
    """Ends a run at the faulty layer and carries its error."""

    def __init__(self, error: float) -> None:
        self.error = error


# --- the layer's weights ------------------------------------------------------------------------------


def _statistics(
    model: EfficientDet, variables: Mapping[str, np.ndarray], pair: TapPair
) -> tuple[Statistics, ...]:
    state = model.state_dict()
    found = []
    for rule in rules_of(model, pair):
        expected = apply_rules([rule], variables, "float64")[rule.target]
        ours = state[rule.target].to("cpu", torch.float64)
        relative = difference(ours.numpy(), expected.numpy()).relative
        found.append(Statistics(rule.target, rule.sources, _summary(ours), _summary(expected), relative))
    return tuple(sorted(found, key=lambda tensor: -tensor.relative))


def _summary(tensor: Tensor) -> tuple[float, float, float, float]:
    deviation = float(tensor.std()) if tensor.numel() > 1 else 0.0
    return float(tensor.min()), float(tensor.max()), float(tensor.mean()), deviation


def _weights_are_finite(model: EfficientDet, pair: TapPair) -> bool:
    state = model.state_dict()
    return all(bool(state[rule.target].isfinite().all()) for rule in rules_of(model, pair))
