"""Small random configurations: every part of the network, few weights."""

from __future__ import annotations

from hypothesis import strategies as st

from pytorch_model.config import (
    ENDPOINT_LEVELS,
    WEIGHT_METHODS,
    BackboneConfig,
    EfficientDetConfig,
    Stage,
)

_KERNELS, _STRIDES = (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1)
_WIDTHS = st.sampled_from([4, 6, 8])


# Neighbouring stages differ in width, as in every EfficientNet. Only that separates them.
@st.composite
def backbones(draw: st.DrawFn) -> BackboneConfig:
    lite = draw(st.booleans())
    expand = draw(st.sampled_from([2, 6]))
    stages = tuple(
        Stage(draw(st.integers(1, 2)), kernel, stride, 1 if i == 0 else expand, draw(_WIDTHS) + 10 * (i % 2))
        for i, (kernel, stride) in enumerate(zip(_KERNELS, _STRIDES, strict=True))
    )
    name = "efficientnet-lite0" if lite else "efficientnet-b0"
    backbone = BackboneConfig(name, draw(_WIDTHS), stages, se_ratio=0.0 if lite else 0.25)
    if not draw(st.booleans()):
        return backbone
    levels = backbone.block_levels
    choices = ([i for i, level in enumerate(levels) if level == wanted] for wanted in ENDPOINT_LEVELS)
    third, fourth, fifth = (draw(st.sampled_from(blocks)) for blocks in choices)
    # Both stages of the last level stay, because a backbone must have seven stages.
    return backbone.ending_at((third, fourth, max(fifth, len(levels) - stages[-1].repeats)))


@st.composite
def configs(draw: st.DrawFn) -> EfficientDetConfig:
    """Any configuration that the port should handle.

    The fusion width may equal a backbone width; then there is no resampling convolution.
    """
    min_level = draw(st.integers(2, 4))
    return EfficientDetConfig(
        name="tiny",
        backbone=draw(backbones()),
        image_size=(draw(st.integers(130, 200)), draw(st.integers(130, 200))),
        fpn_num_filters=draw(st.sampled_from([4, 8, 14, 16])),
        fpn_cell_repeats=draw(st.integers(1, 2)),
        box_class_repeats=draw(st.integers(1, 2)),
        num_classes=draw(st.integers(1, 4)),
        min_level=min_level,
        max_level=draw(st.integers(min_level + 1, 7)),
        num_scales=draw(st.integers(1, 3)),
        aspect_ratios=draw(st.sampled_from([(1.0,), (1.0, 2.0, 0.5)])),
        fpn_weight_method=draw(st.sampled_from(WEIGHT_METHODS)),
        act_type=draw(st.sampled_from(["swish", "relu", "relu6", "hswish", "mish"])),
        conv_after_downsample=draw(st.booleans()),
        conv_bn_act_pattern=draw(st.booleans()),
        survival_prob=draw(st.sampled_from([None, 0.8])),
    )
