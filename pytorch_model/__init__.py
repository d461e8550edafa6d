"""EfficientDet in PyTorch, bias-free. Needs torch and numpy only, and knows nothing of TensorFlow."""

from pytorch_model.config import MODELS, EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet, create_model
from pytorch_model.errors import ConfigError, PortingError, WeightsError
from pytorch_model.weights import load_model

__all__ = [
    "MODELS",
    "ConfigError",
    "EfficientDet",
    "EfficientDetConfig",
    "PortingError",
    "WeightsError",
    "create_model",
    "load_model",
    "model_config",
]
