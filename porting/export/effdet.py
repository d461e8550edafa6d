"""Weights for the ``effdet`` package: a state dict that its ``tf_efficientdet_*`` models load, ``strict``.

The package keeps the convolution biases that a batch norm makes redundant. They are written as zeros, so the
function stays the same. Its anchors differ, and a weight file cannot change that: it rounds their aspect
ratios to 1.4 and 0.7 unless its configuration says otherwise.

Source of the names: effdet 0.4.1 and timm 1.0, by their state dicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from porting.errors import CheckFailedError, ConversionError, OutputError
from porting.export import Weights, Written
from pytorch_model.config import MODELS, BackboneConfig, EfficientDetConfig, model_config
from pytorch_model.files import check_writable, replacing
from pytorch_model.weights.files import torch_bytes

#: Fields that may differ from a released model. They change only head widths, which the package takes as
#: arguments, or nothing in the network.
_FREE = (
    "num_classes",
    "num_scales",
    "aspect_ratios",
    "anchor_scale",
    "image_size",
    "mean_rgb",
    "stddev_rgb",
    "resizer",
    "anchor_stride",
)
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def write(weights: Weights, out: Path) -> Written:
    """Write the state dict to ``out`` (``.pth``). Raises ConversionError for a model that effdet lacks."""
    if out.suffix != ".pth":
        raise OutputError(f"cannot write {out}: use a name that ends in .pth")
    check_writable(out)
    recipe = effdet_recipe(weights.config, out)
    state_dict = effdet_state_dict(weights)
    with replacing(out) as temporary:
        temporary.write_bytes(torch_bytes(state_dict))
        again = torch.load(temporary, weights_only=True)
        for key, tensor in state_dict.items():
            if key not in again or not torch.equal(again[key], tensor.cpu()):
                raise CheckFailedError(
                    f"{key} differs after writing and reading back; nothing was written, check the disk"
                )
    return Written((out,), (*recipe, "effdet's own anchors have other aspect ratios, rounded to one digit"))


def effdet_recipe(config: EfficientDetConfig, out: Path) -> list[str]:
    """Python statements, one per line, that make effdet's model and load ``out`` into it.

    Raises ConversionError for a model that effdet does not have.
    """
    return [
        f"config = effdet.get_efficientdet_config({effdet_model(config)!r})",
        f"config.num_classes, config.image_size = {config.num_classes}, {config.image_size}",
        f"config.num_scales, config.anchor_scale = {config.num_scales}, {config.anchor_scale}",
        f"config.aspect_ratios = {effdet_aspect_ratios(config)}",
        f"config.mean, config.std = {_of_white(config.mean_rgb)}, {_of_white(config.stddev_rgb)}",
        "model = effdet.EfficientDet(config, pretrained_backbone=False).eval()",
        f"model.load_state_dict(torch.load({str(out)!r}, weights_only=True))  # strict",
    ]


def _of_white(levels: tuple[float, ...]) -> tuple[float, ...]:
    """Grey levels from 0 to 255 on effdet's scale from 0 to 1."""
    return tuple(round(level / 255, 8) for level in levels)


def effdet_aspect_ratios(config: EfficientDetConfig) -> list[tuple[float, float]]:
    """AutoML's ratios as the pairs (width factor, height factor) that effdet's configuration holds."""
    return [(round(width, 8), round(height, 8)) for width, height in config.aspect_factors]


def effdet_model(config: EfficientDetConfig) -> str:
    """The name of effdet's model of this network. Raises ConversionError if there is none."""
    for name in (config.name,) if config.name in MODELS else MODELS:
        free = {field: getattr(config, field) for field in _FREE}
        if model_config(name, **free).replace(name=config.name) == config:
            return f"tf_{name.replace('-', '_')}"
    raise ConversionError(
        f"effdet has no model with this network ({config.name}, {config.backbone.name}, BiFPN "
        f"{config.fpn_cell_repeats}×{config.fpn_num_filters} {config.fpn_weight_method}, P{config.min_level}–"
        f"P{config.max_level}); it has the released ones, with any number of classes and anchors; "
        "export to onnx instead"
    )


