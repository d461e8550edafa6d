"""Suppression on the CPU: the same result as that of ``tensors``, bit for bit, in far fewer operations.

Scores only fall. So the search begins with the best candidates, and its selections are those of a search over
all as long as each has a higher score than every candidate left out. Otherwise it begins again with more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytorch_model.detection.settings import NMSConfig
from pytorch_model.detection.suppression.tensors import boxes_by_side, decays, overlaps

FIRST = 4  # times the outputs: candidates of the first search
WIDER = 3  # times those of the search before: candidates of each further one
#: The matrices of one search have the square of this many numbers.
MOST_AT_ONCE = 2_500


def on_host(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be read at once: it is on the CPU, and no graph is being made."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def suppress_on_host(
    boxes_yxyx: Tensor, scores: Tensor, classes: Tensor, nms: NMSConfig
) -> tuple[Tensor, Tensor, Tensor] | None:
    """As :func:`~pytorch_model.detection.suppression.tensors.suppress_tensors`.

    None if too many candidates would have to be searched.
    """
    indices = np.zeros((len(scores), nms.max_output_size), np.int64)
    found = np.zeros(indices.shape, scores.numpy().dtype)
    counts = np.zeros(len(scores), np.int64)
    for image, (boxes, of_image, group) in enumerate(zip(boxes_yxyx, scores, classes, strict=True)):
        selected = _suppress_image(boxes, of_image, group, nms)
        if selected is None:
            return None
        counts[image] = len(selected[0])
        indices[image, : counts[image]], found[image, : counts[image]] = selected
    return torch.from_numpy(indices), torch.from_numpy(found), torch.from_numpy(counts)


def _suppress_image(
    boxes_yxyx: Tensor, scores: Tensor, classes: Tensor, nms: NMSConfig
) -> tuple[np.ndarray, np.ndarray] | None:
    """(indices, scores) of the selections in one image: [K, 4], [K], [K] → [m], [m]."""
    alive = torch.arange(len(scores))
    if not nms.pyfunc:  # its threshold only acts on boxes that overlap a selected one
        alive = (scores > nms.effective_score_thresh).nonzero()[:, 0]
    size = FIRST * nms.max_output_size
    while True:
        if size >= len(alive):
            chosen, left = alive, -math.inf  # nothing is left out
        else:
            best = scores[alive].topk(size + 1)
            chosen, left = alive[best.indices[:-1].sort().values], float(best.values[-1])
        if len(chosen) > MOST_AT_ONCE:
            return None
        selected = _search(boxes_yxyx[chosen], scores[chosen], classes[chosen], nms, left)
        if selected is not None:
            return chosen.numpy()[selected[0]], selected[1]
        size *= WIDER


def _search(
    boxes_yxyx: Tensor, scores: Tensor, classes: Tensor, nms: NMSConfig, left: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Greedy selection among the candidates; None if one with the score ``left`` might have come first."""
    boxes = boxes_by_side(boxes_yxyx[None], nms.pyfunc)
    # [K, K]: row i is what the selection of candidate i does to the others.
    overlap = overlaps(boxes, boxes.transpose(1, 2), nms)
    effects = (decays(overlap, nms) if nms.is_soft else overlap > nms.effective_iou_thresh).numpy()
    same = (classes[:, None] == classes).numpy()
    alive = scores.numpy().copy()
    dead, threshold = alive.dtype.type(-math.inf), alive.dtype.type(nms.effective_score_thresh)
    indices: list[int] = []
    found: list[Any] = []
    with np.errstate(invalid="ignore"):  # dead · 0
        while len(indices) < min(nms.max_output_size, len(alive)):
            index = int(alive.argmax())
            if not alive[index] > left:
                break
            indices.append(index)
            found.append(alive[index])
            decayed = alive * effects[index] if nms.is_soft else np.where(effects[index], dead, alive)
            kept = decayed >= threshold if nms.pyfunc else decayed > threshold
            alive = np.where(same[index], np.where(kept, decayed, dead), alive)
            alive[index] = dead
    if len(indices) < nms.max_output_size and left > -math.inf:
        return None
    return np.array(indices, np.int64), np.array(found, alive.dtype)
