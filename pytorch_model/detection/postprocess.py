"""Head outputs in, detections out, as in AutoML: candidates, box decoding, non-maximum suppression.

Source: AutoML ``tf2/postprocess.py``. The work is done on the device of the head outputs. On a GPU nothing
forces a synchronisation (tested with PyTorch's fake tensors).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pytorch_model.detection.settings import NMSConfig
from pytorch_model.detection.suppression import non_max_suppression
from pytorch_model.detection.suppression.candidates import Candidates, pick, pre_nms

CLASS_OFFSET = 1  # AutoML's class ids start at 1; 0 stands for background


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
    ``image_scales``: original pixels per network pixel, float32 [N, 2] (down, across) or [N] for both. Boxes
    are not clipped to the image. Padding is zero. Raises ValueError if outputs and anchors do not fit each
    other.
    """
    nms = nms or NMSConfig()
    candidates = pre_nms(class_outputs, box_outputs, anchors_yxyx, nms.max_nms_inputs)
    return per_class_nms(candidates, nms, image_scales)


def per_class_nms(candidates: Candidates, nms: NMSConfig, image_scales: Tensor | None = None) -> Detections:
    """The second half of :func:`postprocess_per_class`: suppress candidates, scale boxes back."""
    # Equal scores: the lower class first, then the lower candidate. AutoML concatenates in this order.
    places = torch.arange(candidates.classes.shape[1], device=candidates.classes.device)
    order = (candidates.classes * len(places) + places).argsort(dim=1)
    candidates = Candidates(*(pick(values, order) for values in candidates))
    selected, scores, valid_len = non_max_suppression(
        candidates.boxes_yxyx, candidates.scores, candidates.classes, nms
    )
    valid = torch.arange(selected.shape[1], device=selected.device) < valid_len[:, None]
    boxes_yxyx = pick(candidates.boxes_yxyx, selected) * valid[..., None]
    classes = (pick(candidates.classes, selected) + CLASS_OFFSET) * valid
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
    boxes_yxyx = pick(candidates.boxes_yxyx, selected)
    boxes_yxyx[..., 0::2].clamp_(0, image_size[0])
    boxes_yxyx[..., 1::2].clamp_(0, image_size[1])
    classes = pick(candidates.classes, selected) + CLASS_OFFSET
    return Detections(_to_original(boxes_yxyx, image_scales), scores, classes, valid_len)


def _to_original(boxes: Tensor, image_scales: Tensor | None) -> Tensor:
    if image_scales is None:
        return boxes
    per_axis = image_scales if image_scales.ndim == 2 else image_scales[:, None].expand(-1, 2)
    return boxes * torch.cat((per_axis, per_axis), dim=1)[:, None].to(boxes)
