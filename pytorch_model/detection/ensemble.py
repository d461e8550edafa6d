"""Detections of one image, found several times, made into one list: weighted boxes fusion.

Sources: Weighted Boxes Fusion (Solovyev et al., 2021); AutoML ``wbf.py`` and the flipped branch of its
``postprocess.py``, which its evaluation used for test-time augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pytorch_model.detection.boxes import iou

IOU_THRESHOLD = 0.55  # AutoML's: a detection joins a cluster that it overlaps by at least this


def mirrored(detections: dict[str, Tensor], width: float) -> dict[str, Tensor]:
    """``detections`` as seen in a mirror: the left edge becomes the right one of an image ``width`` wide."""
    left, top, right, bottom = detections["boxes"].unbind(1)
    return {**detections, "boxes": torch.stack((width - right, top, width - left, bottom), dim=1)}


def weighted_boxes_fusion(runs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Fuse the detections of ``runs``, each a dict of ``boxes`` [n, 4] xyxy, ``scores`` [n] above 0,
    ``labels`` [n].

    One detection after the other, the runs in turn, joins the cluster of its class whose box it overlaps
    most, by 0.55 or more, or starts one. A cluster's box is the mean of its members weighted by score; its
    score is the sum of theirs over the number of runs, or over the number of members where that is larger:
    what one run alone has seen counts less. Returns the clusters as one such dict, best score first.

    AutoML's own loop over class ids ends before the last class and drops it; here it is kept.
    """
    boxes, scores, labels = (
        torch.cat([run[key] for run in runs]).cpu().numpy() for key in ("boxes", "scores", "labels")
    )
    members: list[list[int]] = []
    fused_boxes = np.zeros_like(boxes)
    fused_scores = np.zeros_like(scores)
    fused_labels = np.zeros_like(labels)
    for index, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        count = len(members)
        overlaps = np.where(fused_labels[:count] == label, iou(fused_boxes[:count], box[None])[:, 0], -1)
        place = int(overlaps.argmax()) if count else 0
        if not count or not overlaps[place] >= IOU_THRESHOLD:
            place = count
            members.append([])
            fused_labels[place] = label
        members[place].append(index)
        own = members[place]
        total = scores[own].sum()
        fused_boxes[place] = (boxes[own] * (scores[own] / total)[:, None]).sum(axis=0)
        fused_scores[place] = total / max(len(runs), len(own))
    order = np.argsort(-fused_scores[: len(members)], kind="stable")
    fused = {"boxes": fused_boxes[order], "scores": fused_scores[order], "labels": fused_labels[order]}
    return {key: torch.from_numpy(values).to(runs[0][key].device) for key, values in fused.items()}
