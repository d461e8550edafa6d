"""The whole network, as in figure 3 of the paper: backbone → P6 and up → BiFPN → two heads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytorch_model.bifpn import BiFPN, Resample
from pytorch_model.config import MAX_BACKBONE_LEVEL, EfficientDetConfig, model_config
from pytorch_model.efficientnet import EfficientNet
from pytorch_model.heads import box_net, class_net
from pytorch_model.weights.checks import check_weights
from pytorch_model.weights.files import read_weights, write_folder

#: The tensors whose shape depends on the number of classes: a change of it re-initialises them.
CLASS_PREDICTOR = ("class_net.predict.pointwise.weight", "class_net.predict.pointwise.bias")


class EfficientDet(nn.Module):
    """Bias-free EfficientDet: no convolution that feeds a batch norm has a bias.

    ``model(images)``: images float [N, 3, H, W], normalised → ``(class_outputs, box_outputs)``, two lists
    with one tensor per level min_level…max_level: logits [N, anchors · num_classes, H_l, W_l] and
    regressions [N, anchors · 4, H_l, W_l]. H and W are free; ``config.image_size`` is only the default.

    ``model(images, model.draw(N, generator))`` is for training: stochastic depth as AutoML has it in the
    backbones b1…b7 and lite0…lite4, and in the heads if ``survival_prob`` is set. It depends on the draws
    alone, so a pass that is repeated, as activation checkpointing does, leaves out the same blocks.
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

    @property
    def draw_counts(self) -> tuple[int, int, int]:
        """How many draws an image needs in the backbone, the class net and the box net."""
        return self.backbone.draw_count, self.class_net.draw_count, self.box_net.draw_count

    def draw(self, images: int, generator: torch.Generator | None = None) -> Tensor:
        """What stochastic depth decides by: float32 [Σ draw_counts, images], uniform in [0, 1).

        They are drawn where ``generator`` is, and returned on the model's device.
        """
        where = generator.device if generator is not None else None
        draws = torch.rand(sum(self.draw_counts), images, generator=generator, device=where)
        return draws.to(next(self.parameters()).device)

    def forward(self, images: Tensor, draws: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """``draws``: [Σ draw_counts, N], for stochastic depth, in either mode; None: there is none."""
        backbone, classes, boxes = (None,) * 3 if draws is None else draws.split_with_sizes(self.draw_counts)
        features = self.backbone(images, backbone)
        for resample in self.resample.values():
            height, width = features[-1].shape[-2:]
            features.append(resample(features[-1], ((height - 1) // 2 + 1, (width - 1) // 2 + 1)))
        features = self.bifpn(features)
        return self.class_net(features, classes), self.box_net(features, boxes)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        config: EfficientDetConfig,
        source: str = "the state dict",
        num_classes: int | None = None,
    ) -> EfficientDet:
        """``EfficientDet(config)`` in evaluation mode that uses these tensors; they are not copied.

        The model has the tensors' dtype. ``source`` names them in errors. If ``num_classes`` differs from
        ``config``'s, the class predictor is re-initialised and everything else kept. Raises
        :class:`WeightsError` unless every key, shape and dtype fits.
        """
        state_dict = dict(state_dict)
        check_weights(state_dict, config, source)
        with torch.device("meta"):
            model = cls(config)
        if num_classes is not None and num_classes != config.num_classes:
            model = cls(config.replace(num_classes=num_classes))
            fresh, dtype = model.state_dict(), state_dict[CLASS_PREDICTOR[0]].dtype
            state_dict.update({key: fresh[key].to(dtype) for key in CLASS_PREDICTOR})
        model.load_state_dict(state_dict, assign=True)
        # assign=True makes parameters of the given tensors, which need no gradient; they must still train.
        return model.requires_grad_(True).eval()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], num_classes: int | None = None) -> EfficientDet:
        """The model in a weight file or folder, see :func:`load_model`."""
        state_dict, config, _ = read_weights(path)
        return cls.from_state_dict(state_dict, config, str(path), num_classes)

    def save_pretrained(
        self, folder: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``; :func:`load_model` reads them.

        The folder is created; files of these names are replaced. ``metadata`` is free text about the origin
        of the weights. Raises :class:`WeightsError` if the disk does not allow it.
        """
        state_dict = {key: tensor.detach().cpu().contiguous() for key, tensor in self.state_dict().items()}
        write_folder(Path(folder), state_dict, self.config, metadata or {})


def create_model(name: str, **overrides: Any) -> EfficientDet:
    """A model variant with initial weights: ``create_model("efficientdet_d0", num_classes=20)``.

    ``overrides`` are fields of :class:`EfficientDetConfig`. Raises :class:`ConfigError` on a bad one.
    """
    return EfficientDet(model_config(name, **overrides))


def load_model(path: str | os.PathLike[str], num_classes: int | None = None) -> EfficientDet:
    """The model in a weight file or folder (:func:`read_weights`), in evaluation mode, on the CPU.

    Its dtype is the file's. If ``num_classes`` differs from the file's, the class predictor
    (:data:`CLASS_PREDICTOR`) is re-initialised and every other tensor kept. Every key and shape is checked
    before the model is built. Raises :class:`WeightsError` if file and model differ.
    """
    return EfficientDet.from_pretrained(path, num_classes)
