"""TFLite files for tests: the TensorFlow reference of a small Lite model, through TensorFlow's own converter.

``python -m parity_tests.helpers.tflite_files`` writes the two files that are part of the project.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from parity_tests.helpers.paths import GOLDENS
from parity_tests.helpers.recordings import normalise
from porting.synthetic import synthetic_image, synthetic_variables
from pytorch_model.anchors import generate_anchors
from pytorch_model.config import BackboneConfig, EfficientDetConfig, Stage, model_config

# Every kind of stage of the real models, few channels, a size that is not square and does not halve evenly.
TINY = model_config("efficientdet-lite0").replace(
    name="custom",
    backbone=BackboneConfig(
        "efficientnet-lite0",
        8,
        (
            Stage(1, 3, 1, 1, 8),
            Stage(2, 3, 2, 6, 8),
            Stage(1, 5, 2, 6, 12),
            Stage(2, 3, 2, 6, 12),
            Stage(1, 5, 1, 6, 16),
            Stage(2, 5, 2, 6, 20),
            Stage(1, 3, 1, 6, 24),
        ),
        se_ratio=0.0,
    ),
    image_size=(96, 72),
    fpn_num_filters=16,
    fpn_cell_repeats=2,
    box_class_repeats=2,
    num_classes=5,
)
SEED = 4
KINDS = ("float32", "float16", "int8", "int8 weights")


def tiny_variables(config: EfficientDetConfig = TINY) -> dict[str, np.ndarray]:
    return synthetic_variables(config, SEED)


def pictures(config: EfficientDetConfig, count: int, first: int = 10) -> np.ndarray:
    """Seeded, normalised images, float32 [count, H, W, 3]."""
    images = np.stack([synthetic_image(*config.image_size, first + i) for i in range(count)])
    return normalise(images, config)


def golden(kind: str) -> Path:
    return GOLDENS / f"tiny-lite-{kind}.tflite"


def tflite_bytes(
    config: EfficientDetConfig,
    variables: Mapping[str, np.ndarray],
    kind: str,
    postprocess: bool = True,
    options: Mapping[str, float] | None = None,
) -> bytes:
    """The network as a TFLite file of ``kind``, one of :data:`KINDS`.

    With ``postprocess`` it ends with the detection operator, as AutoML's export does; without, with the
    heads. ``options`` replace settings of that operator.
    """
    import tensorflow as tf

    from tf_reference.efficientdet import as_tensors, efficientdet

    tensors = as_tensors(variables)

    @tf.function(  # type: ignore[untyped-decorator]
        input_signature=[tf.TensorSpec([1, *config.image_size, 3], tf.float32, name="images")],
        autograph=False,
    )
    def network(images: Any) -> Any:
        class_outputs, box_outputs = efficientdet(tensors, config, images)
        if not postprocess:
            return {f"output_{i}": x for i, x in enumerate([*class_outputs, *box_outputs])}
        scores = tf.sigmoid(tf.concat([tf.reshape(x, [1, -1, config.num_classes]) for x in class_outputs], 1))
        boxes = tf.concat([tf.reshape(x, [1, -1, 4]) for x in box_outputs], 1)
        found = _detection_operator(config, options or {})(boxes, scores, tf.constant(centre_sizes(config)))
        return {f"output_{i}": x for i, x in enumerate(found)}

    # The reference gathers pixels, which is exact in float64; AutoML resizes.
    with mock.patch("tf_reference.bifpn.nearest_resize", tf.compat.v1.image.resize_nearest_neighbor):
        return convert_function(network, pictures(config, 8, first=20), kind)


def convert_function(function: Any, images: np.ndarray, kind: str = "float32") -> bytes:
    """A ``tf.function`` of one image as a TFLite file. ``images`` calibrate its quantisation."""
    import tensorflow as tf

    def representative() -> Iterator[list[np.ndarray]]:
        for image in images:
            yield [image[None]]

    module = tf.Module()
    module.function = function
    # Through a SavedModel, because there a function is not inlined before an operator can replace it.
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures=function.get_concrete_function())
        converter = tf.lite.TFLiteConverter.from_saved_model(folder)
        return _convert(converter, representative, kind)


def _convert(converter: Any, representative: Any, kind: str) -> bytes:
    import tensorflow as tf

    converter.allow_custom_ops = True
    if kind != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if kind == "int8":
        converter.representative_dataset = representative
        converter.inference_input_type = tf.uint8
    data: bytes = converter.convert()
    return data


def centre_sizes(config: EfficientDetConfig) -> np.ndarray:
    """The anchors as the detection operator takes them: float32 [A, 4], fractions of the image."""
    boxes_yxyx = generate_anchors(config).numpy().reshape(-1, 2, 2)
    corners = boxes_yxyx / np.array(config.image_size, np.float32)
    return np.concatenate([corners.mean(axis=1), corners[:, 1] - corners[:, 0]], axis=1).astype(np.float32)


def _detection_operator(config: EfficientDetConfig, options: Mapping[str, float]) -> Any:
    """The function that the converter replaces with TFLite's detection operator."""
    import tensorflow as tf

    settings: dict[str, float] = {
        "max_detections": 25,
        "max_classes_per_detection": 1,
        "use_regular_nms": False,
        "nms_score_threshold": 0.0,
        "nms_iou_threshold": 0.5,
        **{f"{side}_scale": 1.0 for side in "yxhw"},
        "num_classes": config.num_classes,
        **options,
    }
    letters = {bool: "b", int: "i", float: "f"}
    attributes = [
        f'attr {{ key: "{key}" value {{ {letters[type(value)]}: {str(value).lower()} }} }}'
        for key, value in settings.items()
    ]

    signature = " ".join(['name: "TFLite_Detection_PostProcess"', *attributes])

    @tf.function(experimental_implements=signature, autograph=False)  # type: ignore[untyped-decorator]
    def detect(boxes: Any, scores: Any, anchors: Any) -> Any:
        return tf.zeros([1, 25, 4]), tf.zeros([1, 25]), tf.zeros([1, 25]), tf.zeros([1])

    return detect


if __name__ == "__main__":
    for kind in ("float32", "int8"):
        golden(kind).write_bytes(tflite_bytes(TINY, tiny_variables(), kind))
