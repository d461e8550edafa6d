"""Compare detections with a reference's: average precision with the reference as ground truth, and pairs.

Average precision is 1 only if every detection of the reference is found again, with its class, with an
overlap of 0.95 or more, and with a higher score than every detection that the reference does not have. It
ignores small errors by design; the differences of the pairs show them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pytorch_model.detection.boxes import iou
from pytorch_model.detection.results import ImageId, Result
from pytorch_model.evaluation.figures import evaluate

MATCHED_IOU = 0.5  # boxes that overlap less belong to different objects
PASSING_AP = 0.9995  # 1.000 to three decimals


@dataclass(frozen=True)
class DetectionParity:
    """The differences between two lists of detections, over all images.

    ``ap``: average precision with the reference's detections as ground truth. ``pairs``: how many of ``ours``
    and ``reference`` were paired one to one. ``saturated``: the reference's scores that float32 rounds to 1,
    so that their order is random. ``label_flips``: pairs of different classes. ``score_…`` and ``box_…`` are
    differences within pairs: scores 0…1; boxes by the largest of the four sides, in pixels of the image.
    """

    ap: float
    ours: int
    reference: int
    saturated: int
    pairs: int
    label_flips: int
    score_largest: float
    score_mean: float
    box_largest: float
    box_mean: float

    @property
    def unmatched_ours(self) -> int:
        return self.ours - self.pairs

    @property
    def unmatched_reference(self) -> int:
        return self.reference - self.pairs

    @property
    def passed(self) -> bool:
        return self.reference > 0 and self.ap >= PASSING_AP

    def figures(self) -> dict[str, Any]:
        unmatched = {"unmatched_ours": self.unmatched_ours, "unmatched_reference": self.unmatched_reference}
        return {**asdict(self), **unmatched, "passed": self.passed}


def compare_detections(ours: Sequence[Result], reference: Sequence[Result]) -> DetectionParity:
    """Compare two lists in COCO's results format, on all images in either."""
    image_ids = {row["image_id"] for row in (*ours, *reference)}
    by_image = [_by_image(rows) for rows in (ours, reference)]
    flips, scores, boxes = 0, [], []
    for image_id in image_ids:
        mine, theirs = (rows.get(image_id, []) for rows in by_image)
        for i, j in pair(mine, theirs):
            flips += mine[i]["category_id"] != theirs[j]["category_id"]
            scores.append(abs(mine[i]["score"] - theirs[j]["score"]))
            sides = _xyxy([mine[i]])[0] - _xyxy([theirs[j]])[0]
            boxes.append(float(np.abs(sides).max()))
    return DetectionParity(
        ap=evaluate(as_ground_truth(reference, image_ids), ours, image_ids).figures["AP"],
        ours=len(ours),
        reference=len(reference),
        saturated=sum(row["score"] == 1 for row in reference),
        pairs=len(scores),
        label_flips=flips,
        score_largest=max(scores, default=0.0),
        score_mean=float(np.mean(scores)) if scores else 0.0,
        box_largest=max(boxes, default=0.0),
        box_mean=float(np.mean(boxes)) if boxes else 0.0,
    )


def as_ground_truth(results: Sequence[Result], image_ids: Collection[ImageId]) -> dict[str, Any]:
    """Detections as annotations in COCO's format."""
    annotations = [
        {
            "id": number,
            "image_id": row["image_id"],
            "category_id": row["category_id"],
            "bbox": row["bbox"],
            "area": row["bbox"][2] * row["bbox"][3],
            "iscrowd": 0,
        }
        for number, row in enumerate(results, start=1)
    ]
    return {
        "images": [{"id": image_id} for image_id in image_ids],
        "categories": [{"id": category} for category in sorted({row["category_id"] for row in results})],
        "annotations": annotations,
    }


def pair(ours: Sequence[Result], reference: Sequence[Result]) -> list[tuple[int, int]]:
    """Pair the detections of one image one to one: (index of ours, index of the reference's).

    First within a class, then across classes, so that a changed label is counted as one. In each pass the
    closest are paired first: by overlap, at least :data:`MATCHED_IOU`, minus the difference of their scores.
    """
    if not ours or not reference:
        return []
    overlaps = iou(_xyxy(ours), _xyxy(reference))
    mine, theirs = (np.array([row["score"] for row in rows]) for rows in (ours, reference))
    labels = [np.array([row["category_id"] for row in rows]) for rows in (ours, reference)]
    closeness = np.where(overlaps >= MATCHED_IOU, overlaps - np.abs(mine[:, None] - theirs), -np.inf)
    same_class = np.where(labels[0][:, None] == labels[1], closeness, -np.inf)
    pairs: list[tuple[int, int]] = []
    free_ours, free_reference = np.ones(len(ours), bool), np.ones(len(reference), bool)
    for candidates in (same_class, closeness):
        for place in np.argsort(-candidates, axis=None, kind="stable"):
            i, j = np.unravel_index(place, candidates.shape)
            if candidates[i, j] == -np.inf:
                break
            if free_ours[i] and free_reference[j]:
                free_ours[i] = free_reference[j] = False
                pairs.append((int(i), int(j)))
    return pairs


def _xyxy(rows: Sequence[Result]) -> np.ndarray:
    boxes = np.array([row["bbox"] for row in rows], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    return boxes


def _by_image(rows: Sequence[Result]) -> Mapping[ImageId, list[Result]]:
    grouped: dict[ImageId, list[Result]] = defaultdict(list)
    for row in rows:
        grouped[row["image_id"]].append(row)
    return grouped
