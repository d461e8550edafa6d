"""The recipe: AutoML's hyper-parameters of the optimisation, by its names, and where its two trainers differ.

Sources: AutoML ``hparams_config.py``; ``main.py`` with ``det_model_fn.py`` (``legacy``), which made the
released weights; ``tf2/train.py`` with ``tf2/train_lib.py`` (``tf2``).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pytorch_model.config import shown
from pytorch_model.errors import ConfigError
from pytorch_model.training.losses import LossSettings

DECAY_METHODS = ("cosine", "stepwise", "polynomial", "constant")
OPTIMIZERS = ("sgd", "adam")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how gradients become weights. Raises :class:`ConfigError` on a bad value.

    The first part has AutoML's names and defaults. Epochs may be fractions, but not ``num_epochs``. 0 or
    None switches off ``clip_gradients_norm``, ``moving_average_decay`` and ``positives_momentum``.

    The second part is what a user does not set: it makes one of the two trainers. What only one of them has,
    the constant rate (``legacy``) and the IoU losses (``tf2``), works with both here.
    """

    num_epochs: int = 300
    learning_rate: float = 0.08  # for a batch of 64
    lr_warmup_init: float = 0.008
    lr_warmup_epoch: float = 1.0
    lr_decay_method: str = "cosine"
    first_lr_drop_epoch: float = 200.0
    second_lr_drop_epoch: float = 250.0
    poly_lr_power: float = 0.9
    optimizer: str = "sgd"
    momentum: float = 0.9
    clip_gradients_norm: float | None = 10.0
    weight_decay: float = 4e-5
    moving_average_decay: float | None = 0.9998
    positives_momentum: float | None = None
    var_freeze_expr: str | None = None
    losses: LossSettings = field(default_factory=LossSettings)  # its fields are AutoML's names too

    rate_in_velocity: bool = False  # momentum: v ← m·v − rate·g, w ← w + v; else v ← m·v + g, w ← w − rate·v
    scales_warmup_init: bool = True  # by the batch, as the learning rate
    whole_epochs: bool = False  # an epoch has a whole number of steps, rounded down
    averages_all: bool = True  # also what is not trained: batch-norm statistics and frozen variables
    first_average: int = 1  # the step number in the decay of the first update of the averages
    adam_beta1: float | None = 0.9  # None: ``momentum``
    adam_epsilon: float = 1e-8
    decays_frozen: bool = True  # the loss has the weight decay of frozen kernels; no gradient has it
    clips_at_negative: bool = True  # a negative ``clip_gradients_norm`` counts by its magnitude; else: off

    def __post_init__(self) -> None:
        for name, (fine, what) in _CHECKS.items():
            value = getattr(self, name)
            if not fine(value):
                raise ConfigError(f"{name} is {shown(value)}, must be {what}")

    @property
    def clip_norm(self) -> float:
        """The largest norm of a gradient; 0: no clipping."""
        norm = self.clip_gradients_norm or 0.0
        return abs(norm) if self.clips_at_negative else max(norm, 0.0)

    @property
    def betas(self) -> tuple[float, float]:
        """Adam's."""
        return self.momentum if self.adam_beta1 is None else self.adam_beta1, 0.999


def with_hparams(recipe: Recipe, hparams: Mapping[str, Any]) -> Recipe:
    """``recipe`` with other values of AutoML's hyper-parameters.

    Raises :class:`ConfigError` on a name that is not in :data:`HPARAM_NAMES`, or a bad value.
    """
    for name in hparams:
        if name not in HPARAM_NAMES:
            raise ConfigError(f"{shown(name)} is not part of the recipe; it has {', '.join(HPARAM_NAMES)}")
    of_losses = {name: value for name, value in hparams.items() if name in _LOSS_NAMES}
    for name, value in of_losses.items():
        if name != "iou_loss_type" and not _is_number(value):
            raise ConfigError(f"{name} is {shown(value)}, must be a number")
    others = {name: value for name, value in hparams.items() if name not in _LOSS_NAMES}
    return dataclasses.replace(recipe, losses=dataclasses.replace(recipe.losses, **of_losses), **others)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(within: Callable[[float], bool], what: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: _is_number(value) and within(value), what


def _number_or_none(within: Callable[[float], bool], what: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value is None or (_is_number(value) and within(value)), what


def _one_of(names: tuple[str, ...]) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in names, f"one of {', '.join(names)}"


def _is_expression(value: Any) -> bool:
    try:
        re.compile("" if value is None else value)
    except (re.error, TypeError):
        return False
    return True


_NOT_NEGATIVE = _number(lambda x: x >= 0, "a number from 0 on")
_FRACTION_OR_NONE = _number_or_none(lambda x: 0 <= x < 1, "a number from 0 to below 1, or None")

#: AutoML's hyper-parameters in :class:`Recipe` → (whether a value is possible, what is).
_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "num_epochs": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
    "learning_rate": _NOT_NEGATIVE,
    "lr_warmup_init": _NOT_NEGATIVE,
    "lr_warmup_epoch": _NOT_NEGATIVE,
    "lr_decay_method": _one_of(DECAY_METHODS),
    "first_lr_drop_epoch": _NOT_NEGATIVE,
    "second_lr_drop_epoch": _NOT_NEGATIVE,
    "poly_lr_power": _NOT_NEGATIVE,
    "optimizer": _one_of(OPTIMIZERS),
    "momentum": _number(lambda x: 0 <= x < 1, "a number from 0 to below 1"),
    "clip_gradients_norm": _number_or_none(lambda x: True, "a number, or None"),
    "weight_decay": _NOT_NEGATIVE,
    "moving_average_decay": _FRACTION_OR_NONE,
    "positives_momentum": _FRACTION_OR_NONE,
    "var_freeze_expr": (_is_expression, "a regular expression, or None"),
}
_LOSS_NAMES = tuple(item.name for item in dataclasses.fields(LossSettings))

#: AutoML's hyper-parameters that a recipe has.
HPARAM_NAMES = (*_CHECKS, *_LOSS_NAMES)

#: ``legacy`` made the released weights.
RECIPES: Mapping[str, Recipe] = {
    "legacy": Recipe(),
    "tf2": Recipe(
        rate_in_velocity=True,
        scales_warmup_init=False,
        whole_epochs=True,
        averages_all=False,
        first_average=0,
        adam_beta1=None,
        adam_epsilon=1e-7,
        decays_frozen=False,
        clips_at_negative=False,
    ),
}
