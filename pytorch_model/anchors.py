"""Anchor boxes, and the decoding of regressions into boxes.

Sources: EfficientDet (Tan, Pang, Le, CVPR 2020) section 5.1 (three scales, three aspect ratios per
location); AutoML ``tf2/anchors.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pytorch_model.config import EfficientDetConfig


def generate_anchors(config: EfficientDetConfig, image_size: tuple[int, int] | None = None) -> Tensor:
    """Every anchor of the network: float32 [A, 4], order yxyx, in pixels of the network's input.

    ``image_size`` (height, width) defaults to ``config.image_size``. A runs over level, row, column, scale,
    aspect ratio, the last fastest. Anchors may reach outside the image.
    """
    height, width = image_size or config.image_size
    levels = []
    sizes = config.feature_sizes((height, width)).values()
    for anchor_scale, (rows, columns) in zip(config.anchor_scales, sizes, strict=True):
        # AutoML's stride is the ratio of the sizes. It is fractional if a size is not a multiple.
        stride_y, stride_x = height / rows, width / columns
        centres_y = stride_y / 2 + np.arange(rows) * stride_y
        centres_x = stride_x / 2 + np.arange(columns) * stride_x
        half_heights, half_widths = _half_sizes(config, anchor_scale * stride_y, anchor_scale * stride_x)
        boxes_yxyx = np.empty((rows, columns, config.num_anchors, 4))
        boxes_yxyx[..., 0] = centres_y[:, None, None] - half_heights
        boxes_yxyx[..., 1] = centres_x[None, :, None] - half_widths
        boxes_yxyx[..., 2] = centres_y[:, None, None] + half_heights
        boxes_yxyx[..., 3] = centres_x[None, :, None] + half_widths
        levels.append(boxes_yxyx.reshape(-1, 4))
    # float64 until here: AutoML computes anchors in NumPy and rounds once.
    return torch.from_numpy(np.concatenate(levels).astype(np.float32))


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
