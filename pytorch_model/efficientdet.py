"""The whole network, reading like figure 3 of the paper: backbone → P6 and up → BiFPN → two heads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pytorch_model.bifpn import BiFPN, Resample
from pytorch_model.config import MAX_BACKBONE_LEVEL, EfficientDetConfig, model_config
from pytorch_model.efficientnet import EfficientNet
from pytorch_model.heads import box_net, class_net


class EfficientDet(nn.Module):
    """Bias-free EfficientDet: no convolution that feeds a batch norm has a bias.

    ``model(images)``: images float [N, 3, H, W], normalised → ``(class_outputs, box_outputs)``, two lists
    with one tensor per level min_level…max_level: logits [N, anchors · num_classes, H_l, W_l] and
    regressions [N, anchors · 4, H_l, W_l]. H and W are free; ``config.image_size`` is only the default.
    """

    def __init__(self, config: EfficientDetConfig) -> None:
        super().__init__()
        self.config = config
        backbone_levels = range(config.min_level, min(config.max_level, MAX_BACKBONE_LEVEL) + 1)
        self.backbone = EfficientNet(config.backbone, config.act_type, backbone_levels)
        filters = config.backbone.filters_at(backbone_levels[-1])
        self.resample = nn.ModuleDict()
        for level in config.extra_levels:
            self.resample[f"p{level}"] = Resample(
                filters, config.fpn_num_filters, config.conv_after_downsample
            )
            filters = config.fpn_num_filters
        self.bifpn = BiFPN(config)
        self.class_net = class_net(config)
        self.box_net = box_net(config)

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        features = self.backbone(images)
        for resample in self.resample.values():
            height, width = features[-1].shape[-2:]
            features.append(resample(features[-1], ((height - 1) // 2 + 1, (width - 1) // 2 + 1)))
        features = self.bifpn(features)
        return self.class_net(features), self.box_net(features)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        config: EfficientDetConfig,
        source: str = "the state dict",
        num_classes: int | None = None,
    ) -> EfficientDet:
        """``EfficientDet(config)`` with these very tensors (they are not copied), in evaluation mode.

        ``source`` names them in errors. If ``num_classes`` differs from ``config``'s, the class predictor is
        re-initialised and everything else kept. Raises :class:`WeightsError` unless every key, shape and type
        fits.
        """
        from pytorch_model.weights.files import build

        return build(state_dict, config, source, num_classes)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], num_classes: int | None = None) -> EfficientDet:
        """:func:`pytorch_model.weights.files.load_model`: the model in a weight file or folder.

        ``num_classes`` asks for a class predictor begun anew. Raises :class:`WeightsError`.
        """
        from pytorch_model.weights.files import load_model

        return load_model(path, num_classes)

    def save_pretrained(
        self, folder: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
    ) -> None:
        """:func:`pytorch_model.weights.files.save_pretrained`: ``model.safetensors`` and ``config.json``."""
        from pytorch_model.weights.files import save_pretrained

        save_pretrained(self, folder, metadata)


def create_model(name: str, **overrides: Any) -> EfficientDet:
    """A freshly initialised variant: ``create_model("efficientdet_d0", num_classes=20)``.

    ``overrides`` are fields of :class:`EfficientDetConfig`. Raises :class:`ConfigError` on a bad one.
    """
    return EfficientDet(model_config(name, **overrides))
