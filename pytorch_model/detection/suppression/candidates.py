"""The candidates of suppression: which (anchor, class) pairs of the head outputs enter it.

Source: AutoML ``tf2/postprocess.py``, ``pre_nms``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pytorch_model.anchors import decode_boxes
from pytorch_model.detection.suppression.host import on_host
from pytorch_model.detection.suppression.host_pairs import top_pairs_on_host


class Candidates(NamedTuple):
    """The input of non-maximum suppression: K boxes per image, best first or in anchor order."""

    boxes_yxyx: Tensor  # float32 [N, K, 4], pixels of the network's input
    scores: Tensor  # float32 [N, K], 0…1
    classes: Tensor  # int64 [N, K], class *indices*, from 0


def pick(values: Tensor, indices: Tensor) -> Tensor:
    """``values`` [N, K, …] at ``indices`` [N, M] → [N, M, …]."""
    return values[torch.arange(values.shape[0], device=values.device)[:, None], indices]


def pre_nms(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors_yxyx: Tensor,
    max_nms_inputs: int,
) -> Candidates:
    """Choose the candidates, decode their boxes, turn their logits into scores.

    With ``max_nms_inputs`` above 0: that many (anchor, class) pairs per image, or all if there are fewer,
    best first; equal logits stay in index order. With 0: every anchor in order, with its best class; of equal
    classes, the lowest. Arguments as in :func:`postprocess_per_class`; raises ValueError if they do not fit.
    """
    num_anchors, num_classes = _check_shapes(class_outputs, box_outputs, anchors_yxyx)
    box_regressions = torch.cat([_by_anchor(level, num_anchors) for level in box_outputs], dim=1).float()
    if max_nms_inputs:
        anchors, classes, logits = _top_pairs(class_outputs, num_anchors, num_classes, max_nms_inputs)
        box_regressions = pick(box_regressions, anchors)
        anchors_yxyx = anchors_yxyx[anchors]
    else:
        best = [_split_channels(level, num_anchors).max(dim=2) for level in class_outputs]
        logits = torch.cat([_flatten_anchors(level.values) for level in best], dim=1).float()
        classes = torch.cat([_flatten_anchors(level.indices) for level in best], dim=1)
    return Candidates(decode_boxes(box_regressions, anchors_yxyx), logits.sigmoid(), classes)


def _check_shapes(
    class_outputs: Sequence[Tensor], box_outputs: Sequence[Tensor], anchors_yxyx: Tensor
) -> tuple[int, int]:
    """Anchors per location and number of classes; raises ValueError if the shapes contradict each other."""
    num_anchors = box_outputs[0].shape[1] // 4
    num_classes = class_outputs[0].shape[1] // max(num_anchors, 1)
    for level, (class_output, box_output) in enumerate(zip(class_outputs, box_outputs, strict=True)):
        batch, _, height, width = box_output.shape
        expected = (batch, num_anchors * num_classes, height, width)
        if class_output.shape != expected or box_output.shape[1] != num_anchors * 4:
            raise ValueError(
                f"head outputs number {level} do not belong together: class {tuple(class_output.shape)}, "
                f"box {tuple(box_output.shape)}"
            )
    total = sum(level.shape[2] * level.shape[3] for level in box_outputs) * num_anchors
    if anchors_yxyx.shape != (total, 4):
        raise ValueError(
            f"the head outputs have {total} anchors, but anchors_yxyx is {tuple(anchors_yxyx.shape)}; "
            "generate the anchors for the image size the network was given"
        )
    return num_anchors, num_classes


def _by_anchor(level: Tensor, num_anchors: int) -> Tensor:
    """[N, anchors · values, H, W] → [N, H · W · anchors, values], in the anchors' order."""
    batch, channels = level.shape[:2]
    return level.permute(0, 2, 3, 1).reshape(batch, -1, channels // num_anchors)


def _split_channels(level: Tensor, num_anchors: int) -> Tensor:
    """[N, anchors · values, H, W] → [N, anchors, values, H, W], a view."""
    batch, channels, height, width = level.shape
    return level.view(batch, num_anchors, channels // num_anchors, height, width)


def _flatten_anchors(level: Tensor) -> Tensor:
    """[N, anchors, H, W] → [N, H · W · anchors], in the anchors' order."""
    return level.permute(0, 2, 3, 1).flatten(1)


def _top_pairs(
    class_outputs: Sequence[Tensor], num_anchors: int, num_classes: int, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` highest logits per image: (anchor index, class index, logit), each [N, count].

    Sorting all pairs would be slow and is not needed. First the ``count`` anchors with the highest best logit
    are chosen. Every pair of any other anchor is lower than the best pair of each of these, so two small
    selections find the same pairs as one large one.
    """
    if on_host(class_outputs[0]):
        found = top_pairs_on_host(class_outputs, num_anchors, num_classes, count)
        if found is not None:
            return found
    best_by_level = [_split_channels(level, num_anchors).amax(dim=2) for level in class_outputs]
    best = torch.cat([_flatten_anchors(level) for level in best_by_level], dim=1)
    # Sorted, so that pairs of equal logits keep their order below.
    anchors = _top_indices(best.float(), min(count, best.shape[1])).sort(dim=1).values
    logits = _logits_of_anchors(class_outputs, anchors, num_anchors).flatten(1)
    pairs = _top_indices(logits, min(count, logits.shape[1]))
    return pick(anchors, pairs // num_classes), pairs % num_classes, pick(logits, pairs)


def _top_indices(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest of ``values`` float32 [N, K], descending, lower index first on ties.

    ``torch.topk`` does not define the order of equal values. An integer key holds the value in its high bits
    and the index in its low bits, so no two keys are equal.
    """
    if torch.onnx.is_in_onnx_export():
        return values.topk(count, dim=1).indices  # ONNX defines that TopK takes the lower of equal indices
    bits = (values + 0.0).contiguous().view(torch.int32).long()  # + 0.0 makes -0.0 equal 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative floats order backwards as integers
    last = 0xFFFFFFFF
    keys = (ordered << 32) | (last - torch.arange(values.shape[1], device=values.device))
    return last - (keys.topk(count, dim=1).values & last)


def _logits_of_anchors(class_outputs: Sequence[Tensor], anchors: Tensor, num_anchors: int) -> Tensor:
    """All class logits of chosen anchors: float32 [N, K, classes] for ``anchors`` int64 [N, K].

    Every level is read at every anchor, and only its own anchors are kept. This is cheaper than first putting
    all levels into the anchors' order, which would move every logit.
    """
    image = torch.arange(anchors.shape[0], device=anchors.device)[:, None]
    location, anchor = (
        anchors // num_anchors,
        anchors % num_anchors,
    )  # location counts from this level's first
    logits = class_outputs[0].new_zeros(())
    for level in class_outputs:
        size = level.shape[2] * level.shape[3]
        by_location = _split_channels(level, num_anchors).flatten(3)
        found = by_location[image, anchor, :, location.clamp(0, size - 1)]
        inside = ((location >= 0) & (location < size))[..., None]
        logits = torch.where(inside, found, logits)
        location = location - size
    return logits.float()
