"""The catalogue: every tensor of ``EfficientDet(config)``, with its shape and dtype. Does not import torch.

It is written from the network's modules, independently of the porting rules, so that what is ported or read
can be checked where PyTorch is not loaded. The tests compare it with the network's own ``state_dict()``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from pytorch_model.config import Block, EfficientDetConfig


class Spec(NamedTuple):
    """What the network needs of one tensor. ``trainable``: gradient descent changes it."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    trainable: bool = True


Specs = Iterator[tuple[str, Spec]]


def tensor_specs(config: EfficientDetConfig) -> Mapping[str, Spec]:
    """State-dict key → :class:`Spec`, in the order of the network's ``state_dict()``."""
    return dict(_network(config))


def _network(config: EfficientDetConfig) -> Specs:
    backbone, filters = config.backbone, config.fpn_num_filters
    yield from _conv_bn("backbone.stem", 3, backbone.stem_filters, 3)
    for index, block in enumerate(backbone.blocks):
        yield from _block(f"backbone.blocks.{index}", block)
    for level in config.extra_levels:
        first = level == config.extra_levels[0]
        yield from _resample(
            f"resample.p{level}", backbone.filters_at(level - 1) if first else filters, filters
        )
    for cell in range(config.fpn_cell_repeats):
        yield from _cell(config, cell)
    for head, outputs in (("class_net", config.num_classes), ("box_net", 4)):
        yield from _head(config, head, config.num_anchors * outputs)


def _conv(key: str, in_filters: int, filters: int, kernel: int = 1, bias: bool = False) -> Specs:
    """``in_filters``: input channels of one group, 1 for a depthwise convolution."""
    yield f"{key}.weight", Spec((filters, in_filters, kernel, kernel))
    if bias:
        yield f"{key}.bias", Spec((filters,))


def _bn(key: str, filters: int) -> Specs:
    for leaf in ("weight", "bias"):
        yield f"{key}.{leaf}", Spec((filters,))
    for leaf in ("running_mean", "running_var"):
        yield f"{key}.{leaf}", Spec((filters,), trainable=False)
    yield f"{key}.num_batches_tracked", Spec((), "int64", trainable=False)


def _conv_bn(key: str, in_filters: int, filters: int, kernel: int = 1) -> Specs:
    yield from _conv(f"{key}.conv", in_filters, filters, kernel)
    yield from _bn(f"{key}.bn", filters)


def _separable(key: str, in_filters: int, filters: int, bias: bool = False) -> Specs:
    yield from _conv(f"{key}.depthwise", 1, in_filters, 3)
    yield from _conv(f"{key}.pointwise", in_filters, filters, bias=bias)


def _block(key: str, block: Block) -> Specs:
    inner = block.expanded_filters
    if block.expand_ratio > 1:
        yield from _conv_bn(f"{key}.expand", block.in_filters, inner)
    yield from _conv_bn(f"{key}.depthwise", 1, inner, block.kernel_size)
    if block.se_filters:
        yield from _conv(f"{key}.se.reduce", inner, block.se_filters, bias=True)
        yield from _conv(f"{key}.se.expand", block.se_filters, inner, bias=True)
    yield from _conv_bn(f"{key}.project", inner, block.out_filters)


def _resample(key: str, in_filters: int, filters: int) -> Specs:
    if in_filters != filters:
        yield from _conv_bn(key, in_filters, filters)


def _cell(config: EfficientDetConfig, cell: int) -> Specs:
    filters, method = config.fpn_num_filters, config.fpn_weight_method
    for index, node in enumerate(config.bifpn_nodes):
        key = f"bifpn.cells.{cell}.nodes.{index}"
        for i, source in enumerate(node.inputs):
            yield from _resample(f"{key}.resample.{i}", config.node_input_filters(cell, source), filters)
        if method != "sum":
            inputs = len(node.inputs)
            yield (
                f"{key}.fuse.weights",
                Spec((inputs, filters) if method.startswith("channel_") else (inputs,)),
            )
        yield from _separable(f"{key}.conv", filters, filters)
        yield from _bn(f"{key}.bn", filters)


def _head(config: EfficientDetConfig, key: str, outputs: int) -> Specs:
    filters, repeats = config.fpn_num_filters, range(config.box_class_repeats)
    for i in repeats:
        yield from _separable(f"{key}.convs.{i}", filters, filters)
    for i in repeats:
        for level in range(len(config.levels)):
            yield from _bn(f"{key}.bns.{i}.{level}", filters)
    yield from _separable(f"{key}.predict", filters, outputs, bias=True)
