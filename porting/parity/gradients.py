"""Compare gradients: PyTorch's autograd with TensorFlow's gradient tape on the reference, in float64.

A transform of the rule table that only permutes or stacks applies to gradients as it does to values: the
gradient of a PyTorch tensor is the transform of its variables' gradients. A bias folded into a running mean
is the exception, because PyTorch has no parameter there: see :func:`_folded_biases`.

**The measure of an error.** It is the gradient itself, ‖ours − reference‖₂ / ‖reference‖₂, except for two
kinds of parameter whose gradient cancels by construction. For them a relative error would measure only
rounding, so the measure is the sum of the magnitudes of the terms:

- In training, a parameter that only shifts whole channels before a batch norm (:func:`shifts`) has the
  gradient Σ gᵢ = 0 over batch and pixels, however large the gᵢ are. If every gᵢ is right to a relative 1e-9,
  their sum is right to 1e-9 · Σ|gᵢ|. So Σ|gᵢ| is the measure, and the tolerance stays the same.
- Fusion weights w act through w′ = w/(Σw + ε) (or softmax), which hardly changes when all of them grow. If
  only one is positive, w′ = w/(w + 1e-4) hardly depends on w at all. With h = d/dw′, the gradient is the
  difference of hⱼ/(Σw + ε) and Σᵢ w′ᵢhᵢ/(Σw + ε); the measure is the sum of their magnitudes.

Stochastic depth (AutoML's ``drop_connect``) is off in training mode: our network is given no draws, and the
reference does not know it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from porting.convert import Conversion, apply_rules
from porting.errors import ConfigError
from porting.parity.backward import IMAGES, Backward, pytorch_backward, random_projection, tensorflow_backward
from porting.parity.inputs import seeded_images
from porting.parity.measure import Difference, difference
from porting.parity.reference.choose import require_tensorflow
from porting.rules import Rule, rules
from porting.transforms import FOLD_BIAS_INTO_MEAN
from pytorch_model.config import BN_EPSILON, EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet

#: Relative L2 allowed for one gradient, or one moving statistic, in float64: ten times that of activations,
#: because a gradient has passed through the network twice.
GRADIENT_TOLERANCE = 1e-9

EVALUATION, TRAINING = "evaluation", "training"  # modes of batch norm

#: The parts of the network by which gradients are summarised.
PARTS = (IMAGES, "backbone", "resample", "bifpn", "class_net", "box_net")

IMAGE_COUNT = 2  # seeded images in the comparison of a conversion's gradients


@dataclass(frozen=True)
class TensorResult:
    """One compared tensor: a gradient, or a batch norm's statistic after the forward pass.

    ``name``: PyTorch's, or AutoML's for a folded bias. ``norm``: the reference's L2. ``error.relative`` is
    relative to ``measure``: the norm, or the L2 of the sums of magnitudes if the gradient ``cancels`` by
    construction.
    """

    name: str
    sources: tuple[str, ...]
    norm: float
    measure: float
    error: Difference

    @property
    def cancels(self) -> bool:
        return self.measure != self.norm

    @property
    def passed(self) -> bool:
        return self.error.relative <= GRADIENT_TOLERANCE


@dataclass(frozen=True)
class GradientResult:
    """``gradients`` and ``statistics`` in execution order; the images' gradient first.

    ``gradients`` has every parameter and every folded bias. A fault of the backward pass makes all gradients
    before it wrong, so the last wrong one is nearest to it. ``statistics`` is empty in evaluation mode, which
    changes none.
    """

    gradients: tuple[TensorResult, ...]
    statistics: tuple[TensorResult, ...]

    @property
    def passed(self) -> bool:
        return bool(self.gradients) and all(result.passed for result in self.gradients + self.statistics)

    @property
    def worst(self) -> TensorResult:
        """The tensor with the largest relative error."""
        return max(self.gradients + self.statistics, key=lambda result: result.error.relative)

    @property
    def last_failure(self) -> TensorResult | None:
        """The last gradient out of tolerance, nearest to a fault of the backward pass; else a statistic."""
        failures = [result for result in self.gradients if not result.passed]
        return next((result for result in [*failures[::-1], *self.statistics] if not result.passed), None)


def prove_gradients(
    conversion: Conversion, listener: Callable[[str], None] = lambda mode: None
) -> dict[str, GradientResult]:
    """Compare every gradient of a conversion with the reference's, in both modes of batch norm.

    Returns mode (``evaluation``, ``training``) → result. The images are seeded, and small because a backward
    pass keeps every activation. ``listener`` is called with each mode before it runs. Raises
    :class:`EfficientDetError` if TensorFlow is not installed.
    """
    require_tensorflow()
    images = seeded_images(conversion.config, gradient_size(conversion.config), IMAGE_COUNT)
    results = {}
    for mode in (EVALUATION, TRAINING):
        listener(mode)
        results[mode] = compare_gradients(conversion.config, conversion.variables, images, mode == TRAINING)
    return results


def gradient_size(config: EfficientDetConfig) -> tuple[int, int]:
    """A small (height, width) that leaves batch norm enough pixels at the last level.

    136×136 leaves 2×2 at P7, 136×272 leaves 1×2 at P8.
    """
    return 136, max(136, 17 << (config.max_level - 4))


def gradient_figures(results: Mapping[str, GradientResult]) -> dict[str, Any]:
    """A summary that JSON can hold, by mode."""
    return {
        mode: {
            "passed": result.passed,
            "gradients": len(result.gradients),
            "statistics": len(result.statistics),
            "worst": result.worst.error.relative,
            "worst_at": result.worst.name,
        }
        for mode, result in results.items()
    }


def part_of(tensor: TensorResult) -> str:
    """The part of the network, one of :data:`PARTS`. A folded bias, named as in AutoML, counts too."""
    scope = tensor.name.split("/" if "/" in tensor.name else ".")[0]
    return {"fpn_cells": "bifpn"}.get(scope, "resample" if scope.startswith("resample") else scope)


def compare_gradients(
    config: EfficientDetConfig, variables: Mapping[str, np.ndarray], images: np.ndarray, training: bool
) -> GradientResult:
    """Differentiate one scalar in both networks, with respect to every parameter and the images.

    The scalar weights every class and box output at random (:func:`random_projection`). ``variables``: AutoML
    name → array. ``images``: [N, H, W, 3], normalised. With ``training``, batch norms use the statistics of
    the batch, and the moving statistics after the pass are compared too. Everything runs in float64.

    The last level needs more than two values per channel (for P7, two images of more than 128 pixels). With
    two, some channel's values are so close together that their variance is far below ε, and each batch norm
    multiplies rounding, in either framework, by up to 1/√ε.

    Raises :class:`ConfigError` if ``training`` and a level has a single value per channel, for which PyTorch
    computes no variance. Imports TensorFlow.
    """
    if training:
        _check_batch(config, images)
    table = list(rules(config))
    model = EfficientDet(config).double().train(training)
    model.load_state_dict(apply_rules(table, variables, "float64"))
    ours = pytorch_backward(model, images, random_projection)
    reference = tensorflow_backward(variables, config, images, random_projection, training)
    return GradientResult(
        tuple(_compare_gradients(table, model, ours, reference)),
        tuple(_compare_statistics(table, variables, ours, reference)) if training else (),
    )


def _check_batch(config: EfficientDetConfig, images: np.ndarray) -> None:
    count, height, width = images.shape[:3]
    if count == 1 and _last_level_is_a_pixel(config, (height, width)):
        raise ConfigError(
            f"{config.name} on one {height}×{width} image has a single pixel at level {config.max_level}, "
            "too few for batch norm in training; use a larger image, or two"
        )


def _last_level_is_a_pixel(config: EfficientDetConfig, image_size: tuple[int, int]) -> bool:
    return config.feature_sizes(image_size)[config.max_level] == (1, 1)


def shifts(config: EfficientDetConfig, image_size: tuple[int, int]) -> tuple[str, ...]:
    """The biases of batch norms without effect in training, because the next batch norm removes any shift.

    They are those of projections. No activation follows, and a shortcut, a max-pool and a 1×1 convolution all
    turn a constant into a constant, up to the batch norm of the next expansion or of the level's resampling
    for the BiFPN. Exceptions: a projection before a block without expansion (a depthwise convolution pads
    with zeros, so a constant does not stay one at the border), and a level as wide as the BiFPN (which has no
    convolution there). A map of one pixel has no border: there the last cell's last node, which only the
    heads read, shifts too. Biases of convolutions before a batch norm are not parameters here.
    """
    endpoints = {
        block: level for level, block in config.backbone.reduction_blocks.items() if level in config.levels
    }
    blocks = config.backbone.blocks[: max(endpoints) + 1]
    removed: dict[int, bool] = {}
    for i in reversed(range(len(blocks))):
        level_removes = (
            i not in endpoints or config.backbone.filters_at(endpoints[i]) != config.fpn_num_filters
        )
        following = blocks[i + 1] if i + 1 < len(blocks) else None
        block_removes = following is None or (
            following.expand_ratio != 1 and (not following.has_residual or removed[i + 1])
        )
        removed[i] = level_removes and block_removes
    names = [f"backbone.blocks.{i}.project.bn.bias" for i in sorted(removed) if removed[i]]
    into_heads = config.box_class_repeats > 0 and not config.conv_bn_act_pattern
    if _last_level_is_a_pixel(config, image_size) and into_heads:
        last = f"bifpn.cells.{config.fpn_cell_repeats - 1}.nodes.{len(config.bifpn_nodes) - 1}"
        names.append(f"{last}.bn.bias")
    return tuple(names)


def _compare_gradients(
    table: list[Rule], model: EfficientDet, ours: Backward, reference: Backward
) -> Iterator[TensorResult]:
    yield _compare(IMAGES, (), ours.gradients[IMAGES], reference.gradients[IMAGES])
    biases, summed = _folded_biases(table, model, ours), cancelling(table, model, ours)
    for rule in table:
        if rule.target in ours.gradients:
            name, gradient, expected = rule.target, ours.gradients[rule.target], _gradient_of(rule, reference)
            yield _compare(name, rule.sources, gradient, expected, summed.get(name))
        elif rule.transform is FOLD_BIAS_INTO_MEAN and rule.sources[1] in biases:
            name = rule.sources[1]  # once, although every level of a head folds the same bias
            yield _compare(name, (name,), biases.pop(name), reference.gradients[name], summed.get(name))


def cancelling(table: list[Rule], model: EfficientDet, ours: Backward) -> dict[str, np.ndarray]:
    """Every parameter whose gradient Σ term cancels by construction → Σ|term|.

    Names and shapes as in :class:`GradientResult`: PyTorch's, or AutoML's for folded biases. See the module's
    docstring.
    """
    found = {name: total for name, total in ours.summed.items() if name.endswith(".fuse.weights")}
    if not model.training:
        return found
    _, height, width, _ = ours.gradients[IMAGES].shape
    for name in shifts(model.config, (height, width)):
        found[name] = ours.summed[name]
    for rule in table:
        if rule.transform is FOLD_BIAS_INTO_MEAN:  # a head's bias is added at every level
            bias = rule.sources[1]
            found[bias] = found.get(bias, 0) + ours.summed[rule.target]
    return found


def _gradient_of(rule: Rule, reference: Backward) -> np.ndarray:
    return rule.transform.forward(*(reference.gradients[source] for source in rule.sources))


def _folded_biases(table: list[Rule], model: EfficientDet, ours: Backward) -> dict[str, np.ndarray]:
    """AutoML bias → its gradient, derived from PyTorch's gradients.

    In training a bias before a batch norm has no effect: its gradient is zero. In evaluation it lowers the
    running mean of each batch norm it was folded into, and d/d mean = −γ/√(variance + ε) · d/d beta.
    """
    biases: dict[str, np.ndarray] = {}
    for rule in table:
        if rule.transform is FOLD_BIAS_INTO_MEAN:
            bn = rule.target.removesuffix(".running_mean")
            gradient = np.zeros_like(ours.gradients[f"{bn}.bias"])
            if not model.training:
                deviation = np.sqrt(ours.statistics[f"{bn}.running_var"] + BN_EPSILON)
                gamma = model.get_parameter(f"{bn}.weight").detach().cpu().numpy()
                gradient = gamma / deviation * ours.gradients[f"{bn}.bias"]
            biases[rule.sources[1]] = biases.get(rule.sources[1], 0) + gradient
    return biases


def _compare_statistics(
    table: list[Rule], variables: Mapping[str, np.ndarray], ours: Backward, reference: Backward
) -> Iterator[TensorResult]:
    after = {**variables, **reference.statistics}
    for rule in table:
        if rule.target.endswith((".running_mean", ".running_var")):
            expected = rule.transform.forward(*(after[source] for source in rule.sources))
            yield _compare(rule.target, rule.sources, ours.statistics[rule.target], expected)


def _compare(
    name: str,
    sources: tuple[str, ...],
    ours: np.ndarray,
    reference: np.ndarray,
    summed: np.ndarray | None = None,
) -> TensorResult:
    """``summed``: the magnitudes that the error is relative to, by default the reference's own."""
    error, norm = difference(ours, reference), _norm(reference)
    measure = norm if summed is None else _norm(summed)
    if summed is not None and math.isfinite(error.maximum) and measure > 0:
        error = Difference(_norm(ours - reference) / measure, error.maximum)
    return TensorResult(name, sources, norm, measure, error)


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.reshape(-1)))
