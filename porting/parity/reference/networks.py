"""References with the inputs and outputs of our network, so that one postprocessing serves both sides.

Each takes float32 [N, 3, H, W], normalised, and returns (class_outputs, box_outputs) by level, float32
[N, C, h, w].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from porting.errors import EfficientDetError
from porting.parity.reference.choose import FileReference
from pytorch_model.config import EfficientDetConfig
from pytorch_model.engines.choose import Network


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


def file_network(reference: FileReference, config: EfficientDetConfig) -> Network:
    """A network in a file: a saved graph, a SavedModel, or a TFLite file with its own rounding.

    The network raises :class:`EfficientDetError` if the file cannot take a batch of that size.
    """
    import tensorflow as tf

    wanted = [[f"{kind}_outputs/{level}" for level in config.levels] for kind in ("class", "box")]

    def network(images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        outputs: dict[str, np.ndarray] = {}

        def take(name: str, value: np.ndarray) -> None:
            if name.startswith(("class_outputs/", "box_outputs/")):
                outputs[name] = value

        try:
            reference.on(_to_nhwc(images))(take)
        except (ValueError, tf.errors.OpError) as error:
            raise EfficientDetError(
                f"TensorFlow cannot run {reference.source} on {len(images)} images at once "
                f"({str(error).splitlines()[0]}); try --batch-size 1"
            ) from None
        class_outputs, box_outputs = (
            _from_nhwc([outputs[name] for name in names], images.device) for names in wanted
        )
        return class_outputs, box_outputs

    return network


def _to_nhwc(images: Tensor) -> np.ndarray:
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).float().cpu().numpy())


def _from_nhwc(outputs: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    return [torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))).to(device) for x in outputs]
