"""The model as it is: the definition that all other engines are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines.choose import Network


def make(model: EfficientDet, image_size: tuple[int, int]) -> Network:
    """``model`` in its own precision; it works for every image size."""

    @torch.no_grad()
    def run(images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        return model(images.to(next(model.parameters()).dtype))

    return run
