"""The backward pass: PyTorch's autograd against TensorFlow's gradient tape on the reference, in float64.

A transform of the rule table that only permutes or stacks takes gradients as it takes values: the gradient
of a PyTorch tensor is the transform of its variables' gradients. A bias folded into a running mean is the
exception, for PyTorch has no parameter there: see :func:`_folded_biases`.

**What an error is measured against.** The gradient itself, ‖ours − reference‖₂ / ‖reference‖₂, but for the
two kinds of parameter whose gradient cancels by construction. There, a relative error would measure rounding
and nothing else, so the error is measured against what is summed:

- In training, a parameter that only shifts whole channels on their way to a batch norm (:func:`shifts`) has
  the gradient Σ gᵢ = 0 over batch and pixels, however large the gᵢ. Were every gᵢ right to a relative 1e-9,
  their sum would be right to 1e-9 · Σ|gᵢ|; so Σ|gᵢ| is the measure, and the tolerance stays what it is.
- Fusion weights w act through w′ = w/(Σw + ε) (or softmax), which hardly changes when all of them grow; where
  a single one is positive, w′ = w/(w + 1e-4) hardly depends on w at all. With h = d/dw′, the gradient is the
  difference of hⱼ/(Σw + ε) and Σᵢ w′ᵢhᵢ/(Σw + ε); the measure is the sum of their magnitudes.

Stochastic depth (AutoML's ``drop_connect``) is left out of training mode: it is random in one framework and
could not be the same in the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from porting.convert import apply_rules
from porting.errors import ConfigError
from porting.parity.measure import Difference, difference
from porting.rules import Rule, rules
from porting.transforms import FOLD_BIAS_INTO_MEAN
from pytorch_model.bifpn import FASTATTN_EPSILON, Fuse
from pytorch_model.config import BN_EPSILON, EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet

#: Relative L2 allowed for one gradient, or one moving statistic, in float64: an order above what activations
#: are allowed, for a gradient has been through the network twice.
GRADIENT_TOLERANCE = 1e-9

IMAGES = "images"

#: Class and box outputs of one network, one array [N, H_l, W_l, outputs] a level.
Outputs = tuple[list[np.ndarray], list[np.ndarray]]

#: The gradient of a loss with respect to the outputs, in the outputs' shapes.
LossGradient = Callable[[Outputs], Outputs]


@dataclass(frozen=True)
class Backward:
    """One network, once forward and once backward. Names are the network's own.

    ``gradients``: by parameter, and under ``images`` the input's, [N, H, W, 3]. ``statistics``: every moving
    statistic as the forward pass left it. Arrays have the layout of the framework they come from.

    ``summed``, from PyTorch only: the magnitude Σ|term| of what a gradient is the sum of, under a batch
    norm's ``bias`` and ``running_mean`` (a shift behind it, and one ahead of it) and under fusion weights.
    """

    outputs: Outputs
    gradients: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]
    summed: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class TensorResult:
    """One compared tensor: a gradient, or a batch norm's statistic after the forward pass.

    ``name`` is PyTorch's, or AutoML's for a folded bias. ``norm``: the reference's L2. ``error.relative`` is
    relative to ``measure``: the norm, or where it ``cancels`` by construction the L2 of what is summed.
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

    ``gradients`` holds every parameter and every folded bias. A fault of the backward pass spoils the
    gradients of everything before it, so the last that fails is nearest to it. ``statistics`` is empty in
    evaluation mode, which changes none.
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


