"""The part of a configuration that the names and shapes of variables show."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from porting.errors import ConversionError
from porting.scopes import QUFPN, SEGMENTATION_SCOPES, is_qufpn, model_name
from pytorch_model.config import ENDPOINT_LEVELS, BackboneConfig, Stage

Shapes = Mapping[str, tuple[int, ...]]

#: One for each stage. Strides leave no trace in the weights, but they are the same in every EfficientNet.
STAGE_STRIDES = (1, 2, 2, 2, 1, 2, 1)


def model_variables(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The model variables; a moving average or optimizer slot counts as the variable it belongs to."""
    named = ((model_name(entry), shape) for entry, shape in shapes.items())
    return {
        name: shape for name, shape in named if name is not None and not name.startswith(SEGMENTATION_SCOPES)
    }


@dataclass
class Structure:
    """Reads from the variables the fields that determine their shapes."""

    shapes: Shapes
    fields: dict[str, Any] = field(default_factory=dict)

    def read(self) -> dict[str, Any]:
        self.reject_unsupported_models()
        fpn = self.shape(r"fpn_cells/cell_0/fnode0/op_after_combine\d+/conv/pointwise_kernel", 4)
        backbone = self._backbone()
        nodes = 1 + max(self.numbers(r"fpn_cells/cell_0/fnode(\d+)/"))
        bn_levels = self.numbers(r"box_net/box-0-bn-(\d+)/")
        min_level = min(bn_levels) if bn_levels else self._lowest_level(backbone)
        anchors = self.shape(r"box_net/box-predict/bias", 1)[0] // 4
        classes = self.shape(r"class_net/class-predict/bias", 1)[0]
        if not anchors or classes % anchors:
            raise ConversionError(
                f"class_net predicts {classes} values per location for {anchors} anchors, which is not a "
                "whole number of classes; this checkpoint mixes two models"
            )
        first_after = r"fpn_cells/cell_0/fnode0/op_after_combine\d+/conv/bias"
        return {
            "backbone": backbone,
            "fpn_num_filters": fpn[-1],
            "fpn_cell_repeats": 1 + max(self.numbers(r"fpn_cells/cell_(\d+)/")),
            "box_class_repeats": 1 + max(self.numbers(r"box_net/box-(\d+)/"), default=-1),
            "min_level": min_level,
            "max_level": max(bn_levels, default=min_level + nodes // 2),
            "num_classes": classes // anchors,
            "num_anchors": anchors,
            "fpn_weight_method": self._weight_method(),
            "conv_bn_act_pattern": not self.matches(first_after),
        }

    def matches(self, pattern: str) -> list[str]:
        regex = re.compile(pattern)
        return [name for name in self.shapes if regex.match(name)]

    def numbers(self, pattern: str) -> set[int]:
        regex = re.compile(pattern)
        return {int(m.group(1)) for name in self.shapes if (m := regex.match(name))}

    def shape(self, pattern: str, rank: int) -> tuple[int, ...]:
        """The shape of the first variable that matches.

        Raises :class:`ConversionError` if none does, or if it does not have ``rank`` dimensions.
        """
        names = self.matches(pattern)
        if not names:
            if all(self.matches(scope) for scope in ("efficientnet-", "fpn_cells/", "(class|box)_net/")):
                raise ConversionError(
                    f"this EfficientDet is incomplete: no variable name matches {_readable(pattern)}; save "
                    "all variables, or fetch the file again"
                )
            looks = ", ".join(sorted(self.shapes)[:3]) or "nothing"
            raise ConversionError(
                f"this is not an AutoML EfficientDet: no variable name matches {_readable(pattern)}; "
                f"the file holds {len(self.shapes)} variables such as {looks}"
            )
        shape = tuple(self.shapes[names[0]])
        if len(shape) != rank or 0 in shape:
            raise ConversionError(
                f"{names[0]} has shape {list(shape)}, but must have {rank} dimensions, none of them 0; "
                "the file is not an EfficientDet, or it is damaged"
            )
        return shape

    def reject_unsupported_models(self) -> None:
        backbones = sorted({name.split("/")[0] for name in self.matches(r"efficientnet-[^/]+/")})
        if len(backbones) > 1:
            raise ConversionError(
                f"the checkpoint holds two models, {' and '.join(backbones)}; save only one of them"
            )
        twice = self.matches(r"efficientnet-[^/]+/(stem|blocks_\d+)_1/") or self.matches(
            r"(fpn_cells|class_net|box_net|resample_p6)_1/"
        )
        if twice:
            raise ConversionError(
                f"two models were built in one graph: {twice[0]} belongs to the second; build and save one "
                "model per process"
            )
        levels = len(self.numbers(r"box_net/box-0-bn-(\d+)/"))
        if is_qufpn(len(self.numbers(r"fpn_cells/cell_0/fnode(\d+)/")), levels):
            raise ConversionError(f"this model {QUFPN}")
        if self.matches(r".*resample[^/]*/conv2d/kernel") and not self.matches(r".*resample[^/]*/bn/gamma"):
            raise ConversionError(
                "this model was trained with apply_bn_for_resampling=False, which this project does not build"
            )
        if self.matches(r"fpn_cells/cell_0/fnode0/op_after_combine\d+/conv/kernel"):
            raise ConversionError(
                "this model was trained with separable_conv=False, which this project does not build; only "
                "separable convolutions are supported"
            )

    def _lowest_level(self, backbone: BackboneConfig) -> int:
        """The level of the first cell's first input, found by its width; 3 if the width is not known.

        The width is not known if that input has no resampling convolution.
        """
        kernels = self.matches(r"fpn_cells/cell_0/fnode\d+/resample_\d+_0_\d+/conv2d/kernel")
        widths = {self.shapes[name][2] for name in kernels if len(self.shapes[name]) == 4}
        levels = (*ENDPOINT_LEVELS, 2, 1)
        return next((level for level in levels if backbone.filters_at(level) in widths), 3)

    def _weight_method(self) -> str:
        wsm = self.matches(r"fpn_cells/cell_0/fnode0/WSM$")
        if not wsm:
            return "sum"
        return "channel_fastattn" if self.shapes[wsm[0]] else "fastattn"

    def _backbone(self) -> BackboneConfig:
        stem = self.shape(r"efficientnet-[^/]+/stem/conv2d/kernel", 4)
        scope = self.matches(r"efficientnet-[^/]+/stem/conv2d/kernel")[0].split("/")[0]
        blocks: list[tuple[int, int, int, int]] = []  # kernel, expand ratio, out, se
        filters = stem[-1]
        for i in range(1 + max(self.numbers(rf"{re.escape(scope)}/blocks_(\d+)/"), default=-1)):
            block = self._block(f"{scope}/blocks_{i}", filters)
            blocks.append(block)
            filters = block[2]
        stages = _group_stages(blocks)
        config = BackboneConfig(scope, stem[-1], stages, se_ratio=0.25 if blocks[0][3] else 0.0)
        for i, (built, (_, _, _, se)) in enumerate(zip(config.blocks, blocks, strict=True)):
            if built.se_filters != se:
                raise ConversionError(
                    f"{scope}/blocks_{i}/se has {se} squeeze filters, an EfficientNet has "
                    f"{built.se_filters}; other squeeze-and-excitation ratios are not supported"
                )
        return config

    def _block(self, scope: str, filters: int) -> tuple[int, int, int, int]:
        where = re.escape(scope)
        depthwise = self.shape(rf"{where}/depthwise_conv2d/depthwise_kernel", 4)
        expands = f"{scope}/conv2d_1/kernel" in self.shapes
        project = self.shape(rf"{where}/conv2d_1/kernel" if expands else rf"{where}/conv2d/kernel", 4)
        has_se = f"{scope}/se/conv2d/bias" in self.shapes
        se = self.shape(rf"{where}/se/conv2d/bias", 1)[0] if has_se else 0
        if depthwise[2] % filters:
            raise ConversionError(
                f"{scope}/depthwise_conv2d/depthwise_kernel has shape {list(depthwise)}, whose channels are "
                f"not a multiple of the block's {filters} input channels; the backbone is not an EfficientNet"
            )
        return depthwise[0], depthwise[2] // filters, project[-1], se


def _readable(pattern: str) -> str:
    return pattern.replace(r"\d+", "N").replace("[^/]+", "…").replace("\\", "")


def _group_stages(blocks: list[tuple[int, int, int, int]]) -> tuple[Stage, ...]:
    """Consecutive blocks with the same kernel size, expansion and width form a stage.

    ``blocks``: (kernel size, expand ratio, output filters, squeeze filters). Raises :class:`ConversionError`
    if there are not seven stages.
    """
    runs: list[tuple[tuple[int, int, int], int]] = []
    for kernel, expand, out, _ in blocks:
        key = (kernel, expand, out)
        if runs and runs[-1][0] == key:
            runs[-1] = (key, runs[-1][1] + 1)
        else:
            runs.append((key, 1))
    if len(runs) != len(STAGE_STRIDES):
        raise ConversionError(
            f"the backbone has {len(runs)} stages, EfficientNet has {len(STAGE_STRIDES)}, so its strides "
            "cannot be inferred from the weights; this backbone_config is not supported"
        )
    return tuple(
        Stage(repeats, kernel, stride, expand, out)
        for ((kernel, expand, out), repeats), stride in zip(runs, STAGE_STRIDES, strict=True)
    )
