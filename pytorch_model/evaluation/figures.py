"""COCO's twelve figures, by pycocotools.

Source: AutoML ``coco_metric.py`` for their names.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytorch_model.detection.results import ImageId, Result
from pytorch_model.errors import EfficientDetError

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ARmax1", "ARmax10", "ARmax100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class Evaluation:
    """``figures``: name → value, -1 if nothing of that kind is annotated. ``per_class``: category id → AP."""

    figures: dict[str, float]
    per_class: dict[int, float]


def evaluate(
    content: Mapping[str, Any], results: Sequence[Result], image_ids: Collection[ImageId]
) -> Evaluation:
    """COCO's figures of ``results`` on the images ``image_ids`` of ``content`` (COCO's format, annotated).

    Raises :class:`EfficientDetError` if pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise EfficientDetError(
            "COCO's figures need the package pycocotools: pip install pycocotools"
        ) from None

    # pycocotools sorts ids in one array: mixed with names, numbers become text; large ones lose digits.
    in_order = sorted(set(image_ids), key=lambda id_: (isinstance(id_, str), id_))
    numbers = {id_: number for number, id_ in enumerate(in_order)}
    ours = _renumbered(results, numbers)
    dataset = {
        "images": [{"id": number} for number in numbers.values()],
        "categories": list(content["categories"]),
        "annotations": _renumbered(content["annotations"], numbers),
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        truth = COCO()
        truth.dataset = dataset
        truth.createIndex()
        if ours:
            found = truth.loadRes(ours)
        else:
            found = COCO()
            found.dataset = {**dataset, "annotations": []}
            found.createIndex()
        run = COCOeval(truth, found, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    figures = {name: float(value) for name, value in zip(FIGURES, run.stats, strict=True)}
    precision = run.eval["precision"][:, :, :, 0, -1]  # IoU, recall, category; all areas, 100 detections
    per_class = {
        int(category): float(known.mean()) if (known := values[values > -1]).size else -1.0
        for category, values in zip(run.params.catIds, precision.transpose(2, 0, 1), strict=True)
    }
    return Evaluation(figures, per_class)


def _renumbered(rows: Sequence[Mapping[str, Any]], numbers: Mapping[ImageId, int]) -> list[dict[str, Any]]:
    """Copies of the ``rows`` of the images in ``numbers``, with their numbers instead of their ids."""
    return [{**row, "image_id": numbers[row["image_id"]]} for row in rows if row["image_id"] in numbers]
