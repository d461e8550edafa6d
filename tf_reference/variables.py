"""The catalogue: every AutoML variable of any configuration, with its shape. Does not import TensorFlow.

It is written from AutoML's scopes, independently of the porting rules, so that a comparison of the two is a
proof.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pytorch_model.config import Block, EfficientDetConfig


class Variable(NamedTuple):
    name: str
    shape: tuple[int, ...]
    trainable: bool = True


def variables(config: EfficientDetConfig) -> Iterator[Variable]:
    """Every model variable, grouped by scope: no moving averages, no optimizer slots, no global_step."""
    yield from _backbone(config)
    for level in config.extra_levels:
        in_filters = config.backbone.filters_at(level - 1) if level == config.extra_levels[0] else None
        yield from _resample(
            f"resample_p{level}", in_filters or config.fpn_num_filters, config.fpn_num_filters
        )
    for cell in range(config.fpn_cell_repeats):
        yield from _cell(config, cell)
    for kind, outputs in (("class", config.num_classes), ("box", 4)):
        yield from _head(config, kind, config.num_anchors * outputs)


def variable_shapes(config: EfficientDetConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every model variable."""
    return {variable.name: variable.shape for variable in variables(config)}


def _bn(scope: str, filters: int) -> Iterator[Variable]:
    for leaf in ("gamma", "beta"):
        yield Variable(f"{scope}/{leaf}", (filters,))
    for leaf in ("moving_mean", "moving_variance"):
        yield Variable(f"{scope}/{leaf}", (filters,), trainable=False)


def _conv(scope: str, kernel: int, in_filters: int, out_filters: int, bias: bool) -> Iterator[Variable]:
    yield Variable(f"{scope}/kernel", (kernel, kernel, in_filters, out_filters))
    if bias:
        yield Variable(f"{scope}/bias", (out_filters,))


def _separable(scope: str, in_filters: int, out_filters: int, bias: bool = True) -> Iterator[Variable]:
    yield Variable(f"{scope}/depthwise_kernel", (3, 3, in_filters, 1))
    yield Variable(f"{scope}/pointwise_kernel", (1, 1, in_filters, out_filters))
    if bias:
        yield Variable(f"{scope}/bias", (out_filters,))


def _backbone(config: EfficientDetConfig) -> Iterator[Variable]:
    scope, backbone = config.backbone.name, config.backbone
    yield from _conv(f"{scope}/stem/conv2d", 3, 3, backbone.stem_filters, bias=False)
    yield from _bn(f"{scope}/stem/tpu_batch_normalization", backbone.stem_filters)
    for index, block in enumerate(backbone.blocks):
        yield from _block(f"{scope}/blocks_{index}", block)


def _block(scope: str, block: Block) -> Iterator[Variable]:
    inner = block.expanded_filters
    convs = iter(("conv2d", "conv2d_1"))
    bns = iter(f"tpu_batch_normalization{suffix}" for suffix in ("", "_1", "_2"))
    if block.expand_ratio != 1:
        yield from _conv(f"{scope}/{next(convs)}", 1, block.in_filters, inner, bias=False)
        yield from _bn(f"{scope}/{next(bns)}", inner)
    shape = (block.kernel_size, block.kernel_size, inner, 1)
    yield Variable(f"{scope}/depthwise_conv2d/depthwise_kernel", shape)
    yield from _bn(f"{scope}/{next(bns)}", inner)
    if block.se_filters:
        yield from _conv(f"{scope}/se/conv2d", 1, inner, block.se_filters, bias=True)
        yield from _conv(f"{scope}/se/conv2d_1", 1, block.se_filters, inner, bias=True)
    yield from _conv(f"{scope}/{next(convs)}", 1, inner, block.out_filters, bias=False)
    yield from _bn(f"{scope}/{next(bns)}", block.out_filters)


def _resample(scope: str, in_filters: int, out_filters: int) -> Iterator[Variable]:
    if in_filters != out_filters:
        yield from _conv(f"{scope}/conv2d", 1, in_filters, out_filters, bias=True)
        yield from _bn(f"{scope}/bn", out_filters)


def _cell(config: EfficientDetConfig, cell: int) -> Iterator[Variable]:
    filters = config.fpn_num_filters
    for index, node in enumerate(config.bifpn_nodes):
        scope = f"fpn_cells/cell_{cell}/fnode{index}"
        for i, source in enumerate(node.inputs):
            in_filters = config.node_input_filters(cell, source)
            yield from _resample(f"{scope}/resample_{i}_{source}_{node.id}", in_filters, filters)
        if config.fpn_weight_method != "sum":
            shape = (filters,) if config.fpn_weight_method.startswith("channel_") else ()
            for i in range(len(node.inputs)):
                yield Variable(f"{scope}/WSM" + (f"_{i}" if i else ""), shape)
        after = f"{scope}/op_after_combine{node.id}"
        yield from _separable(f"{after}/conv", filters, filters, bias=not config.conv_bn_act_pattern)
        yield from _bn(f"{after}/bn", filters)


def _head(config: EfficientDetConfig, kind: str, outputs: int) -> Iterator[Variable]:
    filters, scope = config.fpn_num_filters, f"{kind}_net/{kind}"
    for i in range(config.box_class_repeats):
        yield from _separable(f"{scope}-{i}", filters, filters)
        for level in config.levels:
            yield from _bn(f"{scope}-{i}-bn-{level}", filters)
    yield from _separable(f"{scope}-predict", filters, outputs)
