"""Suppression as batched tensor work: the only loop runs over output slots, and nothing waits for a GPU.

Sources: TensorFlow's ``NonMaxSuppressionV5``; AutoML ``nms_np.py``; Soft-NMS (Bodla et al., ICCV 2017).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pytorch_model.detection.settings import NMSConfig


def suppress_tensors(
    boxes_yxyx: Tensor, scores: Tensor, classes: Tensor, nms: NMSConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Select up to M = ``nms.max_output_size`` boxes per image, greedily, best score first.

    ``boxes_yxyx`` float32 [N, K, 4], ``scores`` float32 [N, K], ``classes`` [N, K]; K at least 1. A box acts
    only on boxes of its own class. The result is the M best of the selections of all classes: within a class,
    scores fall from one selection to the next, so the best box over all classes is always the next one of its
    class. Returns (indices int64 [N, M], scores float32 [N, M], valid_len int64 [N]); past valid_len, index
    and score are 0. Equal scores: the lower index first.
    """
    alive = scores.clone()
    threshold = nms.effective_score_thresh
    if not nms.pyfunc:
        alive.masked_fill_(~(alive > threshold), -math.inf)
    boxes = _boxes_by_side(boxes_yxyx, nms.pyfunc)
    picked_indices, picked_scores = [], []
    for _ in range(nms.max_output_size):
        score, index = alive.max(dim=1, keepdim=True)
        picked_indices.append(index)
        picked_scores.append(score)
        picked = boxes.gather(2, index.expand(len(boxes), -1, -1))
        decayed = _suppress(alive, _overlap(boxes, picked, nms), nms)
        # NaN compares false, so a box of zero or infinite size is dropped, not selected.
        kept = decayed >= threshold if nms.pyfunc else decayed > threshold
        decayed = decayed.masked_fill_(~kept, -math.inf)
        decayed = torch.where(classes == classes.gather(1, index), decayed, alive)
        alive = decayed.scatter_(1, index, -math.inf)
    indices, out_scores = torch.cat(picked_indices, dim=1), torch.cat(picked_scores, dim=1)
    valid = out_scores > -math.inf
    return indices * valid, out_scores.masked_fill(~valid, 0.0), valid.sum(dim=1)


def _boxes_by_side(boxes_yxyx: Tensor, pyfunc: bool) -> Tensor:
    """[N, K, 4] → [5, N, K]: y1, x1, y2, x2 and the area, each contiguous."""
    sides = boxes_yxyx.permute(2, 0, 1)
    heights, widths = sides[2] - sides[0], sides[3] - sides[1]
    areas = (heights + 1) * (widths + 1) if pyfunc else heights * widths
    return torch.cat((sides, areas[None]))


def _overlap(boxes: Tensor, picked: Tensor, nms: NMSConfig) -> Tensor:
    """Intersection over union of ``boxes`` [5, N, K] with one box per image, ``picked`` [5, N, 1] → [N, K].

    For ``diou``, minus the squared distance of the centres over the squared diagonal of the enclosing box.
    """
    sides = torch.minimum(boxes[2:4], picked[2:4]) - torch.maximum(boxes[:2], picked[:2])
    sides = (sides + 1 if nms.pyfunc else sides).clamp_(min=0)
    intersection = sides[0] * sides[1]
    union = (boxes[4] + picked[4]).sub_(intersection)
    # Two boxes without area overlap by 0, not by 0 / 0.
    overlap = intersection.div_(union.clamp_(min=torch.finfo(union.dtype).tiny))
    if nms.method != "diou":
        return overlap
    enclosing = torch.maximum(boxes[2:4], picked[2:4]) - torch.minimum(boxes[:2], picked[:2])
    between = ((boxes[:2] + boxes[2:4]) - (picked[:2] + picked[2:4])) / 2
    return overlap - (between**2).sum(0) / ((enclosing**2).sum(0) + 1e-10)  # 1e-10: AutoML's guard


def _suppress(scores: Tensor, overlap: Tensor, nms: NMSConfig) -> Tensor:
    """``scores`` [N, K] after the selection of a box that overlaps the others by ``overlap`` [N, K]."""
    if nms.method == "gaussian":
        return (overlap * overlap).mul_(-1 / nms.effective_sigma).exp_().mul_(scores)
    beyond = overlap > nms.effective_iou_thresh
    if nms.method == "linear":
        return torch.where(beyond, scores * (1 - overlap), scores)
    return scores.masked_fill(beyond, -math.inf)
