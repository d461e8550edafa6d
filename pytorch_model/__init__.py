"""EfficientDet in PyTorch, bias-free. It needs torch and numpy only, not TensorFlow.

Names are imported at first use, so that importing ``pytorch_model.config`` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytorch_model.config import MODELS, EfficientDetConfig, model_config
    from pytorch_model.detection.detector import Detector
    from pytorch_model.efficientdet import EfficientDet, create_model, load_model
    from pytorch_model.errors import ConfigError, EfficientDetError, PortingError, WeightsError

_HOMES = {
    "MODELS": "config",
    "ConfigError": "errors",
    "Detector": "detection.detector",
    "EfficientDet": "efficientdet",
    "EfficientDetConfig": "config",
    "EfficientDetError": "errors",
    "PortingError": "errors",
    "WeightsError": "errors",
    "create_model": "efficientdet",
    "load_model": "efficientdet",
    "model_config": "config",
}

__all__ = [
    "MODELS",
    "ConfigError",
    "Detector",
    "EfficientDet",
    "EfficientDetConfig",
    "EfficientDetError",
    "PortingError",
    "WeightsError",
    "create_model",
    "load_model",
    "model_config",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
