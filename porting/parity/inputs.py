"""The images that a verification runs on: their size, and seeded or real ones, normalised."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from porting.errors import EfficientDetError
from porting.parity.reference.choose import FileReference
from porting.synthetic import synthetic_image
from pytorch_model.config import EfficientDetConfig
from pytorch_model.detection.preprocess import normalise_array, preprocess

LARGEST_DEFAULT = 512  # pixels a side, if no size is asked for and the model's own is larger


def verification_size(
    config: EfficientDetConfig, text: str = "", reference: FileReference | None = None
) -> tuple[int, int]:
    """The (height, width) to verify at.

    ``text``: ``N``, ``HxW`` or ``native``, as users type it. If it is empty, the size that ``reference`` was
    built for, or the model's own, at most 512. Raises :class:`EfficientDetError` for any other text.
    """
    if not text:
        if reference is not None and reference.size:
            return reference.size
        return at_most(config, LARGEST_DEFAULT)
    if text == "native":
        return config.input_size
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise EfficientDetError(f"--size {text} is not a size; use 512, 384x640 (height x width) or native")
    return int(sides[0]), int(sides[-1])


def at_most(config: EfficientDetConfig, side: int) -> tuple[int, int]:
    """The model's own (height, width), each at most ``side`` pixels."""
    height, width = config.input_size
    return min(height, side), min(width, side)


def seeded_images(config: EfficientDetConfig, size: tuple[int, int], count: int = 1) -> np.ndarray:
    """``count`` different seeded images as the network takes them: float32 [count, H, W, 3], normalised."""
    return normalise_array(np.stack([synthetic_image(*size, seed=seed) for seed in range(count)]), config)


def image_file(config: EfficientDetConfig, size: tuple[int, int], path: Path) -> np.ndarray:
    """An image file, resized and padded to ``size``: float32 [1, H, W, 3], normalised.

    Raises :class:`pytorch_model.detection.preprocess.ImageError` if it cannot be read.
    """
    images = preprocess([path], unresized(config), size).images
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def unresized(config: EfficientDetConfig) -> EfficientDetConfig:
    """``config`` with a network's input of exactly the size that is asked for, whatever its resizer."""
    return config.replace(resizer=dataclasses.replace(config.resizer, pad=True, pad_to_multiple=1))
