"""Small configurations that leave no kind of layer out, and stand-ins for whole networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pytorch_model.config import BackboneConfig, EfficientDetConfig, Stage, model_config
from pytorch_model.detection.detector import Detector
from tf_reference.variables import variable_shapes

SHALLOW = tuple(
    Stage(1, kernel, stride, 1 if i == 0 else 6, 8 + 4 * i)
    for i, (kernel, stride) in enumerate(zip((3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1), strict=True))
)


def tiny(**changes: Any) -> EfficientDetConfig:
    """D0 with one cell and one repeat: few variables, but every kind of layer."""
    small = {"fpn_cell_repeats": 1, "box_class_repeats": 1, "num_classes": 2}
    return model_config("efficientdet-d0", **{**small, **changes})


def seeded(config: EfficientDetConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.random(shape, np.float32) for name, shape in variable_shapes(config).items()}


def small(**overrides: Any) -> EfficientDetConfig:
    backbone = BackboneConfig("efficientnet-b0", 8, SHALLOW)
    return tiny(**{"backbone": backbone, "image_size": (128, 96), **overrides})


def built(
    tf: Any, config: EfficientDetConfig, values: Mapping[str, np.ndarray]
) -> tuple[Any, dict[str, Any]]:
    """The network in a TensorFlow 1 graph over variables of AutoML's names: (graph, tap → tensor)."""
    from tf_reference.efficientdet import efficientdet

    v1, seen = tf.compat.v1, {}

    def tap(name: str, x: Any) -> Any:
        seen[name] = x
        return x

    graph = tf.Graph()
    with graph.as_default():
        placed = {name: v1.get_variable(name, initializer=value) for name, value in values.items()}
        images = v1.placeholder(tf.float32, [1, *config.image_size, 3], "whatever")
        efficientdet({name: tf.convert_to_tensor(v) for name, v in placed.items()}, config, images, tap)
    return graph, seen


def shallow() -> EfficientDetConfig:
    """:func:`tiny` with a backbone of one block per stage."""
    return tiny(backbone=BackboneConfig("efficientnet-b0", 8, SHALLOW))


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """The same names, types, shapes and bytes; and every array owns its memory."""
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        assert array.shape == expected[name].shape, name
        assert array.tobytes() == expected[name].tobytes(), name
        assert array.flags.owndata, name


def one_of_each_layer() -> EfficientDetConfig:
    """Every kind of layer, few weights, fewer than in :func:`tiny`."""
    widths, kernels, strides = (4, 14, 4, 14, 6, 16, 4), (3, 3, 5, 3, 5, 5, 3), (1, 2, 2, 2, 1, 2, 1)
    stages = tuple(
        Stage(1, kernel, stride, 6 if i else 1, width)
        for i, (width, kernel, stride) in enumerate(zip(widths, kernels, strides, strict=True))
    )
    return EfficientDetConfig(
        name="tiny",
        backbone=BackboneConfig("efficientnet-b0", 8, stages),
        image_size=(160, 192),
        fpn_num_filters=8,
        fpn_cell_repeats=1,
        box_class_repeats=1,
        num_classes=3,
    )


class OneObject(nn.Module):
    """Replaces the network: finds one object, exactly at an anchor, in any image."""

    def __init__(self, config: EfficientDetConfig, level: int, row: int, column: int, anchor: int) -> None:
        super().__init__()
        self.config = config
        self.place = (level, row, column, anchor)
        self.device_marker = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        sizes = self.config.feature_sizes((images.shape[2], images.shape[3]))
        channels = self.config.num_anchors * self.config.num_classes
        classes = {level: torch.full((len(images), channels, *size), -30.0) for level, size in sizes.items()}
        boxes = [torch.zeros(len(images), self.config.num_anchors * 4, *size) for size in sizes.values()]
        level, row, column, anchor = self.place
        classes[level][:, anchor * self.config.num_classes + 16, row, column] = 4.0
        return list(classes.values()), boxes


def one_object_detector(**options: Any) -> Detector:
    config = model_config("efficientdet-d0", image_size=(128, 256))
    stub: Any = OneObject(config, level=4, row=3, column=5, anchor=0)
    return Detector(stub, **options)
