"""Head outputs in, detections out, as in AutoML: candidates, box decoding, non-maximum suppression.

Sources: AutoML ``tf2/postprocess.py`` and ``nms_np.py``; TensorFlow's ``NonMaxSuppressionV5``; Soft-NMS
(Bodla et al., ICCV 2017). Everything is batched tensor work on the device of the head outputs: the only
loop runs over output slots, and nothing forces a GPU synchronisation (tested with PyTorch's fake tensors).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pytorch_model.anchors import decode_boxes
from pytorch_model.detection.settings import NMSConfig

CLASS_OFFSET = 1  # AutoML's class ids start at 1; 0 stands for background


class Candidates(NamedTuple):
    """The input of non-maximum suppression: K boxes per image, best first or in anchor order."""

    boxes_yxyx: Tensor  # float32 [N, K, 4], pixels of the network's input
    scores: Tensor  # float32 [N, K], 0…1
    classes: Tensor  # int64 [N, K], class *indices*, from 0


class Detections(NamedTuple):
    """AutoML's detections, M = ``max_output_size`` per image, scores descending.

    Rows from ``valid_len`` on are padding.
    """

    boxes_yxyx: Tensor  # float32 [N, M, 4], pixels of the original image
    scores: Tensor  # float32 [N, M], 0…1
    classes: Tensor  # int64 [N, M], class ids, from 1
    valid_len: Tensor  # int64 [N]


def postprocess(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors_yxyx: Tensor,
    image_size: tuple[int, int],
    nms: NMSConfig,
    image_scales: Tensor | None = None,
) -> Detections:
    """Detections by the suppression that ``nms.scope`` names; arguments as in :func:`postprocess_global`."""
    if nms.scope == "global":
        return postprocess_global(class_outputs, box_outputs, anchors_yxyx, image_size, nms, image_scales)
    return postprocess_per_class(class_outputs, box_outputs, anchors_yxyx, nms, image_scales)


def postprocess_per_class(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors_yxyx: Tensor,
    nms: NMSConfig | None = None,
    image_scales: Tensor | None = None,
) -> Detections:
    """Detections by suppression within each class, as in AutoML's COCO evaluation.

    ``class_outputs``, ``box_outputs``: per level, logits [N, anchors · classes, H, W] and regressions
    [N, anchors · 4, H, W]. ``anchors_yxyx``: float32 [A, 4] from :func:`generate_anchors`, on their device.
    ``image_scales``: float32 [N], original pixels per network pixel. Boxes are not clipped to the image.
    Padding is zero. Raises ValueError if outputs and anchors do not fit each other.
    """
    nms = nms or NMSConfig()
    candidates = pre_nms(class_outputs, box_outputs, anchors_yxyx, nms.max_nms_inputs)
    return per_class_nms(candidates, nms, image_scales)


def per_class_nms(candidates: Candidates, nms: NMSConfig, image_scales: Tensor | None = None) -> Detections:
    """The second half of :func:`postprocess_per_class`: suppress candidates, scale boxes back."""
    # Equal scores: the lower class first, then the lower candidate. AutoML concatenates in this order.
    places = torch.arange(candidates.classes.shape[1], device=candidates.classes.device)
    order = (candidates.classes * len(places) + places).argsort(dim=1)
    candidates = Candidates(*(_pick(values, order) for values in candidates))
    selected, scores, valid_len = non_max_suppression(
        candidates.boxes_yxyx, candidates.scores, candidates.classes, nms
    )
    valid = torch.arange(selected.shape[1], device=selected.device) < valid_len[:, None]
    boxes_yxyx = _pick(candidates.boxes_yxyx, selected) * valid[..., None]
    classes = (_pick(candidates.classes, selected) + CLASS_OFFSET) * valid
    return Detections(_to_original(boxes_yxyx, image_scales), scores, classes, valid_len)


def postprocess_global(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors_yxyx: Tensor,
    image_size: tuple[int, int],
    nms: NMSConfig,
    image_scales: Tensor | None = None,
) -> Detections:
    """Detections by suppression across classes, as in AutoML's exported models: a box acts on every other.

    As :func:`postprocess_per_class`, but boxes are clipped to ``image_size`` (height, width, of the network's
    input) after suppression, and padding repeats candidate 0 with score 0, as TensorFlow's padded operation
    does. Source: AutoML ``tf2/postprocess.py``, ``postprocess_global``.
    """
    candidates = pre_nms(class_outputs, box_outputs, anchors_yxyx, nms.max_nms_inputs)
    one_class = torch.zeros_like(candidates.classes)
    selected, scores, valid_len = non_max_suppression(
        candidates.boxes_yxyx, candidates.scores, one_class, nms
    )
    boxes_yxyx = _pick(candidates.boxes_yxyx, selected)
    boxes_yxyx[..., 0::2].clamp_(0, image_size[0])
    boxes_yxyx[..., 1::2].clamp_(0, image_size[1])
    classes = _pick(candidates.classes, selected) + CLASS_OFFSET
    return Detections(_to_original(boxes_yxyx, image_scales), scores, classes, valid_len)


def _to_original(boxes: Tensor, image_scales: Tensor | None) -> Tensor:
    return boxes if image_scales is None else boxes * image_scales.to(boxes)[:, None, None]


def _pick(values: Tensor, indices: Tensor) -> Tensor:
    """``values`` [N, K, …] at ``indices`` [N, M] → [N, M, …]."""
    return values[torch.arange(values.shape[0], device=values.device)[:, None], indices]


# ---------------------------------------------------------------------------------------------------
# Candidates
# ---------------------------------------------------------------------------------------------------


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
        box_regressions = _pick(box_regressions, anchors)
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
    best_by_level = [_split_channels(level, num_anchors).amax(dim=2) for level in class_outputs]
    best = torch.cat([_flatten_anchors(level) for level in best_by_level], dim=1)
    # Sorted, so that pairs of equal logits keep their order below.
    anchors = _top_indices(best.float(), min(count, best.shape[1])).sort(dim=1).values
    logits = _logits_of_anchors(class_outputs, anchors, num_anchors).flatten(1)
    pairs = _top_indices(logits, min(count, logits.shape[1]))
    return _pick(anchors, pairs // num_classes), pairs % num_classes, _pick(logits, pairs)


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


# ---------------------------------------------------------------------------------------------------
# Non-maximum suppression
# ---------------------------------------------------------------------------------------------------


def non_max_suppression(
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
