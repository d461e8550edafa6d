"""The port, declared once.

Each rule says: this PyTorch tensor is made from these AutoML variables, by this transform. Conversion, the
account of both sides and the diagnosis of a faulty layer all read this table and nothing else. Below the
table, the same walk lists the activations that both networks have in common. A variant of EfficientDet
changes the configuration, never the rules.

The scopes are AutoML's. Two conventions of AutoML matter here. A block numbers its convolutions and batch
norms in the order in which it builds them (``conv2d``, ``conv2d_1``; ``tpu_batch_normalization``, ``_1``,
``_2``), so the meaning of a number depends on whether the block expands. And the scope of a BiFPN node
contains node ids (``resample_{input}_{its node id}_{own id}``, ``op_after_combine{own id}``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from porting.transforms import (
    CONV_KERNEL,
    DEPTHWISE_KERNEL,
    FOLD_BIAS_INTO_MEAN,
    IDENTITY,
    STACK,
    ZERO_COUNTER,
    Transform,
)
from pytorch_model.config import Block, EfficientDetConfig


class Rule(NamedTuple):
    """``target`` (a state-dict key) = ``transform(*sources)`` (AutoML variable names, in order)."""

    target: str
    sources: tuple[str, ...]
    transform: Transform


class TapPair(NamedTuple):
    """The same activation on both sides: a PyTorch module's output and a reference tap.

    ``output`` picks one tensor if the module returns a list (a head returns one per level).
    """

    module: str
    tap: str
    output: int | None = None


def rules(config: EfficientDetConfig) -> Iterator[Rule]:
    """The whole port of one configuration, in execution order."""
    yield from _backbone(config)
    yield from _extra_levels(config)
    yield from _bifpn(config)
    yield from _head(config, "class")
    yield from _head(config, "box")


# --- building blocks ----------------------------------------------------------------------------------


def _bn(target: str, scope: str, bias: str | None = None) -> Iterator[Rule]:
    """A batch norm, and the bias of the convolution before it if AutoML has one."""
    yield Rule(f"{target}.weight", (f"{scope}/gamma",), IDENTITY)
    yield Rule(f"{target}.bias", (f"{scope}/beta",), IDENTITY)
    if bias:
        yield Rule(f"{target}.running_mean", (f"{scope}/moving_mean", bias), FOLD_BIAS_INTO_MEAN)
    else:
        yield Rule(f"{target}.running_mean", (f"{scope}/moving_mean",), IDENTITY)
    yield Rule(f"{target}.running_var", (f"{scope}/moving_variance",), IDENTITY)
    yield Rule(f"{target}.num_batches_tracked", (), ZERO_COUNTER)


def _conv(target: str, scope: str) -> Iterator[Rule]:
    yield Rule(f"{target}.weight", (f"{scope}/kernel",), CONV_KERNEL)


def _depthwise(target: str, scope: str) -> Iterator[Rule]:
    yield Rule(f"{target}.weight", (f"{scope}/depthwise_kernel",), DEPTHWISE_KERNEL)


def _bias(target: str, scope: str) -> Iterator[Rule]:
    yield Rule(f"{target}.bias", (f"{scope}/bias",), IDENTITY)


def _separable(target: str, scope: str) -> Iterator[Rule]:
    yield from _depthwise(f"{target}.depthwise", scope)
    yield Rule(f"{target}.pointwise.weight", (f"{scope}/pointwise_kernel",), CONV_KERNEL)


# --- backbone -----------------------------------------------------------------------------------------


def _backbone(config: EfficientDetConfig) -> Iterator[Rule]:
    scope = config.backbone.name
    yield from _conv("backbone.stem.conv", f"{scope}/stem/conv2d")
    yield from _bn("backbone.stem.bn", f"{scope}/stem/tpu_batch_normalization")
    for i, block in enumerate(config.backbone.blocks):
        yield from _block(f"backbone.blocks.{i}", f"{scope}/blocks_{i}", block)


def _block(target: str, scope: str, block: Block) -> Iterator[Rule]:
    project, bn = "conv2d", f"{scope}/tpu_batch_normalization"
    expand_bn, depthwise_bn, project_bn = "", bn, f"{bn}_1"
    if block.expand_ratio != 1:
        project = "conv2d_1"
        expand_bn, depthwise_bn, project_bn = bn, f"{bn}_1", f"{bn}_2"
        yield from _conv(f"{target}.expand.conv", f"{scope}/conv2d")
        yield from _bn(f"{target}.expand.bn", expand_bn)
    yield from _depthwise(f"{target}.depthwise.conv", f"{scope}/depthwise_conv2d")
    yield from _bn(f"{target}.depthwise.bn", depthwise_bn)
    if block.se_filters:
        for part, conv in (("reduce", "conv2d"), ("expand", "conv2d_1")):
            yield from _conv(f"{target}.se.{part}", f"{scope}/se/{conv}")
            yield from _bias(f"{target}.se.{part}", f"{scope}/se/{conv}")
    yield from _conv(f"{target}.project.conv", f"{scope}/{project}")
    yield from _bn(f"{target}.project.bn", project_bn)


# --- P6 and up, BiFPN ---------------------------------------------------------------------------------


def _resample(target: str, scope: str) -> Iterator[Rule]:
    yield from _conv(f"{target}.conv", f"{scope}/conv2d")
    yield from _bn(f"{target}.bn", f"{scope}/bn", bias=f"{scope}/conv2d/bias")


def _extra_levels(config: EfficientDetConfig) -> Iterator[Rule]:
    # Only the first level above the backbone can change the width. The others pool and have no variables.
    for level in config.extra_levels[:1]:
        if config.backbone.filters_at(level - 1) != config.fpn_num_filters:
            yield from _resample(f"resample.p{level}", f"resample_p{level}")


def _bifpn(config: EfficientDetConfig) -> Iterator[Rule]:
    for c in range(config.fpn_cell_repeats):
        for n, node in enumerate(config.bifpn_nodes):
            target, scope = f"bifpn.cells.{c}.nodes.{n}", f"fpn_cells/cell_{c}/fnode{n}"
            for i, source in enumerate(node.inputs):
                if config.node_input_filters(c, source) != config.fpn_num_filters:
                    yield from _resample(f"{target}.resample.{i}", f"{scope}/resample_{i}_{source}_{node.id}")
            if config.fpn_weight_method != "sum":
                wsm = tuple(f"{scope}/WSM" + (f"_{i}" if i else "") for i in range(len(node.inputs)))
                yield Rule(f"{target}.fuse.weights", wsm, STACK)
            conv, bn = f"{scope}/op_after_combine{node.id}/conv", f"{scope}/op_after_combine{node.id}/bn"
            yield from _separable(f"{target}.conv", conv)
            yield from _bn(f"{target}.bn", bn, bias=None if config.conv_bn_act_pattern else f"{conv}/bias")


# --- heads --------------------------------------------------------------------------------------------


def _head(config: EfficientDetConfig, kind: str) -> Iterator[Rule]:
    """``kind`` is ``class`` or ``box``. One convolution serves all levels; each mean gets its bias."""
    target, scope = f"{kind}_net", f"{kind}_net/{kind}"
    for i in range(config.box_class_repeats):
        yield from _separable(f"{target}.convs.{i}", f"{scope}-{i}")
        for index, level in enumerate(config.levels):
            yield from _bn(f"{target}.bns.{i}.{index}", f"{scope}-{i}-bn-{level}", bias=f"{scope}-{i}/bias")
    yield from _separable(f"{target}.predict", f"{scope}-predict")
    yield from _bias(f"{target}.predict.pointwise", f"{scope}-predict")


# --- taps: where both networks have the same activation ----------------------------------------------


def taps(config: EfficientDetConfig) -> Iterator[TapPair]:
    """Every compared activation, in execution order."""
    scope = config.backbone.name
    yield TapPair("backbone.stem", f"{scope}/stem")
    for i, block in enumerate(config.backbone.blocks):
        yield from _block_taps(f"backbone.blocks.{i}", f"{scope}/blocks_{i}", block)
    for level in config.extra_levels:
        yield TapPair(f"resample.p{level}", f"resample_p{level}")
    for c in range(config.fpn_cell_repeats):
        for n, node in enumerate(config.bifpn_nodes):
            target, scope = f"bifpn.cells.{c}.nodes.{n}", f"fpn_cells/cell_{c}/fnode{n}"
            for i, source in enumerate(node.inputs):
                yield TapPair(f"{target}.resample.{i}", f"{scope}/resample_{i}_{source}_{node.id}")
            yield TapPair(f"{target}.fuse", f"{scope}/fuse")
            yield TapPair(target, scope)
    for kind in ("class", "box"):
        for index, level in enumerate(config.levels):
            for i in range(config.box_class_repeats):
                yield TapPair(f"{kind}_net.bns.{i}.{index}", f"{kind}_net/{kind}-{i}-bn-{level}")
            yield TapPair(f"{kind}_net", f"{kind}_outputs/{level}", output=index)


def _block_taps(target: str, scope: str, block: Block) -> Iterator[TapPair]:
    bn = f"{scope}/tpu_batch_normalization"
    numbers = iter((bn, f"{bn}_1", f"{bn}_2"))
    if block.expand_ratio != 1:
        yield TapPair(f"{target}.expand", next(numbers))
    yield TapPair(f"{target}.depthwise", next(numbers))
    if block.se_filters:
        yield TapPair(f"{target}.se", f"{scope}/se")
    yield TapPair(f"{target}.project", next(numbers))
    yield TapPair(target, scope)
