"""AutoML's clipping: the gradient of each variable, then all of them together, to the same norm.

Source: AutoML ``det_model_fn.py`` and ``tf2/train_lib.py``; ``tf.clip_by_norm``, ``tf.clip_by_global_norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pytorch_model.bifpn import Fuse


class Norms(NamedTuple):
    """Global norms, scalars: ``raw`` before clipping, ``each`` after that of the variables, ``final``, which
    AutoML logs as ``gradient_norm``. ``clipped``: how many of AutoML's variables were above the limit.
    """

    raw: Tensor
    each: Tensor
    final: Tensor
    clipped: Tensor


def stacked_parameters(model: nn.Module) -> set[Tensor]:
    """The parameters that are several variables in AutoML, one a row: the fusion weights."""
    return {
        module.weights
        for module in model.modules()
        if isinstance(module, Fuse) and module.weights is not None
    }


@torch.no_grad()
def clip_gradients(parameters: Sequence[Tensor], stacked: set[Tensor], limit: float) -> Norms:
    """Clip ``grad`` of every parameter that has one, in place, without waiting for the device.

    ``limit`` 0 only measures.

    g ← g · limit/max(‖g‖, limit) for each variable; then all by limit · min(1/G, 1/limit) with the global
    norm G of these. Nothing is added to a norm. As in TensorFlow a variable whose norm overflows becomes 0,
    a gradient that is infinite or not a number makes all of them NaN.
    """
    having = [(p, p.grad) for p in parameters if p.grad is not None]
    gradients = [gradient for _, gradient in having]
    norms = list(torch._foreach_norm(gradients))
    for i, (parameter, gradient) in enumerate(having):
        if parameter in stacked:
            norms[i] = _row_norms(gradient)
    flat = torch.cat([norm.reshape(-1) for norm in norms])
    raw = torch.linalg.vector_norm(flat)
    if not limit:
        return Norms(raw, raw, raw, flat.new_zeros((), dtype=torch.int64))
    torch._foreach_mul_(gradients, limit)
    torch._foreach_div_(gradients, [norm.clamp(min=limit) for norm in norms])
    each = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    scale = limit * torch.minimum(1 / each, each.new_full((), 1 / limit))
    scale = torch.where(each.isfinite(), scale, torch.nan)
    torch._foreach_mul_(gradients, scale)
    return Norms(raw, each, each * scale, (flat > limit).sum())


def _row_norms(gradient: Tensor) -> Tensor:
    """In a shape that divides ``gradient``, [rows] or [rows, channels]."""
    return gradient.abs() if gradient.dim() == 1 else torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
