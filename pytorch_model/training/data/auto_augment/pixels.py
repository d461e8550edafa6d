"""Operations of AutoAugment on pixels: uint8 [H, W, 3] and arguments → uint8 [H, W, 3].

They round and wrap as TensorFlow's do, which is often not as Pillow's do. Numbers are float32.

Source: AutoML ``aug/autoaugment.py``; TensorFlow Addons ``image/transform_ops.py`` for rotations and shears;
Cubuk et al., AutoAugment, CVPR 2019, and Zoph et al., Learning Data Augmentation Strategies for Object
Detection, ECCV 2020.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np

GREY = np.uint8(128)  # what an operation writes where there is no image
_F = np.float32
_Row: TypeAlias = "tuple[float | np.float32, float | np.float32, float | np.float32]"


def blend(first: np.ndarray, second: np.ndarray, factor: float) -> np.ndarray:
    """first + factor · (second - first), truncated; a factor above 1 goes beyond ``second``, clipped."""
    if factor in (0, 1):
        return second if factor else first
    base = first.astype(_F)
    mixed = base + _F(factor) * (second.astype(_F) - base)
    return mixed.clip(0, 255).astype(np.uint8)


def auto_contrast(pixels: np.ndarray) -> np.ndarray:
    """Each channel stretched to 0…255; one of a single value stays."""
    return np.stack([_stretched(channel) for channel in np.moveaxis(pixels, 2, 0)], axis=2)


def _stretched(channel: np.ndarray) -> np.ndarray:
    low, high = _F(channel.min()), _F(channel.max())
    if low >= high:
        return channel
    scale = _F(255) / (high - low)
    return (channel.astype(_F) * scale - low * scale).clip(0, 255).astype(np.uint8)


def equalize(pixels: np.ndarray) -> np.ndarray:
    """Each channel with a flat histogram."""
    return np.stack([_equalized(channel) for channel in np.moveaxis(pixels, 2, 0)], axis=2)


def _equalized(channel: np.ndarray) -> np.ndarray:
    counts = np.bincount(channel.reshape(-1), minlength=256)
    step = (counts.sum() - counts[counts > 0][-1]) // 255
    if step == 0:
        return channel
    table = (np.concatenate([[0], counts.cumsum()[:-1]]) + step // 2) // step
    table[0] = 0
    return table.clip(0, 255).astype(np.uint8)[channel]


def posterize(pixels: np.ndarray, bits: int) -> np.ndarray:
    """The highest ``bits`` of each value. TensorFlow shifts by at most 7, so 0 bits are 1 bit."""
    shift = min(8 - bits, 7)
    return pixels >> shift << shift


def solarize(pixels: np.ndarray, threshold: int) -> np.ndarray:
    """Values from the threshold on are inverted. The threshold is a uint8: 256 is 0."""
    return np.where(pixels < threshold % 256, pixels, 255 - pixels)


def solarize_add(pixels: np.ndarray, addition: int) -> np.ndarray:
    """Values below 128 become brighter."""
    added = (pixels.astype(np.int64) + addition).clip(0, 255).astype(np.uint8)
    return np.where(pixels < 128, added, pixels)


def grey(pixels: np.ndarray) -> np.ndarray:
    """uint8 [H, W], as ``tf.image.rgb_to_grayscale``."""
    red, green, blue = np.moveaxis(pixels.astype(_F) * _F(1 / 255), 2, 0)
    light = red * _F(0.2989) + green * _F(0.587) + blue * _F(0.114)
    return (light * _F(255.5)).astype(np.uint8)


def color(pixels: np.ndarray, factor: float) -> np.ndarray:
    return blend(np.repeat(grey(pixels)[..., None], 3, axis=2), pixels, factor)


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blended with the mean of the grey image, truncated."""
    return blend(np.full_like(pixels, int(grey(pixels).mean())), pixels, factor)


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return blend(np.zeros_like(pixels), pixels, factor)


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blended with a 3 x 3 mean whose centre counts five times; the border of one pixel stays."""
    if min(pixels.shape[:2]) < 3:
        return pixels
    smooth = pixels.copy()
    height, width = pixels.shape[:2]
    source = pixels.astype(_F)
    total = np.zeros((height - 2, width - 2, 3), _F)
    for y in range(3):
        for x in range(3):
            weight = _F(5 if y == x == 1 else 1) / _F(13)
            total += source[y : y + height - 2, x : x + width - 2] * weight
    smooth[1:-1, 1:-1] = total.clip(0, 255).astype(np.uint8)
    return blend(smooth, pixels, factor)


def cutout(pixels: np.ndarray, centre: tuple[int, int], reach: tuple[int, int]) -> np.ndarray:
    """A grey rectangle: ``reach`` pixels up and left of ``centre``, and down and right, without the last."""
    (y, x), (high, wide) = centre, reach
    result = pixels.copy()
    result[max(0, y - high) : y + high, max(0, x - wide) : x + wide] = GREY
    return result


def rotate(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """About the centre, counter-clockwise for positive ``degrees``."""
    cos, sin = cosine_and_sine(degrees)
    bottom, right = _F(pixels.shape[0] - 1), _F(pixels.shape[1] - 1)
    x_offset = (right - (cos * right - sin * bottom)) / _F(2)
    y_offset = (bottom - (sin * right + cos * bottom)) / _F(2)
    return transform(pixels, (cos, -sin, x_offset), (sin, cos, y_offset))


def cosine_and_sine(degrees: float) -> tuple[np.float32, np.float32]:
    """Of the float32 angle. Computed in float64, because NumPy's float32 ones differ between processors."""
    angle = float(_F(degrees * math.pi / 180))
    return _F(math.cos(angle)), _F(math.sin(angle))


def translate_x(pixels: np.ndarray, left: float) -> np.ndarray:
    """The content moves to the left by so many pixels, to the right for a negative number."""
    return transform(pixels, (1, 0, left), (0, 1, 0))


def translate_y(pixels: np.ndarray, up: float) -> np.ndarray:
    return transform(pixels, (1, 0, 0), (0, 1, up))


def shear_x(pixels: np.ndarray, level: float) -> np.ndarray:
    return transform(pixels, (1, level, 0), (0, 1, 0))


def shear_y(pixels: np.ndarray, level: float) -> np.ndarray:
    return transform(pixels, (1, 0, 0), (level, 1, 0))


def transform(pixels: np.ndarray, across: _Row, down: _Row) -> np.ndarray:
    """Each pixel is the nearest one to (across · (x, y, 1), down · (x, y, 1)), or grey outside the image."""
    height, width = pixels.shape[:2]
    x, y = np.arange(width, dtype=_F)[None], np.arange(height, dtype=_F)[:, None]
    from_x, from_y = (_round(_F(a) * x + _F(b) * y + _F(c)) for a, b, c in (across, down))
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    found = pixels[from_y.clip(0, height - 1), from_x.clip(0, width - 1)]
    return np.where(inside[..., None], found, GREY)


def _round(values: np.ndarray) -> np.ndarray:
    """To the nearest whole number, halves away from zero, as C's ``round``."""
    return np.trunc(values + np.copysign(_F(0.5), values)).astype(np.int64)
