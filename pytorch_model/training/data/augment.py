"""Augmentation as AutoML trains: a pure function of an example, draws and settings.

The order is AutoML's: crowds are left out, AutoAugment changes the uint8 image, then normalise, flip, scale,
crop, pad with 0. Boxes and sizes are computed in float32, and sizes truncated. Where AutoML's code fails,
this goes on and counts it (:class:`Counts`).

Source: AutoML ``dataloader.py`` (``InputReader.dataset_parser``, ``DetectionInputProcessor``) and
``object_detection/preprocessor.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pytorch_model.training.data.auto_augment.operations import Picture
from pytorch_model.training.data.auto_augment.policies import PolicyDraws, apply_policy, draw_policy
from pytorch_model.training.data.settings import InputSettings
from pytorch_model.training.data.window import resize_window

_F = np.float32


class Draws(NamedTuple):
    """The random numbers of one image, float32.

    ``flip``: above 0.5 flips. ``scale``: the factor between ``jitter_min`` and ``jitter_max``. ``crop_y``,
    ``crop_x``: in [0, 1), the place of the crop. ``policy``: for AutoAugment; None without it.
    """

    flip: np.float32
    scale: np.float32
    crop_y: np.float32
    crop_x: np.float32
    policy: PolicyDraws | None = None


#: No flip and the whole image, as in AutoML's evaluation.
NO_DRAWS = Draws(_F(0), _F(1), _F(0), _F(0))


def draw(generator: np.random.Generator, settings: InputSettings, boxes: int) -> Draws:
    """Draws for an image with so many ``boxes``, crowds included.

    Always in this order: flip, scale, crop_y, crop_x, then AutoAugment's if there is a policy.
    """
    flip, scale, crop_y, crop_x = generator.random(4, np.float32)
    low, high = _F(settings.jitter_min), _F(settings.jitter_max)
    policy = draw_policy(generator, boxes) if settings.autoaugment_policy else None
    return Draws(flip, scale * (high - low) + low, crop_y, crop_x, policy)


class Counts(NamedTuple):
    """What happened to boxes and images.

    ``crowds``: crowd boxes left out. ``vanished``: boxes without area in the input, such as those outside the
    crop, and boxes that are not finite. ``above_limit``: images with ``max_instances_per_image`` boxes or
    more, crowds included; all boxes are used. ``too_thin``: images whose short side would have been scaled to
    no pixel; it became one. AutoML's training stops at an image of the last two kinds.
    """

    crowds: int = 0
    vanished: int = 0
    above_limit: int = 0
    too_thin: int = 0


class NetworkExample(NamedTuple):
    """One input of the network with its boxes.

    ``image``: float32 [3, h, w], normalised and padded. ``boxes_yxyx``: float32 [M, 4], in pixels of the
    input, from 0 to h - 1 and w - 1. ``classes``: int64 [M]. ``image_scale``: original pixels per pixel of
    the input.
    """

    image: Tensor
    boxes_yxyx: Tensor
    classes: Tensor
    image_scale: float
    counts: Counts


def augment(
    pixels: np.ndarray,
    boxes_yxyx: np.ndarray,
    classes: np.ndarray,
    crowd: np.ndarray,
    draws: Draws,
    settings: InputSettings,
) -> NetworkExample:
    """A training example → the network's input.

    ``pixels``: uint8 [H, W, 3]. ``boxes_yxyx``: float32 [M, 4], relative to the image, 0…1. ``classes``:
    int64 [M]. ``crowd``: bool [M].
    """
    skipped = crowd & settings.skip_crowd_during_training
    finite = np.isfinite(boxes_yxyx).all(axis=1)
    kept = ~skipped & finite
    picture = Picture(pixels, boxes_yxyx[kept])
    if settings.autoaugment_policy is not None:
        assert draws.policy is not None, "these draws were made for settings without a policy"
        picture = apply_policy(picture, settings.autoaugment_policy, draws.policy)
    if settings.input_rand_hflip and draws.flip > _F(0.5):
        picture = flip(picture)
    counts = Counts(
        crowds=int(skipped.sum()),
        vanished=int((~finite & ~skipped).sum()),
        above_limit=int(len(crowd) >= settings.max_instances_per_image),
    )
    target = settings.target_size or settings.image_size
    return _fitted(picture, classes[kept], draws, target, settings, counts)


def for_validation(
    pixels: np.ndarray, boxes_yxyx: np.ndarray, classes: np.ndarray, settings: InputSettings
) -> NetworkExample:
    """As :func:`augment` with nothing random, as in AutoML's evaluation: for the validation loss.

    AutoML uses crowds like other boxes there; leave them out of ``boxes_yxyx`` if they should not count.
    """
    finite = np.isfinite(boxes_yxyx).all(axis=1)
    counts = Counts(
        vanished=int((~finite).sum()), above_limit=int(len(finite) >= settings.max_instances_per_image)
    )
    picture = Picture(pixels, boxes_yxyx[finite])
    return _fitted(picture, classes[finite], NO_DRAWS, settings.image_size, settings, counts)


def flip(picture: Picture) -> Picture:
    """Left to right. The pixels are a view."""
    top, left, bottom, right = picture.boxes_yxyx.T
    return Picture(picture.pixels[:, ::-1], np.stack([top, _F(1) - right, bottom, _F(1) - left], axis=1))


class Placement(NamedTuple):
    """``size``: (height, width) of the whole scaled image; ``offset``: where in it the input begins.

    ``scale``: pixels of the input per original pixel. ``too_thin``: a side was raised to one pixel.
    """

    size: tuple[int, int]
    offset: tuple[int, int]
    scale: np.float32
    too_thin: bool


def place(
    size: tuple[int, ...], draws: Draws, target: tuple[int, int], image_size: tuple[int, int]
) -> Placement:
    """Where an image of ``size`` goes in the input. All sizes are (height, width)."""
    height, width = _F(size[0]), _F(size[1])
    asked = [_F(max(1, int(draws.scale * _F(side)))) for side in target]
    scale = np.minimum(asked[1] / width, asked[0] / height)
    scaled = int(height * scale), int(width * scale)
    raised = max(1, scaled[0]), max(1, scaled[1])
    spare = [_F(max(0, side - given)) for side, given in zip(raised, image_size, strict=True)]
    offset = int(spare[0] * draws.crop_y), int(spare[1] * draws.crop_x)
    return Placement(raised, offset, scale, raised != scaled)


def _fitted(
    picture: Picture,
    classes: np.ndarray,
    draws: Draws,
    target: tuple[int, int],
    settings: InputSettings,
    counts: Counts,
) -> NetworkExample:
    """Normalise, scale, crop and pad the image; move the boxes with it."""
    placement = place(picture.pixels.shape, draws, target, settings.image_size)
    image = np.zeros((3, *settings.image_size), np.float32)
    resize_window(
        picture.pixels, placement.size, placement.offset, settings.mean_rgb, settings.stddev_rgb, image
    )
    if settings.scale_range:
        image = image * _F(2) / _F(255) - _F(1)
    boxes, kept = _placed(picture.boxes_yxyx, placement, settings.image_size)
    return NetworkExample(
        torch.from_numpy(image),
        torch.from_numpy(boxes[kept]),
        torch.from_numpy(classes[kept].astype(np.int64)),
        float(_F(1) / placement.scale),
        counts._replace(vanished=counts.vanished + int((~kept).sum()), too_thin=int(placement.too_thin)),
    )


def _placed(
    boxes_yxyx: np.ndarray, placement: Placement, image_size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Relative boxes → boxes in pixels of the input, clipped to its last row and column; which have area."""
    last = np.array([side - 1 for side in image_size] * 2, np.float32)
    scaled = boxes_yxyx * np.array(placement.size * 2, np.float32)
    boxes = (scaled - np.array(placement.offset * 2, np.float32)).clip(0, last)
    return boxes, (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) != 0
