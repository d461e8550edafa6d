"""Anchor boxes, and the decoding of regressions into boxes.

Sources: EfficientDet (Tan, Pang, Le, CVPR 2020) section 5.1 (three scales, three aspect ratios per
location); AutoML ``tf2/anchors.py``; for ``power_of_two``, TensorFlow Models
``research/object_detection/anchor_generators/multiscale_grid_anchor_generator.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from pytorch_model.config import EfficientDetConfig

if TYPE_CHECKING:
    from torch import Tensor


def generate_anchors(config: EfficientDetConfig, image_size: tuple[int, int] | None = None) -> Tensor:
    """:func:`anchor_boxes` as a tensor. Imports torch."""
    import torch

    return torch.from_numpy(anchor_boxes(config, image_size))


def anchor_boxes(config: EfficientDetConfig, image_size: tuple[int, int] | None = None) -> np.ndarray:
    """Every anchor of the network: float32 [A, 4], order yxyx, in pixels of the network's input.

    ``image_size`` (height, width), what images are resized into, defaults to ``config.image_size``. A runs
    over level, row, column, scale, aspect ratio, the last fastest. Anchors may reach outside the image.
    """
    height, width = image_size or config.image_size
    stride_of = _STRIDES[config.anchor_stride]
    levels = []
    sizes = config.feature_sizes(config.resizer.padded((height, width)))
    for anchor_scale, (level, (rows, columns)) in zip(config.anchor_scales, sizes.items(), strict=True):
        stride_y, first_y = stride_of(height, rows, level)
        stride_x, first_x = stride_of(width, columns, level)
        centres_y = first_y + np.arange(rows) * stride_y
        centres_x = first_x + np.arange(columns) * stride_x
        half_heights, half_widths = _half_sizes(config, anchor_scale * stride_y, anchor_scale * stride_x)
        boxes_yxyx = np.empty((rows, columns, config.num_anchors, 4))
        boxes_yxyx[..., 0] = centres_y[:, None, None] - half_heights
        boxes_yxyx[..., 1] = centres_x[None, :, None] - half_widths
        boxes_yxyx[..., 2] = centres_y[:, None, None] + half_heights
        boxes_yxyx[..., 3] = centres_x[None, :, None] + half_widths
        levels.append(boxes_yxyx.reshape(-1, 4))
    # float64 until here: AutoML computes anchors in NumPy and rounds once.
    return np.concatenate(levels).astype(np.float32)


def _size_ratio(size: int, cells: int, level: int) -> tuple[float, float]:
    """AutoML's stride is the ratio of the sizes. It is fractional if a size is not a multiple."""
    stride = size / cells
    return stride, stride / 2


def _power_of_two(size: int, cells: int, level: int) -> tuple[float, float]:
    """The Object Detection API's stride. If the size is no multiple of it, the centres start at 0."""
    stride = 2.0**level
    return stride, 0.0 if size % stride else stride / 2


#: ``config.anchor_stride`` → (pixels along an axis, cells along it, level) → (stride, first centre).
_STRIDES: Mapping[str, Callable[[int, int, int], tuple[float, float]]] = {
    "size_ratio": _size_ratio,
    "power_of_two": _power_of_two,
}


def _half_sizes(config: EfficientDetConfig, height: float, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Half heights and half widths of one location's anchors: float64 [num_anchors] each.

    ``height`` and ``width``: the sides of the anchor of the first scale and aspect ratio 1.
    """
    scales = 2.0 ** (np.arange(config.num_scales) / config.num_scales)
    across, down = np.array(config.aspect_factors).T
    half_heights = height * scales[:, None] * down / 2
    half_widths = width * scales[:, None] * across / 2
    return half_heights.reshape(-1), half_widths.reshape(-1)


def decode_boxes(box_outputs: Tensor, anchors_yxyx: Tensor) -> Tensor:
    """Turn regressions into boxes: ``box_outputs`` [..., 4] as (ty, tx, th, tw) → boxes_yxyx [..., 4].

    ``anchors_yxyx`` [..., 4] broadcasts against ``box_outputs``. The centre moves by ty, tx times the
    anchor's sides, and the sides are multiplied by exp(th), exp(tw). The result has the anchors' unit and is
    not clipped.
    """
    import torch

    top, left, bottom, right = anchors_yxyx.unbind(-1)
    ty, tx, th, tw = box_outputs.unbind(-1)
    anchor_height, anchor_width = bottom - top, right - left
    centre_y = ty * anchor_height + (top + bottom) / 2
    centre_x = tx * anchor_width + (left + right) / 2
    half_height = th.exp() * anchor_height / 2
    half_width = tw.exp() * anchor_width / 2
    return torch.stack(
        (centre_y - half_height, centre_x - half_width, centre_y + half_height, centre_x + half_width), dim=-1
    )
