"""Class net and box net: convolutions shared by all levels, batch norms per level (paper section 4.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pytorch_model.config import EfficientDetConfig
from pytorch_model.layers import SeparableConv, activation, batch_norm, drop_connect

PRIOR_PROBABILITY = 0.01  # the initial score of every anchor, for the focal loss
PRIOR_LOGIT = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)


class Head(nn.Module):
    """Features, one [N, C, H_l, W_l] per level → predictions, one [N, num_outputs, H_l, W_l] per level."""

    def __init__(self, config: EfficientDetConfig, num_outputs: int) -> None:
        super().__init__()
        filters, repeats = config.fpn_num_filters, config.box_class_repeats
        self.convs = nn.ModuleList(SeparableConv(filters, filters, bias=False) for _ in range(repeats))
        self.bns = nn.ModuleList(
            nn.ModuleList(batch_norm(filters) for _ in config.levels) for _ in range(repeats)
        )
        self.act = activation(config.act_type)
        self.predict = SeparableConv(filters, num_outputs, bias=True)
        self.survival_prob = config.survival_prob or None  # 0 is off in AutoML too
        # What stochastic depth may leave out: every repetition but the first, at every level.
        self.draw_shape = (len(config.levels), max(repeats - 1, 0) if self.survival_prob else 0)

    @property
    def draw_count(self) -> int:
        """Rows of ``draws`` in :meth:`forward`."""
        return math.prod(self.draw_shape)

    def forward(self, features: list[Tensor], draws: Tensor | None = None) -> list[Tensor]:
        """``draws``: [draw_count, N], uniform in [0, 1), for stochastic depth; None: there is none."""
        if draws is None:
            return [self.forward_level(x, level) for level, x in enumerate(features)]
        rows = draws.reshape(*self.draw_shape, draws.shape[1])
        return [self.forward_level(x, level, rows[level]) for level, x in enumerate(features)]

    def forward_level(self, x: Tensor, level: int, draws: Tensor | None = None) -> Tensor:
        for i, (conv, bns) in enumerate(zip(self.convs, self.bns, strict=True)):
            shortcut = x
            x = self.act(bns[level](conv(x)))  # type: ignore[index]
            if i > 0 and self.survival_prob is not None:
                if draws is not None:
                    x = drop_connect(x, self.survival_prob, draws[i - 1])
                x = x + shortcut
        return self.predict(x)


def class_net(config: EfficientDetConfig) -> Head:
    """Class logits: channel ``a · num_classes + c`` is class c (from 0) of anchor a."""
    head = Head(config, config.num_anchors * config.num_classes)
    bias = head.predict.pointwise.bias
    assert bias is not None
    with torch.no_grad():
        bias.fill_(PRIOR_LOGIT)
    return head


def box_net(config: EfficientDetConfig) -> Head:
    """Box regressions: channel ``4 · a + k`` is (ty, tx, th, tw)[k] of anchor a."""
    return Head(config, config.num_anchors * 4)
