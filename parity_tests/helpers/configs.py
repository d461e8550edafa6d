"""Small random configurations: every part of the network, few weights; and AutoML's own defaults."""

from __future__ import annotations

from typing import Any

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


#: The config.yaml that AutoML's training of a D1 on COCO writes: every hyper-parameter, at its default.
AUTOML_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(
        [
            *("autoaugment_policy", "backbone_config", "ckpt_var_scope", "dataset_type", "fpn_config"),
            *("fpn_name", "fpn_weight_method", "img_summary_steps", "iou_loss_type", "label_map"),
            *("loss_scale", "positives_momentum", "sample_image", "strategy", "survival_prob"),
            *("target_size", "var_freeze_expr"),
        ]
    ),
    **dict.fromkeys(
        [
            *("conv_after_downsample", "conv_bn_act_pattern", "grad_checkpoint", "grid_mask"),
            *("mixed_precision", "regenerate_source_id", "scale_range"),
        ],
        False,
    ),
    **dict.fromkeys(
        [
            *("apply_bn_for_resampling", "drop_remainder", "input_rand_hflip", "is_training_bn"),
            *("separable_conv", "skip_crowd_during_training", "skip_mismatch", "use_keras_model"),
        ],
        True,
    ),
    "act_type": "swish",
    "alpha": 0.25,
    "anchor_scale": 4.0,
    "aspect_ratios": [1.0, 2.0, 0.5],
    "backbone_name": "efficientnet-b1",
    "box_class_repeats": 3,
    "box_loss_weight": 50.0,
    "clip_gradients_norm": 10.0,
    "data_format": "channels_last",
    "delta": 0.1,
    "first_lr_drop_epoch": 200.0,
    "fpn_cell_repeats": 4,
    "fpn_num_filters": 88,
    "gamma": 1.5,
    "heads": ["object_detection"],
    "image_size": (640, 640),
    "iou_loss_weight": 1.0,
    "jitter_max": 2.0,
    "jitter_min": 0.1,
    "label_smoothing": 0.0,
    "learning_rate": 0.08,
    "lr_decay_method": "cosine",
    "lr_warmup_epoch": 1.0,
    "lr_warmup_init": 0.008,
    "map_freq": 5,
    "max_instances_per_image": 100,
    "max_level": 7,
    "mean_rgb": [123.675, 116.28, 103.53],
    "min_level": 3,
    "model_optimizations": {},
    "momentum": 0.9,
    "moving_average_decay": 0.9998,
    "name": "efficientdet-d1",
    "nms_configs": {
        "iou_thresh": None,
        "max_nms_inputs": 0,
        "max_output_size": 100,
        "method": "gaussian",
        "pyfunc": False,
        "score_thresh": 0.0,
        "sigma": None,
    },
    "num_classes": 90,
    "num_epochs": 300,
    "num_scales": 3,
    "optimizer": "sgd",
    "poly_lr_power": 0.9,
    "save_freq": "epoch",
    "second_lr_drop_epoch": 250.0,
    "seg_num_classes": 3,
    "stddev_rgb": [0.229 * 255, 0.224 * 255, 0.225 * 255],
    "tflite_max_detections": 100,
    "verbose": 1,
    "weight_decay": 4e-5,
}
