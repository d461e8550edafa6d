"""AutoML's 25 operations by name, each at a level of 10, as functions of given draws.

Operations called ``…_BBox`` move the boxes too; those called ``…_Only_BBoxes`` change the content of some
boxes.

Source: AutoML ``aug/autoaugment.py`` (``NAME_TO_FUNC``, ``level_to_arg``, ``bbox_cutout``,
``_apply_multi_bbox_augmentation``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from pytorch_model.training.data.auto_augment import boxes, pixels

_F = np.float32


class OperationDraws(NamedTuple):
    """The random numbers of one operation, float32 in [0, 1).

    ``apply``: the operation is applied if apply + its probability ≥ 1. ``sign``: a direction is positive
    from 0.5 on. ``y``, ``x``: a place in the image. ``box``: which box. ``per_box``: float32 [M, 4]: a rank,
    and ``apply``, ``y`` and ``x`` of each box; boxes are changed in the order of their ranks.
    """

    apply: np.float32
    sign: np.float32
    y: np.float32
    x: np.float32
    box: np.float32
    per_box: np.ndarray


class Operation(NamedTuple):
    name: str
    probability: float
    level: float


class Picture(NamedTuple):
    """``pixels``: uint8 [H, W, 3]. ``boxes_yxyx``: relative to the image, float32 [M, 4]."""

    pixels: np.ndarray
    boxes_yxyx: np.ndarray


def apply_operation(picture: Picture, operation: Operation, draws: OperationDraws) -> Picture:
    """Apply an operation of :data:`OPERATIONS`, whatever ``draws.apply`` is."""
    return OPERATIONS[operation.name](picture, operation, draws)


#: uint8 [H, W, 3], a level, draws → uint8 [H, W, 3].
_OnPixels = Callable[[np.ndarray, float, OperationDraws], np.ndarray]
_OnPicture = Callable[[Picture, Operation, OperationDraws], Picture]


def draw_index(draw: np.float32, count: int, first: int = 0) -> int:
    """A whole number from ``first`` on, ``count`` of them equally probable."""
    return first + min(int(draw * _F(count)), count - 1)


def _factor(level: float) -> float:
    return level / 10 * 1.8 + 0.1


def _solarize(image: np.ndarray, level: float, draws: OperationDraws) -> np.ndarray:
    return pixels.solarize(image, int(level / 10 * 256))


def _cutout(most: int) -> _OnPixels:
    def cutout(image: np.ndarray, level: float, draws: OperationDraws) -> np.ndarray:
        centre = draw_index(draws.y, image.shape[0]), draw_index(draws.x, image.shape[1])
        reach = int(level / 10 * most)
        return pixels.cutout(image, centre, (reach, reach))

    return cutout


_ON_PIXELS: Mapping[str, _OnPixels] = {
    "AutoContrast": lambda image, level, draws: pixels.auto_contrast(image),
    "Equalize": lambda image, level, draws: pixels.equalize(image),
    "Posterize": lambda image, level, draws: pixels.posterize(image, int(level / 10 * 4)),
    "Solarize": _solarize,
    "SolarizeAdd": lambda image, level, draws: pixels.solarize_add(image, int(level / 10 * 110)),
    "Color": lambda image, level, draws: pixels.color(image, _factor(level)),
    "Contrast": lambda image, level, draws: pixels.contrast(image, _factor(level)),
    "Brightness": lambda image, level, draws: pixels.brightness(image, _factor(level)),
    "Sharpness": lambda image, level, draws: pixels.sharpness(image, _factor(level)),
    "Cutout": _cutout(100),
}
_WITHIN_BOXES: Mapping[str, _OnPixels] = {
    "Flip": lambda image, level, draws: image[:, ::-1],
    "Solarize": _solarize,
    "Equalize": _ON_PIXELS["Equalize"],
    "Cutout": _cutout(50),
}


class _Geometric(NamedTuple):
    """What becomes of pixels and of boxes, and the argument at level 10, either sign: degrees, slope, pixels.

    ``within``: the argument for the content of a box.
    """

    pixels: Callable[[np.ndarray, float], np.ndarray]
    boxes: Callable[[np.ndarray, tuple[int, int], float], np.ndarray]
    most: float
    within: float


_GEOMETRIC: Mapping[str, _Geometric] = {
    "Rotate": _Geometric(pixels.rotate, boxes.rotate, 30, 30),
    "TranslateX": _Geometric(pixels.translate_x, boxes.translate_x, 250, 120),
    "TranslateY": _Geometric(pixels.translate_y, boxes.translate_y, 250, 120),
    "ShearX": _Geometric(pixels.shear_x, boxes.shear_x, 0.3, 0.3),
    "ShearY": _Geometric(pixels.shear_y, boxes.shear_y, 0.3, 0.3),
}


def _argument(level: float, most: float, draws: OperationDraws) -> float:
    return level / 10 * most * (1 if draws.sign >= 0.5 else -1)


def _on_image(change: _OnPixels) -> _OnPicture:
    def apply(picture: Picture, operation: Operation, draws: OperationDraws) -> Picture:
        return picture._replace(pixels=change(picture.pixels, operation.level, draws))

    return apply


def _on_image_and_boxes(kind: _Geometric) -> _OnPicture:
    def apply(picture: Picture, operation: Operation, draws: OperationDraws) -> Picture:
        argument = _argument(operation.level, kind.most, draws)
        image, boxes_yxyx = picture
        return Picture(kind.pixels(image, argument), kind.boxes(boxes_yxyx, image.shape[:2], argument))

    return apply


def _moved_content(kind: _Geometric) -> _OnPixels:
    return lambda image, level, draws: kind.pixels(image, _argument(level, kind.within, draws))


def _within_boxes(change: _OnPixels) -> _OnPicture:
    """The content of each box is changed with a third of the probability, one box after the other."""

    def apply(picture: Picture, operation: Operation, draws: OperationDraws) -> Picture:
        result = picture.pixels.copy()
        for index in np.argsort(draws.per_box[: len(picture.boxes_yxyx), 0], kind="stable"):
            _, chance, y, x = draws.per_box[index]
            place = _place(picture.boxes_yxyx[index], result.shape)
            if chance + _F(operation.probability / 3) >= 1 and result[place].size:
                # Copied: a changed view must not be written over itself.
                content = change(result[place].copy(), operation.level, draws._replace(y=y, x=x))
                result[place] = content
        return picture._replace(pixels=result)

    return apply


def _place(box_yxyx: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice]:
    """The rows and columns of a relative box within the image, its last ones included."""
    height, width = shape[:2]
    sides = np.array([height, width, height, width], _F)
    top, left, bottom, right = map(int, (sides * box_yxyx).clip(0))
    return slice(top, min(bottom, height - 1) + 1), slice(left, min(right, width - 1) + 1)


def _cutout_in_a_box(picture: Picture, operation: Operation, draws: OperationDraws) -> Picture:
    """A grey rectangle, 0.75 · level / 10 as large as one of the boxes, with its centre in that box."""
    image, boxes_yxyx = picture
    if not len(boxes_yxyx):
        return picture
    box = boxes_yxyx[draw_index(draws.box, len(boxes_yxyx))]
    sides = _place(box, image.shape)
    lengths = [side.stop - side.start for side in sides]
    if min(lengths) < 1:
        return picture
    y, x = (draw_index(u, n, side.start) for u, n, side in zip(draws[2:4], lengths, sides, strict=True))
    high, wide = (int(operation.level / 10 * 0.75 * (length / 2)) for length in lengths)
    return picture._replace(pixels=pixels.cutout(image, (y, x), (high, wide)))


OPERATIONS: Mapping[str, _OnPicture] = {
    **{name: _on_image(change) for name, change in _ON_PIXELS.items()},
    **{f"{name}_BBox": _on_image_and_boxes(kind) for name, kind in _GEOMETRIC.items()},
    **{f"{name}_Only_BBoxes": _within_boxes(_moved_content(kind)) for name, kind in _GEOMETRIC.items()},
    **{f"{name}_Only_BBoxes": _within_boxes(change) for name, change in _WITHIN_BOXES.items()},
    "BBox_Cutout": _cutout_in_a_box,
}
