"""Ports Google AutoML EfficientDet weights from TensorFlow to PyTorch, and proves the port.

Names are imported when they are first used, so that ``import porting`` loads neither PyTorch nor TensorFlow.
``convert`` and ``reverse`` are modules: ``from porting.convert import convert``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from porting.checkpoint import Checkpoint, open_checkpoint
    from porting.convert import Conversion
    from porting.errors import CheckFailedError, CheckpointError, ConversionError, EfficientDetError
    from porting.hparams import Hparams, read_hparams
    from porting.infer import Inference, configure, infer_config, named_config
    from porting.parity import prove
    from porting.sources.open import open_source

__version__ = "0.4.0"  # the only place of the version: pyproject.toml reads it here

_HOMES = {
    "CheckFailedError": "errors",
    "Checkpoint": "checkpoint",
    "CheckpointError": "errors",
    "Conversion": "convert",
    "ConversionError": "errors",
    "EfficientDetError": "errors",
    "Hparams": "hparams",
    "Inference": "infer",
    "configure": "infer",
    "infer_config": "infer",
    "named_config": "infer",
    "open_checkpoint": "checkpoint",
    "open_source": "sources.open",
    "prove": "parity",
    "read_hparams": "hparams",
}

__all__ = [
    "CheckFailedError",
    "Checkpoint",
    "CheckpointError",
    "Conversion",
    "ConversionError",
    "EfficientDetError",
    "Hparams",
    "Inference",
    "configure",
    "infer_config",
    "named_config",
    "open_checkpoint",
    "open_source",
    "prove",
    "read_hparams",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
