"""Entry points of ``torch.hub``: ``torch.hub.load(REPO, "efficientdet_d4", weights=PATH)``.

One for each variant: ``efficientdet_d0`` … ``efficientdet_d7x``, ``efficientdet_lite0`` … ``_lite4``.
"""

from __future__ import annotations

import os as _os
from collections.abc import Callable as _Callable

# torch.hub shows every callable here whose name has no underscore in front.
from pytorch_model.config import MODELS as _MODELS
from pytorch_model.efficientdet import EfficientDet as _EfficientDet
from pytorch_model.weights.files import load_variant as _load_variant

dependencies = ["torch", "numpy", "safetensors"]


def _entry(model: str) -> _Callable[..., _EfficientDet]:
    def entry(
        weights: str | _os.PathLike[str] | None = None, num_classes: int | None = None
    ) -> _EfficientDet:
        return _load_variant(model, weights, num_classes)

    entry.__name__ = model.replace("-", "_")
    entry.__doc__ = f"""EfficientDet: {model}, in evaluation mode.

    ``weights``: a file or folder that this project wrote; an address whose last part is
    ``…-<first digits of its SHA-256>.pth``, as tools/release.py names it, which is checked; None: untrained.
    ``num_classes``, if it is another number than that of the weights, starts the class predictor anew.
    Raises ``WeightsError`` where the weights are not this model's.
    """
    return entry


for _model in _MODELS:
    globals()[_model.replace("-", "_")] = _entry(_model)
