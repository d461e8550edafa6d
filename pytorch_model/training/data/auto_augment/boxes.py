"""How AutoAugment's geometric operations move boxes: relative yxyx, float32 [M, 4] → float32 [M, 4].

Corners become whole pixels on the way, truncated towards zero. A box never vanishes here: one that has left
the image keeps a strip of 0.05 at its edge.

Source: AutoML ``aug/autoaugment.py`` (``_rotate_bbox``, ``_shear_bbox``, ``_shift_bbox``,
``_check_bbox_area``).
"""

from __future__ import annotations

import numpy as np

from pytorch_model.training.data.auto_augment.pixels import cosine_and_sine

_F = np.float32
LEAST_SIDE = _F(0.05)


def rotate(boxes_yxyx: np.ndarray, size: tuple[int, int], degrees: float) -> np.ndarray:
    """``size``: (height, width) of the image. The result encloses the rotated corners."""
    height, width = map(_F, size)
    cos, sin = cosine_and_sine(degrees)
    up = -np.trunc(height * (boxes_yxyx[:, [0, 2]] - _F(0.5)))  # from the centre
    right = np.trunc(width * (boxes_yxyx[:, [1, 3]] - _F(0.5)))
    y, x = _corners(up, right)
    new_y, new_x = np.trunc(cos * y + sin * x), np.trunc(cos * x - sin * y)
    half = _F(0.5)
    return _kept(
        -(new_y.max(1) / height - half),
        new_x.min(1) / width + half,
        -(new_y.min(1) / height - half),
        new_x.max(1) / width + half,
    )


def shear_x(boxes_yxyx: np.ndarray, size: tuple[int, int], level: float) -> np.ndarray:
    y, x = _pixel_corners(boxes_yxyx, size)
    return _enclosing(y, np.trunc(x - _F(level) * y), size)


def shear_y(boxes_yxyx: np.ndarray, size: tuple[int, int], level: float) -> np.ndarray:
    y, x = _pixel_corners(boxes_yxyx, size)
    return _enclosing(np.trunc(y - _F(level) * x), x, size)


def translate_x(boxes_yxyx: np.ndarray, size: tuple[int, int], left: float) -> np.ndarray:
    return _translate(boxes_yxyx, size, (0, left))


def translate_y(boxes_yxyx: np.ndarray, size: tuple[int, int], up: float) -> np.ndarray:
    return _translate(boxes_yxyx, size, (up, 0))


def _translate(boxes_yxyx: np.ndarray, size: tuple[int, int], shift: tuple[float, float]) -> np.ndarray:
    sides = np.array([*size, *size], _F)
    moved = np.trunc(sides * boxes_yxyx) - np.trunc(np.array([*shift, *shift], _F))
    return _kept(*(moved / sides).T)


def _pixel_corners(boxes_yxyx: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    height, width = map(_F, size)
    return _corners(np.trunc(height * boxes_yxyx[:, [0, 2]]), np.trunc(width * boxes_yxyx[:, [1, 3]]))


def _corners(y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two [M, 2] → the y and the x of the four corners, each [M, 4]."""
    return np.repeat(y, 2, axis=1), np.tile(x, 2)


def _enclosing(y: np.ndarray, x: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    height, width = map(_F, size)
    return _kept(y.min(1) / height, x.min(1) / width, y.max(1) / height, x.max(1) / width)


def _kept(top: np.ndarray, left: np.ndarray, bottom: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Clipped to the image; a side that became 0 gets room for :data:`LEAST_SIDE`."""
    boxes = np.stack([top, left, bottom, right], axis=1).clip(0, 1)
    for low, high in ((0, 2), (1, 3)):
        flat = boxes[:, high] == boxes[:, low]
        boxes[flat, high] = np.maximum(boxes[flat, high], LEAST_SIDE)
        boxes[flat, low] = np.minimum(boxes[flat, low], 1 - LEAST_SIDE)
    return boxes
