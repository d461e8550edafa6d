"""The whole reference network, in the order AutoML builds it."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

import numpy as np
import tensorflow as tf

from pytorch_model.config import MAX_BACKBONE_LEVEL, EfficientDetConfig
from tf_reference.bifpn import cell, resample
from tf_reference.efficientnet import efficientnet
from tf_reference.heads import head
from tf_reference.layers import Network, Tap, Tensor, keep, size_of


def efficientdet(
    variables: Mapping[str, Tensor],
    config: EfficientDetConfig,
    images: Tensor,
    tap: Tap = keep,
    updates: MutableMapping[str, Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """AutoML's network: images [N, H, W, 3] → (class_outputs, box_outputs), one tensor per level.

    ``variables`` maps AutoML names to tensors of the images' float type (:func:`as_tensors`). Class
    logits are [N, H_l, W_l, anchors · num_classes], regressions [N, H_l, W_l, anchors · 4]. ``tap`` sees
    every named point in execution order (see :class:`tf_reference.layers.Network`). With ``updates``, batch
    norms run in training mode and put their new ``moving_mean`` and ``moving_variance`` there. Raises
    ``KeyError`` on a missing variable.
    """
    net = Network(variables, tap, updates)
    endpoints = efficientnet(net, images, config.backbone, config.act_type)
    features = [endpoints[level] for level in config.levels if level <= MAX_BACKBONE_LEVEL]
    for level in config.extra_levels:
        height, width = size_of(features[-1])
        size = ((height + 1) // 2, (width + 1) // 2)
        features.append(resample(net, features[-1], f"resample_p{level}", config, size))
    for i in range(config.fpn_cell_repeats):
        features = cell(net, features, f"fpn_cells/cell_{i}", config)
    return head(net, features, "class", config), head(net, features, "box", config)


def as_tensors(variables: Mapping[str, np.ndarray], dtype: str = "float32") -> dict[str, Tensor]:
    """Arrays → tensors of one float type, ``float32`` or ``float64``."""
    return {name: tf.constant(np.asarray(value, dtype)) for name, value in variables.items()}
