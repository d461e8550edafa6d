"""AutoAugment's policies v0…v3 and RandAugment: which operations an image gets.

A policy is a list of sub-policies. One of them is drawn for each image, all equally probable.
The operations and the tables v0…v3 are proven by recordings. How draws choose among them, and RandAugment's
list, follow AutoML's code; its random stream cannot be repeated here.

Source: AutoML ``aug/autoaugment.py`` (``policy_v0`` … ``policy_v3``, ``distort_image_with_randaugment`` with
one layer of magnitude 15); Zoph et al., Learning Data Augmentation Strategies for Object Detection, ECCV
2020, appendix; Cubuk et al., RandAugment, NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pytorch_model.training.data.auto_augment.operations import (
    Operation,
    OperationDraws,
    Picture,
    apply_operation,
    draw_index,
)

SubPolicy = tuple[Operation, ...]


class PolicyDraws(NamedTuple):
    """``choice``: which sub-policy, float32 in [0, 1). ``operations``: for each operation of it, in order."""

    choice: np.float32
    operations: tuple[OperationDraws, ...]


def draw_policy(generator: np.random.Generator, boxes: int) -> PolicyDraws:
    """Draws for an image with so many boxes: always as many as the longest sub-policy needs."""
    choice = generator.random(1, np.float32)[0]
    return PolicyDraws(choice, tuple(_draw_operation(generator, boxes) for _ in range(MOST_OPERATIONS)))


def _draw_operation(generator: np.random.Generator, boxes: int) -> OperationDraws:
    apply, sign, y, x, box = generator.random(5, np.float32)
    return OperationDraws(apply, sign, y, x, box, generator.random((boxes, 4), np.float32))


def apply_policy(picture: Picture, policy: str, draws: PolicyDraws) -> Picture:
    """``policy``: of :data:`POLICIES`."""
    choices = POLICIES[policy]
    chosen = choices[draw_index(draws.choice, len(choices))]
    for operation, numbers in zip(chosen, draws.operations, strict=False):
        if numbers.apply + np.float32(operation.probability) >= 1:
            picture = apply_operation(picture, operation, numbers)
    return picture


def _parsed(table: str) -> tuple[SubPolicy, ...]:
    """One line for each sub-policy: name, probability, level of its operations."""
    return tuple(tuple(map(_operation, line.split(","))) for line in table.strip().splitlines())


def _operation(text: str) -> Operation:
    name, probability, level = text.split()
    return Operation(name, float(probability), float(level))


_V0 = _parsed(
    """
        TranslateX_BBox 0.6 4, Equalize 0.8 10
        TranslateY_Only_BBoxes 0.2 2, Cutout 0.8 8
        Sharpness 0 8, ShearX_BBox 0.4 0
        ShearY_BBox 1 2, TranslateY_Only_BBoxes 0.6 6
        Rotate_BBox 0.6 10, Color 1 6
    """
)
_V1 = _parsed(
    """
        Color 0 0, ShearX_Only_BBoxes 0.8 4
        ShearY_Only_BBoxes 0.8 2, Flip_Only_BBoxes 0 10
        Equalize 0.6 10, TranslateX_BBox 0.2 2
        Color 1 10, TranslateY_Only_BBoxes 0.4 6
        Rotate_BBox 0.8 10, Contrast 0 10
        Cutout 0.2 2, Brightness 0.8 10
        Color 1 6, Equalize 1 2
        Cutout_Only_BBoxes 0.4 6, TranslateY_Only_BBoxes 0.8 2
        Color 0.2 8, Rotate_BBox 0.8 10
        Sharpness 0.4 4, TranslateY_Only_BBoxes 0 4
        Sharpness 1 4, SolarizeAdd 0.4 4
        Rotate_BBox 1 8, Sharpness 0.2 8
        ShearY_BBox 0.6 10, Equalize_Only_BBoxes 0.6 8
        ShearX_BBox 0.2 6, TranslateY_Only_BBoxes 0.2 10
        SolarizeAdd 0.6 8, Brightness 0.8 10
    """
)
_V2 = _parsed(
    """
        Color 0 6, Cutout 0.6 8, Sharpness 0.4 8
        Rotate_BBox 0.4 8, Sharpness 0.4 2, Rotate_BBox 0.8 10
        TranslateY_BBox 1 8, AutoContrast 0.8 2
        AutoContrast 0.4 6, ShearX_BBox 0.8 8, Brightness 0 10
        SolarizeAdd 0.2 6, Contrast 0 10, AutoContrast 0.6 0
        Cutout 0.2 0, Solarize 0.8 8, Color 1 4
        TranslateY_BBox 0 4, Equalize 0.6 8, Solarize 0 10
        TranslateY_BBox 0.2 2, ShearY_BBox 0.8 8, Rotate_BBox 0.8 8
        Cutout 0.8 8, Brightness 0.8 8, Cutout 0.2 2
        Color 0.8 4, TranslateY_BBox 1 6, Rotate_BBox 0.6 6
        Rotate_BBox 0.6 10, BBox_Cutout 1 4, Cutout 0.2 8
        Rotate_BBox 0 0, Equalize 0.6 6, ShearY_BBox 0.6 8
        Brightness 0.8 8, AutoContrast 0.4 2, Brightness 0.2 2
        TranslateY_BBox 0.4 8, Solarize 0.4 6, SolarizeAdd 0.2 10
        Contrast 1 10, SolarizeAdd 0.2 8, Equalize 0.2 4
    """
)
_V3 = _parsed(
    """
        Posterize 0.8 2, TranslateX_BBox 1 8
        BBox_Cutout 0.2 10, Sharpness 1 8
        Rotate_BBox 0.6 8, Rotate_BBox 0.8 10
        Equalize 0.8 10, AutoContrast 0.2 10
        SolarizeAdd 0.2 2, TranslateY_BBox 0.2 8
        Sharpness 0 2, Color 0.4 8
        Equalize 1 8, TranslateY_BBox 1 8
        Posterize 0.6 2, Rotate_BBox 0 10
        AutoContrast 0.6 0, Rotate_BBox 1 6
        Equalize 0 4, Cutout 0.8 10
        Brightness 1 2, TranslateY_BBox 1 6
        Contrast 0 2, ShearY_BBox 0.8 0
        AutoContrast 0.8 10, Contrast 0.2 10
        Rotate_BBox 1 10, Cutout 1 10
        SolarizeAdd 0.8 6, Equalize 0.8 8
    """
)
_RANDAUG = tuple(
    (Operation(name, 1.0, 15.0),)
    for name in (
        "Equalize",
        "Solarize",
        "Color",
        "Cutout",
        "SolarizeAdd",
        "TranslateX_BBox",
        "TranslateY_BBox",
        "ShearX_BBox",
        "ShearY_BBox",
        "Rotate_BBox",
    )
)

#: AutoML's ``autoaugment_policy`` → the sub-policies.
POLICIES: Mapping[str, tuple[SubPolicy, ...]] = {
    "v0": _V0,
    "v1": _V0 + _V1,
    "v2": _V2,
    "v3": _V3,
    "randaug": _RANDAUG,
}
MOST_OPERATIONS = max(len(chosen) for choices in POLICIES.values() for chosen in choices)
