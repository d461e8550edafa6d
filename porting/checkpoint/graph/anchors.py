"""The anchor settings behind a list of anchors, which exported models hold as a constant.

Source: AutoML ``keras/anchors.py`` (order: level, row, column, octave, aspect ratio).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pytorch_model.anchors import anchor_boxes
from pytorch_model.config import BOUNDS, EfficientDetConfig

_MOST_DIGITS = 7  # of a setting: as many as a float32 has
_SAME = 1e-4  # relative: two anchor sizes that are one setting, in float32
_ABSOLUTE = 1e-6  # of the image: a thousandth of a pixel at 1000 pixels


@np.errstate(all="ignore")
def anchor_settings(
    anchors: np.ndarray, config: EfficientDetConfig, tolerance: float = 1e-5
) -> dict[str, Any] | None:
    """``num_scales``, ``aspect_ratios`` and ``anchor_scale``, with the fewest digits that give ``anchors``.

    ``anchors``: float64 [A, 4] of centre y, centre x, height, width, as fractions of the image. ``config``
    has the levels and the image size. ``tolerance``: relative. None if AutoML arranges no anchors like these.
    """
    sizes = list(config.feature_sizes().values())
    per_location, rest = divmod(len(anchors), sum(rows * columns for rows, columns in sizes))
    if rest or not 0 < per_location <= BOUNDS["num_scales"][1] or not np.isfinite(anchors).all():
        return None
    starts = np.cumsum([0, *(rows * columns * per_location for rows, columns in sizes)])[:-1]
    # Height and width of each anchor of a level's first location, in units of the level's stride.
    factors = np.stack(
        [anchors[at : at + per_location, 2:] * size for at, size in zip(starts, sizes, strict=True)]
    )
    levels = factors[:, 0, 0] / factors[0, 0, 0]
    same = max(_SAME, 2 * tolerance)
    if not np.allclose(factors, factors[0] * levels[:, None, None], rtol=same, atol=0):
        return None
    for settings in _candidates(factors[0], levels, same):
        expected = centre_sizes(config.replace(**settings))
        if np.allclose(anchors, expected, rtol=tolerance, atol=_ABSOLUTE):
            return settings
    return None


def _candidates(factors: np.ndarray, levels: np.ndarray, same: float) -> Iterator[dict[str, Any]]:
    """Settings to try. ``factors``: [n, 2], heights and widths at the finest level; ``levels``: multiples.

    ``same``: how far two numbers may be apart, relatively, that are one setting.
    """
    count = len(factors)
    num_scales = next(n for n in range(count, 0, -1) if count % n == 0 and _repeats(factors, n, same))
    shapes = factors[: count // num_scales]
    areas = shapes.prod(axis=1)
    if not (shapes > 0).all():
        return
    for digits in range(1, _MOST_DIGITS + 1):
        # One number as a ratio keeps the area; of pairs, one probably is (1, 1), and its size is the scale.
        single = np.allclose(areas, areas[0], rtol=2 * same)
        for scale in np.sqrt(areas[:1] if single else areas):
            scales = tuple(round(float(scale * level), digits) for level in levels)
            ratios: tuple[Any, ...] = (
                tuple(round(float(width / height), digits) for height, width in shapes)
                if single
                else tuple(
                    (round(float(width / scale), digits), round(float(height / scale), digits))
                    for height, width in shapes
                )
            )
            if min(scales) > 0 and min(np.ravel(ratios)) > 0:
                yield {
                    "num_scales": num_scales,
                    "aspect_ratios": ratios,
                    "anchor_scale": scales[0] if len(set(scales)) == 1 else scales,
                }


def _repeats(factors: np.ndarray, num_scales: int, same: float) -> bool:
    """Whether the anchors are a group in ``num_scales`` sizes, each 2^(1/num_scales) times the one before."""
    groups = factors.reshape(num_scales, -1, 2)
    octaves = 2 ** (np.arange(num_scales) / num_scales)
    return np.allclose(groups, groups[0] * octaves[:, None, None], rtol=same, atol=0)


def centre_sizes(config: EfficientDetConfig) -> np.ndarray:
    """float64 [A, 4]: centre y, centre x, height, width of each anchor, as fractions of the image."""
    corners_yx = anchor_boxes(config).astype(np.float64).reshape(-1, 2, 2) / config.image_size
    return np.concatenate([corners_yx.mean(axis=1), corners_yx[:, 1] - corners_yx[:, 0]], axis=1)
