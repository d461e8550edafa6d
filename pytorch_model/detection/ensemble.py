"""Weighted boxes fusion: the detections of several runs on one image become one list.

Sources: Weighted Boxes Fusion (Solovyev et al., 2021); AutoML ``wbf.py`` and the flipped branch of its
``postprocess.py``, which its evaluation used for test-time augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pytorch_model.detection.boxes import iou

IOU_THRESHOLD = 0.55  # AutoML's: a detection joins a cluster if their overlap is at least this


def mirrored(detections: dict[str, Tensor], width: float) -> dict[str, Tensor]:
    """``detections`` in the mirrored image, which is ``width`` wide: left and right are exchanged."""
    left, top, right, bottom = detections["boxes"].unbind(1)
    return {**detections, "boxes": torch.stack((width - right, top, width - left, bottom), dim=1)}


def weighted_boxes_fusion(runs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Fuse the detections of ``runs``, each a dict of ``boxes`` [n, 4] xyxy, ``scores`` [n] above 0,
    ``labels`` [n].

    The detections are taken one by one, run after run. Each joins the cluster of its class that it overlaps
    most, if by at least 0.55, or starts a cluster. A cluster's box is the mean of its members' boxes weighted
    by score. Its score is the sum of their scores divided by the number of runs, or of members if there are
    more: an object that only one run found counts less. Returns the clusters as one such dict, best score
    first.

    AutoML's loop over class ids ends before the last class and drops it; here it is kept.
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
