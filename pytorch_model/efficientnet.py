"""The backbone: EfficientNet without its classifier (AutoML ``backbone/efficientnet_model.py``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pytorch_model.config import BackboneConfig, Block
from pytorch_model.layers import Conv2dSame, ConvBnAct, activation, drop_connect


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from the image's channel means. [N, C, H, W] → same."""

    def __init__(self, filters: int, se_filters: int, act_type: str) -> None:
        super().__init__()
        self.reduce = Conv2dSame(filters, se_filters, 1, bias=True)
        self.act = activation(act_type)
        self.expand = Conv2dSame(se_filters, filters, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean(dim=(2, 3), keepdim=True)
        gate = self.expand(self.act(self.reduce(gate)))
        return x * torch.sigmoid(gate)


class MBConv(nn.Module):
    """Inverted bottleneck: expand 1×1 → depthwise → squeeze-excite → project 1×1, plus a residual.

    [N, in_filters, H, W] → [N, out_filters, ⌈H/stride⌉, ⌈W/stride⌉]. There is no
    ``expand`` at expand ratio 1, and no ``se`` in Lite models. ``survival_prob``: for stochastic depth; None
    if the block always counts, as one without residual does.
    """

    def __init__(self, block: Block, act_type: str, survival_prob: float | None = None) -> None:
        super().__init__()
        inner = block.expanded_filters
        self.has_residual = block.has_residual
        self.survival_prob = survival_prob if block.has_residual else None
        self.expand = (
            ConvBnAct(block.in_filters, inner, 1, act_type=act_type) if block.expand_ratio > 1 else None
        )
        self.depthwise = ConvBnAct(inner, inner, block.kernel_size, block.stride, inner, act_type)
        self.se = SqueezeExcite(inner, block.se_filters, act_type) if block.se_filters else None
        self.project = ConvBnAct(inner, block.out_filters, 1)

    def forward(self, x: Tensor, draws: Tensor | None = None) -> Tensor:
        """``draws``: [N], see :func:`drop_connect`; None: no stochastic depth."""
        shortcut = x
        if self.expand is not None:
            x = self.expand(x)
        x = self.depthwise(x)
        if self.se is not None:
            x = self.se(x)
        x = self.project(x)
        if self.survival_prob is not None and draws is not None:
            x = drop_connect(x, self.survival_prob, draws)
        return x + shortcut if self.has_residual else x


class EfficientNet(nn.Module):
    """Images float [N, 3, H, W] → features at ``levels``; level l is [N, C_l, ⌈H/2^l⌉, ⌈W/2^l⌉]."""

    def __init__(self, config: BackboneConfig, act_type: str, levels: range) -> None:
        super().__init__()
        self.stem = ConvBnAct(3, config.stem_filters, 3, 2, act_type=act_type)
        survival_probs = config.survival_probs or (None,) * len(config.blocks)
        self.blocks = nn.ModuleList(
            MBConv(block, act_type, survival_prob)
            for block, survival_prob in zip(config.blocks, survival_probs, strict=True)
        )
        self.endpoints = [config.reduction_blocks[level] for level in levels]

    @property
    def draw_count(self) -> int:
        """Rows of ``draws`` in :meth:`forward`: one for each block that may be left out."""
        return sum(block.survival_prob is not None for block in self.blocks)

    def forward(self, images: Tensor, draws: Tensor | None = None) -> list[Tensor]:
        """``draws``: [draw_count, N], uniform in [0, 1), for stochastic depth; None: there is none."""
        rows = iter(()) if draws is None else iter(draws.unbind())
        x = self.stem(images)
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x) if draws is None or block.survival_prob is None else block(x, next(rows))
            if index in self.endpoints:
                features.append(x)
        return features
