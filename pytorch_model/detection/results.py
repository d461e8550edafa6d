"""COCO's results format: detections as the lines of a results file, and the file that COCO's server takes.

Sources: COCO's results format (cocodataset.org); AutoML ``coco_metric.py`` for the rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pytorch_model.errors import EfficientDetError

ImageId: TypeAlias = "int | str"
#: One line of a COCO results file: image_id, category_id, bbox (x, y, width, height in pixels), score.
Result: TypeAlias = "dict[str, Any]"


def to_results(
    image_id: ImageId, detections: Mapping[str, Tensor], categories: Mapping[int, int] | None = None
) -> list[Result]:
    """The detections of one image (``boxes`` xyxy, ``scores``, ``labels``) as lines of a COCO results file.

    ``categories``: class id → category id; detections of classes without a category are left out. Boxes
    that are not finite are left out too: JSON cannot hold them.
    """
    left, top, right, bottom = detections["boxes"].unbind(1)
    boxes_xywh = torch.stack((left, top, right - left, bottom - top), dim=1)
    finite = boxes_xywh.isfinite().all(dim=1)
    parts = (boxes_xywh, detections["scores"], detections["labels"])
    rows = zip(*(part[finite].tolist() for part in parts), strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": categories[label] if categories is not None else label,
            "bbox": box_xywh,
            "score": score,
        }
        for box_xywh, score, label in rows
        if categories is None or label in categories
    ]


def server_file_name(algorithm: str) -> str:
    """The file name that COCO's server requires. Raises :class:`EfficientDetError` for an unusable name."""
    if not algorithm or not all(character.isalnum() or character in "-." for character in algorithm):
        raise EfficientDetError(
            f"--test-dev {algorithm!r} cannot be part of a file name; give letters, digits, - and . only"
        )
    return f"detections_test-dev2017_{algorithm}_results.json"


def server_results(results: Sequence[Result]) -> list[Result]:
    """``results`` rounded like AutoML's submissions: boxes to 2 decimals, scores to 3."""
    return [
        {**row, "bbox": [round(side, 2) for side in row["bbox"]], "score": round(row["score"], 3)}
        for row in results
    ]
