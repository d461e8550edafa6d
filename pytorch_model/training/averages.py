"""Exponential moving averages of the weights, with AutoML's decay, which grows in the first steps.

Sources: ``tf.train.ExponentialMovingAverage`` as ``det_model_fn.py`` uses it; ``MovingAverage`` of TensorFlow
Addons with ``dynamic_decay``, as ``tf2/train_lib.py`` does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pytorch_model.training.recipe import Recipe
from pytorch_model.training.schedule import Float


def moved(decay: float, step: int, precision: Float = np.float32) -> float:
    """The part 1 − d by which an average moves to the new value; d = min(``decay``, (1 + step)/(10 + step)).

    Every operation is rounded to ``precision``. In float32, AutoML's 0.9998 makes 1.9997358e-4.
    """
    real = precision
    return float(real(1) - min(real(decay), real(1 + step) / real(10 + step)))


class Averages:
    """The averages of a model's tensors, by state-dict key. ``values`` is empty if the recipe has none.

    With ``averages_all`` they cover the parameters, also frozen ones, and the statistics of the batch norms;
    else the parameters that require a gradient. ``start``: the averages of an earlier run; a key that is not
    in it, and all by default, begin at the model's value.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, start: Mapping[str, Tensor] | None = None) -> None:
        self._decay, self._first = recipe.moving_average_decay or 0.0, recipe.first_average
        sources: dict[str, Tensor] = {
            name: p for name, p in model.named_parameters() if recipe.averages_all or p.requires_grad
        }
        if recipe.averages_all:
            sources.update((name, b) for name, b in model.named_buffers() if b.is_floating_point())
        self._sources = {name: x.detach() for name, x in sources.items()} if self._decay else {}
        self.values = {
            name: (start or {}).get(name, x).detach().to(x, copy=True) for name, x in self._sources.items()
        }

    def update(self, step: int) -> None:
        """Move every average to its tensor's value; ``step``: how many updates there were before."""
        if not self.values:
            return
        averages, tensors = list(self.values.values()), list(self._sources.values())
        precision = np.float64 if tensors[0].dtype == torch.float64 else np.float32
        apart = torch._foreach_sub(averages, tensors)
        torch._foreach_mul_(apart, moved(self._decay, self._first + step, precision))
        torch._foreach_sub_(averages, apart)
