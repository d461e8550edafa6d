"""One network forward and backward, in PyTorch or by the TensorFlow reference: its gradients by parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pytorch_model.bifpn import FASTATTN_EPSILON, Fuse
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet

IMAGES = "images"

#: Class and box outputs of one network, one array [N, H_l, W_l, outputs] per level.
Outputs = tuple[list[np.ndarray], list[np.ndarray]]

#: The gradient of a loss with respect to the outputs, in the outputs' shapes.
LossGradient = Callable[[Outputs], Outputs]


@dataclass(frozen=True)
class Backward:
    """The result of one forward and one backward pass. Names are those of the network's framework.

    ``gradients``: by parameter, and under ``images`` the input's, [N, H, W, 3]. ``statistics``: every moving
    statistic after the forward pass. Arrays have the layout of the framework they come from.

    ``summed``, from PyTorch only: the sum of magnitudes Σ|term| where a gradient is Σ term. It has entries
    for a batch norm's ``bias`` and ``running_mean`` (a shift after it, and one before it) and for fusion
    weights.
    """

    outputs: Outputs
    gradients: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]
    summed: dict[str, np.ndarray] = field(default_factory=dict)


def random_projection(outputs: Outputs) -> Outputs:
    """The gradient of a scalar of order one, ``Σ_levels ⟨r, outputs⟩ / √size``: seeded r, standard normal."""
    rng = np.random.default_rng(0)
    classes, boxes = ([rng.standard_normal(x.shape) / np.sqrt(x.size) for x in kind] for kind in outputs)
    return classes, boxes


def pytorch_backward(model: EfficientDet, images: np.ndarray, loss_gradient: LossGradient) -> Backward:
    """Run ``model`` forward and backward on ``images`` [N, H, W, 3], in its own mode, float type and device.

    In training mode the model's running statistics change, as in any training step. The ``grad`` fields of
    parameters do not change.
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
    """During this context, a backward pass fills in :attr:`Backward.summed`; zeros without a gradient."""
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
    """|dw′ⱼ/dwⱼ with Σw constant| · (|hⱼ| + Σᵢ w′ᵢ|hᵢ|), in the shape of the fusion weights; h = d/dw′."""
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
    """Run the reference forward and backward on ``images`` [N, H, W, 3], in ``dtype``. Imports TensorFlow.

    ``tap``: see :func:`tf_reference.efficientdet.efficientdet`; it may replace an activation. ``gradients``
    includes those of the moving statistics, which are zero in training because nothing depends on them.
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
