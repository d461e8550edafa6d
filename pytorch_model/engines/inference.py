"""The network as an engine computes it: sizes fixed, batch norms folded, fusion weights constant.

:func:`network` is written once, over the few operations of :class:`Ops`; an engine supplies these operations.
It computes the same function as :class:`~pytorch_model.efficientdet.EfficientDet` in evaluation mode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pytorch_model.config import Block, EfficientDetConfig, Node
from pytorch_model.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Feature(Generic[T]):
    """An engine's value [N, channels, *size] and what is known of it before it is computed."""

    value: T
    channels: int
    size: tuple[int, int]


class Ops(Protocol[T]):
    """The operations of an engine. Sizes and paddings are numbers, so that a graph of them has no shapes.

    Layers are named by their keys in the state dict: ``conv`` by the prefix of its weight, ``bn`` by that of
    the batch norm that follows it and is folded into it.
    """

    def conv(
        self,
        x: Feature[T],
        conv: str,
        bn: str | None = None,
        *,
        filters: int,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        act: str | None = None,
    ) -> Feature[T]: ...

    def act(self, x: Feature[T], act: str) -> Feature[T]: ...

    def gate(self, x: Feature[T], se: str, filters: int, act: str) -> Feature[T]:
        """Squeeze and excite: ``x`` times a gate computed from its channel means."""

    def add(self, x: Feature[T], y: Feature[T]) -> Feature[T]: ...

    def fuse(self, inputs: list[Feature[T]], weights: str | None) -> Feature[T]:
        """The sum of ``inputs`` weighted by the fusion weights at this key; None: a plain sum."""

    def max_pool(self, x: Feature[T], size: tuple[int, int]) -> Feature[T]:
        """Down to ``size``, as :func:`pytorch_model.layers.max_pool_to`."""

    def resize(self, x: Feature[T], size: tuple[int, int]) -> Feature[T]:
        """Up to ``size``, as :func:`pytorch_model.layers.nearest_resize`."""


def network(
    config: EfficientDetConfig, ops: Ops[T], images: Feature[T]
) -> tuple[list[Feature[T]], list[Feature[T]]]:
    """(class outputs, box outputs), one per level, of normalised ``images``."""
    features = _backbone(config, ops, images)
    for level in config.extra_levels:
        height, width = features[-1].size
        down = ((height - 1) // 2 + 1, (width - 1) // 2 + 1)
        features.append(_resample(config, ops, features[-1], f"resample.p{level}", down))
    for cell in range(config.fpn_cell_repeats):
        features = _cell(config, ops, features, f"bifpn.cells.{cell}")
    outputs = {
        "class_net": config.num_anchors * config.num_classes,
        "box_net": config.num_anchors * 4,
    }
    heads = [
        [_head(config, ops, x, head, level, filters) for level, x in enumerate(features)]
        for head, filters in outputs.items()
    ]
    return heads[0], heads[1]


def _backbone(config: EfficientDetConfig, ops: Ops[T], images: Feature[T]) -> list[Feature[T]]:
    backbone, act = config.backbone, config.act_type
    levels = [level for level in config.levels if level not in config.extra_levels]
    endpoints = [backbone.reduction_blocks[level] for level in levels]
    stem = "backbone.stem"
    x = ops.conv(
        images, f"{stem}.conv", f"{stem}.bn", filters=backbone.stem_filters, kernel=3, stride=2, act=act
    )
    features = []
    for index, block in enumerate(backbone.blocks):
        x = _block(ops, x, f"backbone.blocks.{index}", block, act)
        if index in endpoints:
            features.append(x)
    return features


def _block(ops: Ops[T], x: Feature[T], key: str, block: Block, act: str) -> Feature[T]:
    shortcut, inner = x, block.expanded_filters
    if block.expand_ratio > 1:
        x = ops.conv(x, f"{key}.expand.conv", f"{key}.expand.bn", filters=inner, act=act)
    x = ops.conv(
        x,
        f"{key}.depthwise.conv",
        f"{key}.depthwise.bn",
        filters=inner,
        kernel=block.kernel_size,
        stride=block.stride,
        depthwise=True,
        act=act,
    )
    if block.se_filters:
        x = ops.gate(x, f"{key}.se", block.se_filters, act)
    x = ops.conv(x, f"{key}.project.conv", f"{key}.project.bn", filters=block.out_filters)
    return ops.add(x, shortcut) if block.has_residual else x


def _resample(
    config: EfficientDetConfig, ops: Ops[T], x: Feature[T], key: str, size: tuple[int, int]
) -> Feature[T]:
    """Raises :class:`ConfigError` if one axis must grow and the other shrink."""

    def match_width(x: Feature[T]) -> Feature[T]:
        filters = config.fpn_num_filters
        return x if x.channels == filters else ops.conv(x, f"{key}.conv", f"{key}.bn", filters=filters)

    if x.size[0] > size[0] and x.size[1] > size[1]:
        if config.conv_after_downsample:
            return match_width(ops.max_pool(x, size))
        return ops.max_pool(match_width(x), size)
    if x.size[0] <= size[0] and x.size[1] <= size[1]:
        x = match_width(x)
        return x if x.size == size else ops.resize(x, size)
    raise ConfigError(
        f"cannot resample a {x.size[0]}×{x.size[1]} feature map to {size[0]}×{size[1]}: one side would grow, "
        "the other shrink; use an image whose short side is larger"
    )


def _cell(config: EfficientDetConfig, ops: Ops[T], features: list[Feature[T]], key: str) -> list[Feature[T]]:
    nodes = list(features)
    sizes = {level: x.size for level, x in zip(config.levels, features, strict=True)}
    for index, node in enumerate(config.bifpn_nodes):
        nodes.append(_node(config, ops, nodes, f"{key}.nodes.{index}", node, sizes[node.level]))
    last = {node.level: node.id for node in config.bifpn_nodes}
    return [nodes[last[level]] for level in config.levels]


def _node(
    config: EfficientDetConfig,
    ops: Ops[T],
    nodes: list[Feature[T]],
    key: str,
    node: Node,
    size: tuple[int, int],
) -> Feature[T]:
    inputs = [
        _resample(config, ops, nodes[source], f"{key}.resample.{index}", size)
        for index, source in enumerate(node.inputs)
    ]
    x = ops.fuse(inputs, None if config.fpn_weight_method == "sum" else f"{key}.fuse.weights")
    if config.conv_bn_act_pattern:
        return _separable(config, ops, x, f"{key}.conv", f"{key}.bn", act=config.act_type)
    return _separable(config, ops, ops.act(x, config.act_type), f"{key}.conv", f"{key}.bn")


def _separable(
    config: EfficientDetConfig,
    ops: Ops[T],
    x: Feature[T],
    key: str,
    bn: str | None,
    filters: int | None = None,
    act: str | None = None,
) -> Feature[T]:
    x = ops.conv(x, f"{key}.depthwise", filters=x.channels, kernel=3, depthwise=True)
    return ops.conv(x, f"{key}.pointwise", bn, filters=filters or x.channels, act=act)


def _head(
    config: EfficientDetConfig, ops: Ops[T], x: Feature[T], head: str, level: int, filters: int
) -> Feature[T]:
    for i in range(config.box_class_repeats):
        shortcut = x
        x = _separable(config, ops, x, f"{head}.convs.{i}", f"{head}.bns.{i}.{level}", act=config.act_type)
        if i > 0 and config.survival_prob:
            x = ops.add(x, shortcut)
    return _separable(config, ops, x, f"{head}.predict", None, filters)
