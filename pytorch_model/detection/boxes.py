"""Overlap of boxes, as NumPy arrays."""

from __future__ import annotations

import numpy as np


def iou(boxes_xyxy: np.ndarray, others_xyxy: np.ndarray) -> np.ndarray:
    """Intersection over union of [n, 4] with [m, 4] → [n, m]; boxes without area overlap by 0."""
    top_left = np.maximum(boxes_xyxy[:, None, :2], others_xyxy[:, :2])
    bottom_right = np.minimum(boxes_xyxy[:, None, 2:], others_xyxy[:, 2:])
    intersection = (bottom_right - top_left).clip(min=0).prod(axis=2)
    areas, other_areas = ((boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (boxes_xyxy, others_xyxy))
    union = areas[:, None] + other_areas - intersection
    return np.divide(intersection, union, out=np.zeros_like(union), where=union > 0)
