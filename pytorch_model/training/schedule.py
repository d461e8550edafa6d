"""The learning rate of every step.

Sources: AutoML ``det_model_fn.py`` (``update_learning_rate_schedule_parameters``, ``learning_rate_schedule``)
and ``tf2/train_lib.py``, which states the same formulas again.
"""

from __future__ import annotations

import math

import numpy as np

from pytorch_model.errors import ConfigError
from pytorch_model.training.recipe import Recipe

BASE_BATCH_SIZE = 64  # to which ``learning_rate`` belongs

Float = type[np.float32] | type[np.float64]


class Schedule:
    """``schedule(step)``: the rate of the update after ``step`` others; 0 is the first step.

    ``batch_size``: images in one update, over all processes. ``examples``: images in one epoch. Every
    operation is rounded to ``precision``: AutoML computes in float32.

    The cosine reaches 0 at step ``total_steps − warmup_steps`` and rises again. It begins at step 0, so the
    rate jumps down where the warm-up ends. Past ``total_steps`` the polynomial is NaN, as AutoML's, and so is
    the cosine after a warm-up that lasts the whole run.

    Raises :class:`ConfigError` if an epoch has no step.
    """

    def __init__(self, recipe: Recipe, batch_size: int, examples: int, precision: Float = np.float32) -> None:
        self.precision = precision
        steps_per_epoch = examples // batch_size if recipe.whole_epochs else examples / batch_size
        self.total_steps = int(recipe.num_epochs * steps_per_epoch)
        if not self.total_steps:
            raise ConfigError(
                f"{examples} training images are less than one batch of {batch_size}; use a smaller batch"
            )
        self.warmup_steps = int(recipe.lr_warmup_epoch * steps_per_epoch)
        self._drops = {
            int(recipe.first_lr_drop_epoch * steps_per_epoch): 0.1,
            int(recipe.second_lr_drop_epoch * steps_per_epoch): 0.01,
        }
        scale = batch_size / BASE_BATCH_SIZE
        self.learning_rate = recipe.learning_rate * scale
        self.warmup_init = recipe.lr_warmup_init * (scale if recipe.scales_warmup_init else 1)
        self._power = recipe.poly_lr_power
        self._rate = {
            "cosine": self._cosine,
            "stepwise": self._stepwise,
            "polynomial": self._polynomial,
            "constant": self._constant,
        }[recipe.lr_decay_method]

    def __call__(self, step: int) -> float:
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(self._rate(step))

    def _warm(self, step: int) -> np.floating:
        real = self.precision
        risen = real(step) / real(self.warmup_steps) * real(self.learning_rate - self.warmup_init)
        return real(self.warmup_init) + risen

    def _cosine(self, step: int) -> np.floating:
        if step < self.warmup_steps:
            return self._warm(step)
        real = self.precision
        angle = real(math.pi) * real(step) / real(self.total_steps - self.warmup_steps)
        if not np.isfinite(angle):
            return real(math.nan)
        # The cosine of the C library, rounded once: NumPy's own for float32 depends on the processor.
        return real(0.5 * self.learning_rate) * (real(1) + real(math.cos(angle)))

    def _stepwise(self, step: int) -> np.floating:
        rate = self._warm(step) if step < self.warmup_steps else self.precision(self.learning_rate)
        for drop, factor in self._drops.items():  # also during the warm-up
            if step >= drop:
                rate = self.precision(self.learning_rate * factor)
        return rate

    def _polynomial(self, step: int) -> np.floating:
        if step < self.warmup_steps:
            return self._warm(step)
        real = self.precision
        left = real(1) - real(step) / real(self.total_steps)
        if left < 0:
            return real(math.nan)
        return real(self.learning_rate) * real(math.pow(left, real(self._power)))

    def _constant(self, step: int) -> np.floating:
        return self.precision(self.learning_rate)