def effdet_state_dict(weights: Weights) -> dict[str, Tensor]:
    """Every tensor of ours under effdet's name, and zeros for effdet's redundant biases.

    Raises ConversionError if one of our tensors has no name in effdet.
    """
    ours = weights.tensors
    theirs = {}
    for module, name, redundant_bias in effdet_layers(weights.config):
        if redundant_bias and f"{module}.weight" in ours:
            theirs[f"{name}.bias"] = torch.zeros_like(ours[f"{module}.weight"][:, 0, 0, 0])
        for leaf in _LEAVES:
            if f"{module}.{leaf}" in ours:
                theirs[f"{name}.{leaf}"] = ours.pop(f"{module}.{leaf}")
    for cell in range(weights.config.fpn_cell_repeats):
        for index in range(len(weights.config.bifpn_nodes)):
            fusion = ours.pop(f"bifpn.cells.{cell}.nodes.{index}.fuse.weights", None)
            if fusion is not None:
                theirs[f"fpn.cell.{cell}.fnode.{index}.combine.edge_weights"] = fusion
    if ours:
        raise ConversionError(f"{min(ours)} has no name in effdet; nothing was written")
    return theirs


def effdet_layers(config: EfficientDetConfig) -> Iterator[tuple[str, str, bool]]:
    """For every layer with parameters: (our module, effdet's, whether effdet has a redundant bias there)."""
    yield from _backbone(config.backbone)
    for level in config.extra_levels:
        yield from _resample(f"resample.p{level}", f"fpn.resample.{level - config.min_level}")
    for cell in range(config.fpn_cell_repeats):
        for index, node in enumerate(config.bifpn_nodes):
            ours, theirs = f"bifpn.cells.{cell}.nodes.{index}", f"fpn.cell.{cell}.fnode.{index}"
            for i, source in enumerate(node.inputs):
                yield from _resample(f"{ours}.resample.{i}", f"{theirs}.combine.resample.{source}")
            yield from _separable(f"{ours}.conv", f"{theirs}.after_combine.conv", redundant_bias=True)
            yield f"{ours}.bn", f"{theirs}.after_combine.conv.bn", False
    for head in ("class_net", "box_net"):
        for repeat in range(config.box_class_repeats):
            yield from _separable(f"{head}.convs.{repeat}", f"{head}.conv_rep.{repeat}", redundant_bias=True)
            for level in range(len(config.levels)):
                yield f"{head}.bns.{repeat}.{level}", f"{head}.bn_rep.{repeat}.{level}.bn", False
        yield from _separable(f"{head}.predict", f"{head}.predict", redundant_bias=False)


def _backbone(config: BackboneConfig) -> Iterator[tuple[str, str, bool]]:
    yield "backbone.stem.conv", "backbone.conv_stem", False
    yield "backbone.stem.bn", "backbone.bn1", False
    index = 0
    for number, stage in enumerate(config.stages):
        for repeat in range(stage.repeats):
            ours, theirs = f"backbone.blocks.{index}", f"backbone.blocks.{number}.{repeat}"
            expands = stage.expand_ratio > 1
            convs = ("conv_pw", "conv_dw", "conv_pwl") if expands else ("conv_dw", "conv_pw")
            parts = ("expand", "depthwise", "project") if expands else ("depthwise", "project")
            for n, (part, conv) in enumerate(zip(parts, convs, strict=True), start=1):
                yield f"{ours}.{part}.conv", f"{theirs}.{conv}", False
                yield f"{ours}.{part}.bn", f"{theirs}.bn{n}", False
            if config.se_ratio:
                yield f"{ours}.se.reduce", f"{theirs}.se.conv_reduce", False
                yield f"{ours}.se.expand", f"{theirs}.se.conv_expand", False
            index += 1


def _resample(ours: str, theirs: str) -> Iterator[tuple[str, str, bool]]:
    yield f"{ours}.conv", f"{theirs}.conv.conv", True
    yield f"{ours}.bn", f"{theirs}.conv.bn", False


def _separable(ours: str, theirs: str, redundant_bias: bool) -> Iterator[tuple[str, str, bool]]:
    yield f"{ours}.depthwise", f"{theirs}.conv_dw", False
    yield f"{ours}.pointwise", f"{theirs}.conv_pw", redundant_bias
