"""AutoML's losses: focal loss of the classes, Huber loss of the boxes, IoU losses as an option, weight decay.

Sources: AutoML ``det_model_fn.py`` (``focal_loss``, ``_box_loss``, ``detection_loss``, ``reg_l2_loss``),
``tf2/train_lib.py`` (``FocalLoss``, ``BoxLoss``, ``BoxIouLoss``), ``iou_utils.py``; Lin et al., Focal Loss
for Dense Object Detection, ICCV 2017, section 3; Zheng et al., Distance-IoU Loss, AAAI 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytorch_model.anchors import decode_boxes
from pytorch_model.config import shown
from pytorch_model.errors import ConfigError
from pytorch_model.training.targets import IGNORED, Targets

IOU_LOSSES = ("iou", "giou", "diou", "ciou")


@dataclass(frozen=True)
class LossSettings:
    """AutoML's hyper-parameters of the losses, by its names.

    Raises :class:`ConfigError` if ``iou_loss_type`` is neither None nor one of :data:`IOU_LOSSES`.
    """

    alpha: float = 0.25
    gamma: float = 1.5
    label_smoothing: float = 0.0
    delta: float = 0.1
    box_loss_weight: float = 50.0
    iou_loss_type: str | None = None
    iou_loss_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.iou_loss_type is not None and self.iou_loss_type not in IOU_LOSSES:
            raise ConfigError(
                f"iou_loss_type: {shown(self.iou_loss_type)} is none of {', '.join(IOU_LOSSES)}; or give None"
            )


class DetectionLoss(NamedTuple):
    """Scalars. ``total``: the others, weighted; weight decay is not in it. 0 for a loss that is off."""

    total: Tensor
    classes: Tensor
    boxes: Tensor
    box_iou: Tensor


def detection_loss(
    class_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    targets: Targets,
    normaliser: float | Tensor,
    settings: LossSettings,
    anchors_yxyx: Tensor,
) -> DetectionLoss:
    """The loss of a batch, in the type of the outputs: give float32, also under autocast.

    ``class_outputs``, ``box_outputs``: as ``EfficientDet`` returns them. ``normaliser``: AutoML's is the
    number of positive anchors in the batch, plus 1; in a batch over several processes, that of all of it.
    ``anchors_yxyx``: [A, 4], which only an IoU loss reads.
    """
    anchors = [x.shape[1] // 4 for x in box_outputs]  # at a location
    counts = [n * x.shape[2] * x.shape[3] for n, x in zip(anchors, box_outputs, strict=True)]
    boxes = box_iou = nothing = class_outputs[0].new_zeros(())
    by_level = zip(class_outputs, targets.classes.split_with_sizes(counts, dim=1), strict=True)
    losses = (focal_loss(x, t, settings.alpha, settings.gamma, settings.label_smoothing) for x, t in by_level)
    classes = sum(losses, start=nothing) / normaliser
    if settings.box_loss_weight:
        by_level = zip(box_outputs, targets.boxes.split_with_sizes(counts, dim=1), strict=True)
        losses = (box_loss(x, t, settings.delta) for x, t in by_level)
        boxes = sum(losses, start=nothing) / (4 * normaliser)
    if settings.iou_loss_type:
        rows = torch.cat([by_anchor(x, 4) for x in box_outputs], dim=1)
        box_iou = iou_loss(rows, targets.boxes, anchors_yxyx, settings.iou_loss_type) / (4 * normaliser)
    total = classes + settings.box_loss_weight * boxes + settings.iou_loss_weight * box_iou
    return DetectionLoss(total, classes, boxes, box_iou)


def by_anchor(outputs: Tensor, size: int) -> Tensor:
    """One level's [N, anchors · size, H, W] → [N, H · W · anchors, size], in the order of the anchors."""
    return outputs.permute(0, 2, 3, 1).reshape(len(outputs), -1, size)


def _like_outputs(targets: Tensor, outputs: Tensor) -> Tensor:
    """One level's targets [N, H · W · anchors, …] → [N, anchors, …, H, W], as the outputs lie in memory."""
    images, _, height, width = outputs.shape
    by_place = targets.reshape(images, height, width, -1, *targets.shape[2:])
    return by_place.movedim((1, 2), (-2, -1)).contiguous()  # small; mixed strides would slow every operation


def focal_loss(logits: Tensor, classes: Tensor, alpha: float, gamma: float, label_smoothing: float) -> Tensor:
    """One level's sum over images, anchors and classes. ``classes``: [N, H · W · anchors], see Targets.

    ``logits``: [N, anchors · num_classes, H, W]. Each (anchor, class) is a yes-or-no question. A class
    beyond the last is background in all of them. Smoothing touches the cross entropy alone.

    AutoML's gradient is NaN where γ < 1 and 1 − p_t rounds to 0; this one is finite.
    """
    classes = _like_outputs(classes, logits)[:, :, None]  # [N, anchors, 1, H, W]
    x = logits.reshape(*classes.shape[:2], -1, *logits.shape[2:])  # [N, anchors, num_classes, H, W]
    truth = classes == torch.arange(x.shape[2], device=x.device)[:, None, None]
    ignored = classes == IGNORED
    loss: Tensor = _FocalSum.apply(x, truth, ignored, alpha, gamma, label_smoothing)  # type: ignore[no-untyped-call]
    return loss


