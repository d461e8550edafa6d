"""References as networks: the input of ours in, head outputs as ours has them out.

Each takes float32 [N, 3, H, W], normalised, and returns (class_outputs, box_outputs) by level, float32
[N, C, h, w], so that one postprocessing serves both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from porting.errors import PortingError
from pytorch_model.config import EfficientDetConfig
from pytorch_model.detector import Network


def require_tensorflow() -> None:
    """Raises :class:`PortingError` where TensorFlow is not installed."""
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        raise PortingError(
            "a reference needs TensorFlow, which is not installed: pip install -e '.[tensorflow]'"
        ) from None


def ops_network(
    variables: Mapping[str, np.ndarray], config: EfficientDetConfig, dtype: str = "float32"
) -> Network:
    """AutoML's network by :mod:`tf_reference` in float32 or float64. Imports TensorFlow."""
    import tensorflow as tf

    from tf_reference.efficientdet import as_tensors, efficientdet

    tensors = as_tensors(variables, dtype)

    def network(images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        outputs = efficientdet(tensors, config, tf.constant(_to_nhwc(images), dtype))
        class_outputs, box_outputs = (
            _from_nhwc([x.numpy() for x in kind], images.device) for kind in outputs
        )
        return class_outputs, box_outputs

    return network


def tflite_network(path: Path, image_size: tuple[int, int]) -> Network:
    """A TFLite file run by TensorFlow Lite's interpreter, rounding and all. Imports TensorFlow.

    Raises :class:`PortingError` for a file that is no EfficientDet-Lite, or of another ``image_size``.
    """
    from porting.parity.tflite_reference import tflite_outputs

    tflite_outputs(path, np.zeros((1, *image_size, 3), np.float32))  # refused before long work

    def network(images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        outputs = tflite_outputs(path, _to_nhwc(images))
        levels = sorted(int(name.partition("/")[2]) for name in outputs if name.startswith("class_outputs/"))
        class_outputs, box_outputs = (
            _from_nhwc([outputs[f"{kind}_outputs/{level}"] for level in levels], images.device)
            for kind in ("class", "box")
        )
        return class_outputs, box_outputs

    return network


def _to_nhwc(images: Tensor) -> np.ndarray:
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).float().cpu().numpy())


def _from_nhwc(outputs: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).to(device) for x in outputs]
