"""Which anchor learns which box: the training targets of a batch.

Source: AutoML ``tf2/anchors.py`` (``AnchorLabeler.label_anchors``) and ``object_detection/`` beside it
(``argmax_matcher``, ``faster_rcnn_box_coder``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BACKGROUND, IGNORED = -1, -2  # class targets that are no class

MATCH_THRESHOLD = 0.5  # an anchor learns its best box from this IoU on; there is no ignored band
_SMALLEST_SIDE = 1e-8  # pixels; the logarithm of a side must exist

#: IoU values computed at once: 16 MB a tensor, so that a processor's caches hold much of it, and 256 MB.
_CHUNK = {"cpu": 1 << 22}
_CHUNK_ON_ACCELERATORS = 1 << 26


class Targets(NamedTuple):
    """What a batch's anchors should answer, in the order of :func:`generate_anchors`.

    ``classes``: int64 [N, A], from 0; :data:`BACKGROUND`, or :data:`IGNORED`, which no labelling here gives.
    ``boxes``: float32 [N, A, 4], (ty, tx, th, tw), 0 for background.
    ``positives``: float32 [N], the anchors of each image that have a box.
    """

    classes: Tensor
    boxes: Tensor
    positives: Tensor


def label_anchors(anchors_yxyx: Tensor, boxes_yxyx: Tensor, classes: Tensor) -> Targets:
    """Label every anchor of every image, on the device of ``anchors_yxyx``.

    ``anchors_yxyx``: [A, 4]; ``boxes_yxyx``: [N, M, 4]; both in pixels. ``classes``: integers [N, M], from 1;
    negative for padding, whose box does not count. M may be 0.

    As in AutoML, a box of class 0 makes its anchors background for the class net, but the box net learns it.
    """
    anchors_yxyx = anchors_yxyx.float()
    boxes_yxyx = boxes_yxyx.to(anchors_yxyx)
    classes = classes.to(anchors_yxyx.device, torch.int64)
    if not boxes_yxyx.shape[1]:  # one box of padding, so that there is something to index
        boxes_yxyx, classes = F.pad(boxes_yxyx, (0, 0, 0, 1)), F.pad(classes, (0, 1), value=-1)
    matches = match_anchors(anchors_yxyx, boxes_yxyx, classes >= 0)
    matched, chosen = matches >= 0, matches.clamp(min=0)
    regressions = encode_boxes(boxes_yxyx.gather(1, chosen[..., None].expand(-1, -1, 4)), anchors_yxyx)
    return Targets(
        torch.where(matched, classes.gather(1, chosen) - 1, BACKGROUND),
        torch.where(matched[..., None], regressions, 0.0),
        matched.sum(dim=1).float(),
    )


def match_anchors(anchors_yxyx: Tensor, boxes_yxyx: Tensor, real: Tensor) -> Tensor:
    """The box of every anchor: int64 [N, A], an index into M; -1: background. float32 throughout.

    ``anchors_yxyx`` [A, 4], ``boxes_yxyx`` [N, M, 4], ``real`` bool [N, M]: False for padding. An anchor
    takes the box with which its IoU is largest, the first of equals, if that is at least
    :data:`MATCH_THRESHOLD`. Then every box takes the anchor with which its IoU is largest, the first of
    equals, whatever that anchor had. If several boxes want one anchor, the first box gets it. A box that
    meets no anchor takes anchor 0. M must be at least 1.
    """
    images, boxes = real.shape
    anchors = len(anchors_yxyx)
    chunk = max(1, _CHUNK.get(real.device.type, _CHUNK_ON_ACCELERATORS) // (images * boxes))
    matches = []
    box_iou = boxes_yxyx.new_full((images, boxes), -1.0)  # of each box with the best anchor so far
    box_anchor = real.new_zeros((images, boxes), dtype=torch.int64)
    for first in range(0, anchors, chunk):
        # A padded box's IoU is -1, below that of any anchor and box.
        iou = pairwise_iou(boxes_yxyx, anchors_yxyx[first : first + chunk]).where(real[..., None], -1.0)
        anchor_iou, anchor_box = iou.max(dim=1)
        matches.append(torch.where(anchor_iou >= MATCH_THRESHOLD, anchor_box, -1))
        iou_here, anchor_here = iou.max(dim=2)
        better = iou_here > box_iou  # not at equality: the first anchor stays
        box_anchor = torch.where(better, anchor_here + first, box_anchor)
        box_iou = torch.where(better, iou_here, box_iou)
    order = torch.arange(boxes, device=real.device).where(real, boxes)  # padding comes after every box
    forced = order.new_full((images, anchors), boxes).scatter_reduce(1, box_anchor, order, "amin")
    return torch.where(forced < boxes, forced, torch.cat(matches, dim=1))


def pairwise_iou(boxes_yxyx: Tensor, anchors_yxyx: Tensor) -> Tensor:
    """[N, M, 4] and [A, 4] → [N, M, A]. 0 where they do not meet, also for a box with exchanged corners."""
    top, left, bottom, right = boxes_yxyx[:, :, None].unbind(-1)
    anchor_top, anchor_left, anchor_bottom, anchor_right = anchors_yxyx.unbind(-1)
    height = (torch.minimum(bottom, anchor_bottom) - torch.maximum(top, anchor_top)).clamp_(min=0)
    width = (torch.minimum(right, anchor_right) - torch.maximum(left, anchor_left)).clamp_(min=0)
    common = height.mul_(width)
    area = (bottom - top) * (right - left)
    anchor_area = (anchor_bottom - anchor_top) * (anchor_right - anchor_left)
    iou = common / (area + anchor_area).sub_(common)
    return torch.where(common == 0, 0.0, iou)


def encode_boxes(boxes_yxyx: Tensor, anchors_yxyx: Tensor) -> Tensor:
    """The regressions (ty, tx, th, tw) from which ``decode_boxes`` makes ``boxes_yxyx``; both [..., 4]."""
    (y, x, height, width), (anchor_y, anchor_x, anchor_height, anchor_width) = (
        _centre_and_size(corners) for corners in (boxes_yxyx, anchors_yxyx)
    )
    return torch.stack(
        (
            (y - anchor_y) / anchor_height,
            (x - anchor_x) / anchor_width,
            (height / anchor_height).log(),
            (width / anchor_width).log(),
        ),
        dim=-1,
    )


def _centre_and_size(boxes_yxyx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # In AutoML's order of operations: a target that is exactly 0 does not count in the box loss.
    top, left, bottom, right = boxes_yxyx.unbind(-1)
    height, width = bottom - top, right - left
    return (
        top + height / 2,
        left + width / 2,
        height.clamp(min=_SMALLEST_SIDE),
        width.clamp(min=_SMALLEST_SIDE),
    )