def compare_gradients(
    config: EfficientDetConfig, variables: Mapping[str, np.ndarray], images: np.ndarray, training: bool
) -> GradientResult:
    """Differentiate one scalar in both networks, with respect to every parameter and the images.

    The scalar weighs every class and box output at random (:func:`random_projection`). ``variables``: AutoML
    name → array. ``images``: [N, H, W, 3], normalised. ``training`` lets batch norms use the batch's
    statistics, and compares what that leaves in the moving ones. Give the last level more than two values a
    channel (for P7, two pictures of more than 128 pixels): of two, some channel's lie so close together that
    their variance is far below ε, and each batch norm on the way multiplies rounding, in either framework, by
    up to 1/√ε. Everything runs in float64.

    Raises :class:`ConfigError` where training is asked for and a level has a single value a channel, of which
    PyTorch takes no variance. Imports TensorFlow.
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


def random_projection(outputs: Outputs) -> Outputs:
    """The gradient of a scalar of order one, ``Σ_levels ⟨r, outputs⟩ / √size``: seeded r, standard normal."""
    rng = np.random.default_rng(0)
    classes, boxes = ([rng.standard_normal(x.shape) / np.sqrt(x.size) for x in kind] for kind in outputs)
    return classes, boxes


def pytorch_backward(model: EfficientDet, images: np.ndarray, loss_gradient: LossGradient) -> Backward:
    """``model`` forward and backward on ``images`` [N, H, W, 3], in its own mode, float type and device.

    In training mode the model's running statistics move, as in any training step. Parameters keep their
    ``grad`` fields untouched.
    """
    parameters = dict(model.named_parameters())
    like = next(iter(parameters.values()))
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(like).requires_grad_()
    with _magnitudes(model) as summed:
        outputs = [y for kind in model(x) for y in kind]
        arrays = [y.detach().permute(0, 2, 3, 1).cpu().numpy() for y in outputs]
        levels = len(arrays) // 2
        class_gradients, box_gradients = loss_gradient((arrays[:levels], arrays[levels:]))
        found = torch.autograd.grad(
            outputs,
            [x, *parameters.values()],
            [torch.from_numpy(g).to(x).permute(0, 3, 1, 2) for g in class_gradients + box_gradients],
            materialize_grads=True,  # blocks above max_level reach no output: zeros
        )
    gradients = {
        name: gradient.detach().cpu().numpy() for name, gradient in zip(parameters, found[1:], strict=True)
    }
    gradients[IMAGES] = found[0].permute(0, 2, 3, 1).cpu().numpy()
    statistics = {name: buffer.cpu().numpy().copy() for name, buffer in model.named_buffers()}
    magnitudes = {name: total.cpu().numpy() for name, total in summed.items()}
    return Backward((arrays[:levels], arrays[levels:]), gradients, statistics, magnitudes)


@contextmanager
def _magnitudes(model: EfficientDet) -> Iterator[dict[str, torch.Tensor]]:
    """While it lasts, a backward pass fills in :attr:`Backward.summed`; zeros where no gradient comes by."""
    found: dict[str, torch.Tensor] = {}

    def watch(name: str, x: torch.Tensor, magnitude: Callable[[torch.Tensor], torch.Tensor]) -> None:
        found[name] = magnitude(torch.zeros_like(x))
        x.register_hook(lambda g: found.__setitem__(name, magnitude(g)))  # type: ignore[no-untyped-call]

    def shift(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.abs().sum(dim=(0, 2, 3))

    def batch_norm_hook(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            watch(f"{name}.running_mean", inputs[0], shift)
            watch(f"{name}.bias", output, shift)

        return hook

    def fuse_hook(name: str) -> Callable[..., None]:
        def hook(module: Fuse, inputs: tuple[list[torch.Tensor]], output: torch.Tensor) -> None:
            terms = [x.detach() for x in inputs[0]]
            watch(f"{name}.weights", output, lambda g: fusion_magnitude(module, terms, g))

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            handles.append(module.register_forward_hook(batch_norm_hook(name)))
        elif isinstance(module, Fuse) and module.weights is not None:
            handles.append(module.register_forward_hook(fuse_hook(name)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def fusion_magnitude(fuse: Fuse, inputs: list[torch.Tensor], gradient: torch.Tensor) -> torch.Tensor:
    """|dw′ⱼ/dwⱼ at Σw held| · (|hⱼ| + Σᵢ w′ᵢ|hᵢ|), in the shape of the fusion weights; h = d/dw′."""
    assert fuse.weights is not None
    weights = fuse.weights.detach()
    axes = (0, 2, 3) if weights.dim() == 2 else (0, 1, 2, 3)
    h = torch.stack([(gradient * x).sum(dim=axes).abs() for x in inputs])
    if fuse.method.endswith("fastattn"):
        positive = torch.relu(weights)
        total = positive.sum(dim=0) + FASTATTN_EPSILON
        normalised, slope = positive / total, (weights > 0) / total
    else:
        normalised = slope = torch.softmax(weights, dim=0)
    return slope * (h + (normalised * h).sum(dim=0))


def tensorflow_backward(
    variables: Mapping[str, np.ndarray],
    config: EfficientDetConfig,
    images: np.ndarray,
    loss_gradient: LossGradient,
    training: bool,
    tap: Callable[[str, Any], Any] = lambda name, x: x,
    dtype: str = "float64",
) -> Backward:
    """The reference forward and backward on ``images`` [N, H, W, 3], in ``dtype``. Imports TensorFlow.

    ``tap`` is :func:`tf_reference.efficientdet.efficientdet`'s; it may replace an activation. ``gradients``
    holds the moving statistics' too: in training nothing depends on them, and they are zero.
    """
    import tensorflow as tf

    from tf_reference.efficientdet import as_tensors, efficientdet

    tensors = as_tensors({**variables, IMAGES: images}, dtype)
    updates: dict[str, tf.Tensor] | None = {} if training else None
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        classes, boxes = efficientdet(tensors, config, tensors[IMAGES], tap, updates)
    outputs = [y.numpy() for y in classes], [y.numpy() for y in boxes]
    class_gradients, box_gradients = loss_gradient(outputs)
    found = tape.gradient(
        classes + boxes,
        tensors,
        [tf.constant(g, dtype) for g in class_gradients + box_gradients],
        unconnected_gradients=tf.UnconnectedGradients.ZERO,
    )
    after = {**tensors, **(updates or {})}
    return Backward(
        outputs,
        {name: gradient.numpy() for name, gradient in found.items()},
        {name: value.numpy() for name, value in after.items() if "/moving_" in name},
    )


def _check_batch(config: EfficientDetConfig, images: np.ndarray) -> None:
    count, height, width = images.shape[:3]
    if count == 1 and _last_level_is_a_pixel(config, (height, width)):
        raise ConfigError(
            f"{config.name} on one {height}×{width} picture has a single pixel at level {config.max_level}, "
            "too few for batch norm in training; use a larger picture, or two"
        )


def _last_level_is_a_pixel(config: EfficientDetConfig, image_size: tuple[int, int]) -> bool:
    return config.feature_sizes(image_size)[config.max_level] == (1, 1)


def shifts(config: EfficientDetConfig, image_size: tuple[int, int]) -> tuple[str, ...]:
    """The batch norms' biases that do nothing in training: the next batch norm takes every shift out again.

    They are those of projections: no activation follows, and neither a shortcut nor a max-pool nor a 1×1
    convolution makes anything but a constant of a constant, up to the batch norm of the next expansion or of
    the level's way into the BiFPN. Not so where a projection reaches a block without expansion (a depthwise
    convolution pads with zeros: a constant is none at the border) or a level as wide as the BiFPN (which has
    no convolution of its own there). A map of one pixel has no border: there the last cell's last node, which
    only the heads read, shifts too. Biases of convolutions ahead of a batch norm are not parameters here.
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
            name = rule.sources[1]  # once, though every level of a head folds the same bias
            yield _compare(name, (name,), biases.pop(name), reference.gradients[name], summed.get(name))


def cancelling(table: list[Rule], model: EfficientDet, ours: Backward) -> dict[str, np.ndarray]:
    """Every parameter whose gradient cancels by construction → Σ|term| of what it is the sum of.

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
    """AutoML bias → the gradient PyTorch implies for it.

    In training a bias ahead of a batch norm does nothing: zero. In evaluation it lowers the running mean of
    each batch norm it was folded into, and d/d mean = −γ/√(variance + ε) · d/d beta.
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
    """``summed``: the magnitudes to measure the error against, where not the reference's own."""
    error, norm = difference(ours, reference), _norm(reference)
    measure = norm if summed is None else _norm(summed)
    if summed is not None and math.isfinite(error.maximum) and measure > 0:
        error = Difference(_norm(ours - reference) / measure, error.maximum)
    return TensorResult(name, sources, norm, measure, error)


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(array.reshape(-1)))
