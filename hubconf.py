"""Entry points of ``torch.hub``: ``torch.hub.load(REPO, "efficientdet_d4", weights=PATH)``.

One for each model variant: ``efficientdet_d0`` … ``efficientdet_d7x``, ``efficientdet_lite0`` … ``_lite4``.
"""

from __future__ import annotations

import os as _os
from collections.abc import Callable as _Callable

# torch.hub shows every callable here whose name has no underscore in front.
from pytorch_model.config import MODELS as _MODELS
from pytorch_model.efficientdet import EfficientDet as _EfficientDet
from pytorch_model.hub import load_variant as _load_variant

dependencies = ["torch", "numpy", "safetensors"]


def _entry(model: str) -> _Callable[..., _EfficientDet]:
    def entry(
        weights: str | _os.PathLike[str] | None = None, num_classes: int | None = None
    ) -> _EfficientDet:
        return _load_variant(model, weights, num_classes)

    entry.__name__ = model.replace("-", "_")
    entry.__doc__ = f"""EfficientDet: {model}, in evaluation mode.

    ``weights``: a file or folder that this project wrote; or an address whose last part is
    ``…-<first digits of its SHA-256>.pth``, as tools/release.py names it (the digits are checked); None: no
    trained weights. If ``num_classes`` differs from the weights', the class predictor is re-initialised and
    everything else kept. Raises ``WeightsError`` if the weights belong to another model.
    """
    return entry


for _model in _MODELS:
    globals()[_model.replace("-", "_")] = _entry(_model)