class _FocalSum(torch.autograd.Function):
    """The formula of the focal loss, summed, and its derivative.

    Written in s, the logit of the wrong answer, so that no step cancels or divides by zero: 1 − p_t = σ(s),
    and the cross entropy with a label smoothed by ε is softplus(s) − ε/2 · s. Because the derivative is
    written out, a single tensor is kept until the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, truth: Tensor, ignored: Tensor, alpha: float, gamma: float, smoothing: float
    ) -> Tensor:
        s = torch.where(truth, -x, x)
        log_miss, log_hit = F.logsigmoid(s), F.logsigmoid(-s)
        balance = torch.where(truth, x.new_full((), alpha), 1 - alpha)  # two numbers would make it float32
        weight = (gamma * log_miss).exp_().mul_(balance).masked_fill_(ignored, 0.0)
        entropy = s.mul_(-0.5 * smoothing).sub_(log_hit)
        if ctx.needs_input_grad[0]:
            slope = log_hit.exp_().mul_(entropy).mul_(gamma).add_(log_miss.exp_()).sub_(0.5 * smoothing)
            slope = slope.mul_(weight)  # d/ds
            ctx.save_for_backward(torch.where(truth, -slope, slope))
        return weight.mul_(entropy).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None, None, None, None


def box_loss(regressions: Tensor, targets: Tensor, delta: float) -> Tensor:
    """One level's Huber loss, summed over the coordinates whose target is not exactly 0, as in AutoML.

    ``regressions``: [N, anchors · 4, H, W]; ``targets``: [N, H · W · anchors, 4]. Quadratic up to ``delta``.
    """
    targets = _like_outputs(targets, regressions).flatten(1, 2).to(regressions.dtype)
    loss = F.huber_loss(regressions, targets, reduction="none", delta=delta)
    return loss.masked_fill(targets == 0, 0.0).sum()


def iou_loss(regressions: Tensor, targets: Tensor, anchors_yxyx: Tensor, kind: str) -> Tensor:
    """Σ (1 − IoU), or its variant ``kind``, of decoded boxes with their decoded targets.

    ``regressions`` and ``targets``: [..., A, 4]; ``anchors_yxyx``: [A, 4], or of their shape. As in AutoML, a
    coordinate whose target is exactly 0 sets the *corner* of its position to 0 in both boxes (ty the top, tx
    the left, th the bottom, tw the right side), and a box counts if its target then has positive sides.
    """
    anchors_yxyx, targets = anchors_yxyx.to(regressions), targets.to(regressions.dtype)
    kept = targets != 0
    truth = decode_boxes(targets, anchors_yxyx) * kept
    counted = (truth[..., 2:] > truth[..., :2]).all(dim=-1)
    found = decode_boxes(regressions[counted], anchors_yxyx.expand_as(regressions)[counted])
    return (1 - iou_values(found * kept[counted], truth[counted], kind)).sum()


def iou_values(boxes_yxyx: Tensor, truth_yxyx: Tensor, kind: str) -> Tensor:
    """IoU, GIoU, DIoU or CIoU of pairs of boxes: [R, 4], [R, 4] → [R]; 1 for equal boxes."""
    low, high = boxes_yxyx[:, :2], boxes_yxyx[:, 2:]
    truth_low, truth_high = truth_yxyx[:, :2], truth_yxyx[:, 2:]
    sides, truth_sides = (high - low).clamp(min=0), (truth_high - truth_low).clamp(min=0)
    common = (torch.minimum(high, truth_high) - torch.maximum(low, truth_low)).clamp(min=0).prod(dim=1)
    union = sides.prod(dim=1) + truth_sides.prod(dim=1) - common
    iou = _divide(common, union)
    if kind == "iou":
        return iou
    around = torch.maximum(high, truth_high) - torch.minimum(low, truth_low)  # the box that encloses both
    if kind == "giou":
        area = around.clamp(min=0).prod(dim=1)
        return iou - _divide(area - union, area)
    apart = ((low + high) / 2 - (truth_low + truth_high) / 2).square().sum(dim=1)
    diou = iou - _divide(apart, around.square().sum(dim=1))
    if kind == "diou":
        return diou
    v = 4 / math.pi**2 * (_aspect(truth_sides) - _aspect(sides)).square()
    return diou - _divide(v, 1 - iou + v) * v  # the paper stops the gradient of this factor, AutoML does not


def _aspect(sides: Tensor) -> Tensor:
    return torch.atan(_divide(sides[:, 1], sides[:, 0]))


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where the denominator is 0, as TensorFlow's ``divide_no_nan``; the gradient too."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def decayed(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that AutoML decays: the kernels of convolutions, depthwise and pointwise ones too.

    AutoML chooses variables by name, ``.*(kernel|weight):0``. Here the kind of the layer says the same: no
    bias, batch norm or fusion weight is among them.
    """
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def decay_loss(kernels: Iterable[Tensor], weight_decay: float) -> Tensor:
    """AutoML's ``reg_l2_loss``: ``weight_decay`` · Σ ½‖kernel‖², part of the loss and so of its gradient."""
    return weight_decay / 2 * torch.stack([kernel.square().sum() for kernel in kernels]).sum()


def average_normaliser(
    previous: float | Tensor, normaliser: float | Tensor, positives_momentum: float
) -> float | Tensor:
    """AutoML's ``positives_momentum`` m > 0: the moving average m · previous + (1 − m) · normaliser.

    It replaces the normaliser. ``previous`` is 0 before the first step and is not corrected for that, so the
    first losses are up to 1/(1 − m) times as large.
    """
    return positives_momentum * previous + (1 - positives_momentum) * normaliser
