"""BiFPN: resampling, weighted fusion, the cell (paper section 3; AutoML ``efficientdet_keras.py``)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pytorch_model.config import EfficientDetConfig, Node
from pytorch_model.errors import ConfigError
from pytorch_model.layers import (
    Conv2dSame,
    SeparableConv,
    activation,
    batch_norm,
    max_pool_to,
    nearest_resize,
)

FASTATTN_EPSILON = 1e-4


class Resample(nn.Module):
    """Bring a feature map to a node's width and size. [N, in, H, W] → [N, out, *size].

    The 1×1 convolution and its batch norm exist only if the width changes. Raises :class:`ConfigError` if
    one axis must grow and the other shrink, which AutoML rejects too.
    """

    def __init__(self, in_filters: int, out_filters: int, conv_after_downsample: bool) -> None:
        super().__init__()
        changes_width = in_filters != out_filters
        self.conv = Conv2dSame(in_filters, out_filters, 1) if changes_width else None
        self.bn = batch_norm(out_filters) if changes_width else None
        self.conv_after_downsample = conv_after_downsample

    def match_width(self, x: Tensor) -> Tensor:
        return x if self.conv is None or self.bn is None else self.bn(self.conv(x))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = x.shape[-2:]
        if height > size[0] and width > size[1]:
            if self.conv_after_downsample:
                return self.match_width(max_pool_to(x, size))
            return max_pool_to(self.match_width(x), size)
        if height <= size[0] and width <= size[1]:
            x = self.match_width(x)
            return x if (height, width) == size else nearest_resize(x, size)
        raise ConfigError(
            f"cannot resample a {height}×{width} feature map to {size[0]}×{size[1]}: one side would grow, "
            "the other shrink; use an image whose short side is larger"
        )


class Fuse(nn.Module):
    """Combine a node's inputs, each [N, C, H, W], into one, by AutoML's ``fpn_weight_method``.

    ``weights`` is [inputs], or [inputs, C] for the ``channel_`` methods; ``sum`` has none.
    """

    def __init__(self, inputs: int, filters: int, method: str) -> None:
        super().__init__()
        self.method = method
        shape = (inputs, filters) if method.startswith("channel_") else (inputs,)
        self.weights = None if method == "sum" else nn.Parameter(torch.ones(shape))

    def forward(self, inputs: list[Tensor]) -> Tensor:
        if self.weights is None:
            return sum(inputs[1:], start=inputs[0])
        if self.method.endswith("fastattn"):
            weights = torch.relu(self.weights)
            weights = weights / (weights.sum(dim=0) + FASTATTN_EPSILON)
        else:
            weights = torch.softmax(self.weights, dim=0)
        weights = weights.reshape(len(inputs), -1, 1, 1)  # [inputs, 1 or C, 1, 1]
        terms = [x * weight for x, weight in zip(inputs, weights, strict=True)]
        return sum(terms[1:], start=terms[0])


class BiFPNNode(nn.Module):
    """Resample the inputs to this node's level, fuse them, then activation → separable conv → batch norm."""

    def __init__(self, config: EfficientDetConfig, cell: int, node: Node) -> None:
        super().__init__()
        filters = config.fpn_num_filters
        self.node = node
        self.resample = nn.ModuleList(
            Resample(config.node_input_filters(cell, source), filters, config.conv_after_downsample)
            for source in node.inputs
        )
        self.fuse = Fuse(len(node.inputs), filters, config.fpn_weight_method)
        self.act = activation(config.act_type)
        self.conv = SeparableConv(filters, filters, bias=False)
        self.bn = batch_norm(filters)
        self.act_last = config.conv_bn_act_pattern

    def forward(self, nodes: list[Tensor], size: tuple[int, int]) -> Tensor:
        """``nodes``: every node computed so far, by id. Returns [N, fpn_num_filters, *size]."""
        inputs = [
            resample(nodes[source], size)
            for resample, source in zip(self.resample, self.node.inputs, strict=True)
        ]
        x = self.fuse(inputs)
        if self.act_last:
            return self.act(self.bn(self.conv(x)))
        return self.bn(self.conv(self.act(x)))


class BiFPNCell(nn.Module):
    """One top-down and one bottom-up pass. One tensor per level in, one per level out."""

    def __init__(self, config: EfficientDetConfig, cell: int) -> None:
        super().__init__()
        self.nodes = nn.ModuleList(BiFPNNode(config, cell, node) for node in config.bifpn_nodes)
        self.node_levels = [node.level - config.min_level for node in config.bifpn_nodes]
        last = {node.level: node.id for node in config.bifpn_nodes}  # the last node of a level is its output
        self.outputs = [last[level] for level in config.levels]

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        nodes = list(features)
        sizes = [(x.shape[-2], x.shape[-1]) for x in features]
        for node, level in zip(self.nodes, self.node_levels, strict=True):
            nodes.append(node(nodes, sizes[level]))
        return [nodes[i] for i in self.outputs]


class BiFPN(nn.Module):
    """``fpn_cell_repeats`` cells, one after the other."""

    def __init__(self, config: EfficientDetConfig) -> None:
        super().__init__()
        self.cells = nn.ModuleList(BiFPNCell(config, cell) for cell in range(config.fpn_cell_repeats))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        for cell in self.cells:
            features = cell(features)
        return features
