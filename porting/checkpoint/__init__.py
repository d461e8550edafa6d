"""Any source of AutoML EfficientDet weights, opened as one thing: a mapping from variable name to array."""

from porting.checkpoint.base import Checkpoint
from porting.checkpoint.open import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
