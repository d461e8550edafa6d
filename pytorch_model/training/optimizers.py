"""The optimizers, as each of AutoML's trainers states them.

Sources: ``MomentumOptimizer`` and ``AdamOptimizer`` of ``tf.compat.v1.train``; ``SGD`` and ``Adam`` of
``tf.keras.optimizers.legacy``. Weight decay is part of the loss, and the rate is set before every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pytorch_model.training.recipe import Recipe


def make_optimizer(parameters: Iterable[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; :func:`set_rate` gives it the rate of the next step, which is 0 until then."""
    if recipe.optimizer == "adam":
        return TensorFlowAdam(parameters, recipe.betas, recipe.adam_epsilon)
    if recipe.rate_in_velocity:
        return VelocitySGD(parameters, recipe.momentum)
    return torch.optim.SGD(parameters, lr=0.0, momentum=recipe.momentum, weight_decay=0.0)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


class VelocitySGD(torch.optim.Optimizer):
    """Momentum with the rate inside: v ← momentum · v − rate · gradient, w ← w + v.

    It differs from ``torch.optim.SGD`` whenever the rate changes. State of a parameter: ``velocity``.
    """

    def __init__(self, parameters: Iterable[Tensor], momentum: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters, gradients = _with_gradients(group)
            if not parameters:
                continue
            (velocities,) = _state(self, parameters, "velocity")
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, gradients, alpha=-group["lr"])
            torch._foreach_add_(parameters, velocities)


class TensorFlowAdam(torch.optim.Optimizer):
    """Adam with TensorFlow's ε: w ← w − rate_t · m/(√v + ε), rate_t = rate · √(1 − β₂ᵗ)/(1 − β₁ᵗ).

    ``torch.optim.Adam`` adds ε to √v/√(1 − β₂ᵗ) (Kingma and Ba 2015, algorithm 1; TensorFlow's ε is the
    paper's "epsilon hat", end of section 2). State of a parameter: ``m``, ``v``; of a group: ``updates`` t.
    """

    def __init__(self, parameters: Iterable[Tensor], betas: tuple[float, float], epsilon: float) -> None:
        super().__init__(parameters, {"lr": 0.0, "betas": betas, "epsilon": epsilon, "updates": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters, gradients = _with_gradients(group)
            if not parameters:
                continue
            first, second = _state(self, parameters, "m", "v")
            beta1, beta2 = group["betas"]
            group["updates"] += 1
            t = group["updates"]
            torch._foreach_mul_(first, beta1)
            torch._foreach_add_(first, gradients, alpha=1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
            divisors = torch._foreach_sqrt(second)
            torch._foreach_add_(divisors, group["epsilon"])
            rate = group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
            torch._foreach_addcdiv_(parameters, first, divisors, -rate)


def _with_gradients(group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    return parameters, [parameter.grad for parameter in parameters]


def _state(optimizer: torch.optim.Optimizer, parameters: list[Tensor], *names: str) -> list[list[Tensor]]:
    """One list of tensors a name, which begin at 0."""
    for parameter in parameters:
        for name in names:
            if name not in optimizer.state[parameter]:
                optimizer.state[parameter][name] = torch.zeros_like(parameter)
    return [[optimizer.state[parameter][name] for parameter in parameters] for name in names]
