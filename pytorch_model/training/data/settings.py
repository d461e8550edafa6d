"""How an example becomes an input of the network: AutoML's hyper-parameters of it, by its names.

Source: AutoML ``hparams_config.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pytorch_model.config import BOUNDS, EfficientDetConfig, Resizer, shown
from pytorch_model.errors import ConfigError
from pytorch_model.training.data.auto_augment.policies import POLICIES

#: Far above any useful value; a scaled image has so many times more pixels per side than the input.
MOST_JITTER = 100.0


@dataclass(frozen=True)
class InputSettings:
    """How an example becomes an input of the network. Names and defaults are AutoML's hyper-parameters.

    ``image_size``: (height, width) of the input. ``mean_rgb``, ``stddev_rgb``: in grey levels.
    ``scale_range``: the normalised and padded image · 2 / 255 - 1, for AdvProp's models.
    The others are for training. ``input_rand_hflip``: flip left to right with probability one half.
    ``jitter_min``, ``jitter_max``: the image is fitted into ``target_size`` (None: ``image_size``) times a
    factor between them. ``autoaugment_policy``: None or one of ``POLICIES``. ``grid_mask``: must be off.
    ``skip_crowd_during_training``: leave out crowd boxes. ``max_instances_per_image``: from so many boxes on,
    crowds included, AutoML stops; here all boxes are used, and the image is counted.

    Raises :class:`ConfigError` on a value that is not possible.
    """

    image_size: tuple[int, int]
    mean_rgb: tuple[float, float, float]
    stddev_rgb: tuple[float, float, float]
    scale_range: bool = False
    input_rand_hflip: bool = True
    jitter_min: float = 0.1
    jitter_max: float = 2.0
    target_size: tuple[int, int] | None = None
    autoaugment_policy: str | None = None
    grid_mask: bool = False
    skip_crowd_during_training: bool = True
    max_instances_per_image: int = 100

    def __post_init__(self) -> None:
        if not (_is_real(self.jitter_min) and self.jitter_min > 0):
            raise ConfigError(f"jitter_min is {shown(self.jitter_min)}, must be a number above 0")
        if not (_is_real(self.jitter_max) and self.jitter_min <= self.jitter_max <= MOST_JITTER):
            raise ConfigError(
                f"jitter_max is {shown(self.jitter_max)}, must be from jitter_min ({self.jitter_min}) to "
                f"{MOST_JITTER:g}"
            )
        target = self.target_size
        if target is not None and not _is_size(target):
            raise ConfigError(
                f"target_size is {shown(target)}, must be None or (height, width) in whole pixels"
            )
        if self.grid_mask:
            raise ConfigError("grid_mask is not supported: no recording proves it; leave it out")
        if self.autoaugment_policy is not None and self.autoaugment_policy not in POLICIES:
            raise ConfigError(
                f"autoaugment_policy is {shown(self.autoaugment_policy)}, must be None or one of "
                f"{', '.join(POLICIES)}"
            )
        limit = self.max_instances_per_image
        if type(limit) is not int or limit < 1:
            raise ConfigError(f"max_instances_per_image is {shown(limit)}, must be a whole number from 1")

    @classmethod
    def of(cls, config: EfficientDetConfig, **hparams: Any) -> InputSettings:
        """The settings for the network of ``config``; ``hparams`` are fields of this class.

        A configuration has AdvProp's normalisation as mean and deviation 127.5. With ``scale_range=True`` it
        is AutoML's own arithmetic, whose padding is black instead of grey.
        Raises :class:`ConfigError` if the network's input is not made as AutoML makes it.
        """
        if config.resizer != Resizer():
            raise ConfigError(
                f"{config.name}: its images are {config.resizer}; training makes images as AutoML does. Give "
                "a configuration with AutoML's resizer"
            )
        values = {
            "image_size": config.image_size,
            "mean_rgb": config.mean_rgb,
            "stddev_rgb": config.stddev_rgb,
        }
        if hparams.get("scale_range"):
            if {*config.mean_rgb, *config.stddev_rgb} != {127.5}:
                raise ConfigError(
                    f"scale_range=true is for models whose mean_rgb and stddev_rgb are 127.5; those of "
                    f"{config.name} are {config.mean_rgb} and {config.stddev_rgb}; leave it out"
                )
            values |= {"mean_rgb": (0.0,) * 3, "stddev_rgb": (1.0,) * 3}
        return cls(**{**values, **hparams})


def _is_size(value: Any) -> bool:
    least, most = BOUNDS["image_size"]
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(type(side) is int and least <= side <= most for side in value)
    )


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
