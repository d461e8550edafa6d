"""Suppression on the CPU: the same result as that of ``tensors``, bit for bit, in less time.

A selection acts only on boxes of its own class, and NumPy starts an operation in less time than PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pytorch_model.detection.settings import NMSConfig


def on_host(tensor: Tensor) -> bool:
    """Whether the values of ``tensor`` can be read at once: it is on the CPU, and no graph is being made."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def suppress_on_host(
    boxes_yxyx: Tensor, scores: Tensor, classes: Tensor, nms: NMSConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`~pytorch_model.detection.suppression.tensors.suppress_tensors`."""
    indices = np.zeros((len(scores), nms.max_output_size), np.int64)
    found = np.zeros(indices.shape, scores.numpy().dtype)
    counts = np.zeros(len(scores), np.int64)
    images = zip(boxes_yxyx.numpy(), scores.numpy(), classes.numpy(), strict=True)
    for image, (boxes, of_image, group) in enumerate(images):
        selected, their_scores = _suppress_image(boxes, of_image, group, nms)
        counts[image] = len(selected)
        indices[image, : counts[image]], found[image, : counts[image]] = selected, their_scores
    return torch.from_numpy(indices), torch.from_numpy(found), torch.from_numpy(counts)


def _suppress_image(
    boxes_yxyx: np.ndarray, scores: np.ndarray, classes: np.ndarray, nms: NMSConfig
) -> tuple[list[int], list[Any]]:
    """(indices, scores) of the selections in one image: [K, 4], [K], [K] → [m], [m]."""
    order = np.argsort(classes, kind="stable")  # a class is one run
    start_of, end_of = (np.searchsorted(classes[order], classes[order], side) for side in ("left", "right"))
    sides = np.ascontiguousarray(boxes_yxyx[order].T)
    with np.errstate(all="ignore"):  # boxes of infinite size
        areas = (sides[2] - sides[0] + nms.pyfunc) * (sides[3] - sides[1] + nms.pyfunc)
    alive = scores[order]
    dead, threshold = alive.dtype.type(-math.inf), alive.dtype.type(nms.effective_score_thresh)
    if not nms.pyfunc:
        alive[~(alive > threshold)] = dead
    selected: list[int] = []
    their_scores: list[Any] = []
    with np.errstate(all="ignore"):  # dead · 0, too
        while len(selected) < nms.max_output_size and (score := alive.max(initial=dead)) > dead:
            best = np.flatnonzero(alive == score)
            place = best[order[best].argmin()]  # of equal scores, the lower index
            selected.append(int(order[place]))
            their_scores.append(score)
            run = slice(start_of[place], end_of[place])
            overlap = _overlaps(sides[:, run], areas[run], sides[:, place], areas[place], nms)
            left = _left(alive[run], overlap, nms)
            # NaN compares false, so a box of zero or infinite size is dropped, not selected.
            left[~(left >= threshold if nms.pyfunc else left > threshold)] = dead
            alive[run] = left
            alive[place] = dead
    return selected, their_scores


def _overlaps(
    sides: np.ndarray, areas: np.ndarray, picked: np.ndarray, area: np.ndarray, nms: NMSConfig
) -> np.ndarray:
    """As ``_overlap`` of :mod:`~pytorch_model.detection.suppression.tensors`: [4, n] with [4] → [n]."""
    kind = sides.dtype.type
    lengths = np.minimum(sides[2:], picked[2:, None]) - np.maximum(sides[:2], picked[:2, None])
    np.maximum(lengths + kind(1) if nms.pyfunc else lengths, 0, out=lengths)
    intersection = lengths[0] * lengths[1]
    overlap = intersection / np.maximum(areas + area - intersection, np.finfo(kind).tiny)
    if nms.method != "diou":
        return overlap
    enclosing = np.maximum(sides[2:], picked[2:, None]) - np.minimum(sides[:2], picked[:2, None])
    between = ((sides[:2] + sides[2:]) - (picked[:2] + picked[2:])[:, None]) / 2
    apart = between[0] * between[0] + between[1] * between[1]
    diagonal = enclosing[0] * enclosing[0] + enclosing[1] * enclosing[1]
    return overlap - apart / (diagonal + kind(1e-10))


def _left(scores: np.ndarray, overlap: np.ndarray, nms: NMSConfig) -> np.ndarray:
    """What is left of ``scores`` [n] after the selection of a box that overlaps theirs by ``overlap`` [n]."""
    kind = scores.dtype.type
    if nms.method == "gaussian":
        decay = overlap * overlap * kind(-1 / nms.effective_sigma)
        return torch.from_numpy(decay).exp_().numpy() * scores  # NumPy's exp has another last bit
    beyond = overlap > kind(nms.effective_iou_thresh)
    if nms.method == "linear":
        return np.where(beyond, scores * (kind(1) - overlap), scores)
    return np.where(beyond, kind(-math.inf), scores)
