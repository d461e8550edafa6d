"""Models as AutoML exports them: an image in grey levels goes in, detections come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parity_tests.helpers.exported.layers import Variables, keras_layers
from parity_tests.helpers.object_trees import automl_paths
from pytorch_model.anchors import generate_anchors
from pytorch_model.config import EfficientDetConfig

DETECTIONS = 100


@dataclass(frozen=True)
class Export:
    """How a model is exported. ``joined``: one output [1, 100, 7], as by TensorFlow 1's exporter."""

    joined: bool = False
    per_class: bool = False
    sigma: float = 0.0
    score_threshold: float = 0.0


def network(tf: Any, config: EfficientDetConfig, variables: Mapping[str, Any], images: Any) -> Any:
    """The network with the operations of AutoML's layers."""
    from tf_reference.efficientdet import efficientdet

    held = Variables(variables)
    with keras_layers(tf, held):
        return efficientdet(held, config, images)


def normalised(tf: Any, config: EfficientDetConfig, image: Any) -> Any:
    image = tf.cast(image, tf.float32)
    image -= tf.constant(config.mean_rgb, shape=(1, 1, 3))
    return image / tf.constant(config.stddev_rgb, shape=(1, 1, 3))


def preprocessed(tf: Any, config: EfficientDetConfig, image: Any) -> tuple[Any, Any]:
    """(float32 [H, W, 3], the factor from the input's pixels to the image's) of uint8 [h, w, 3]."""
    image = normalised(tf, config, image)
    height, width = config.image_size
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    scale = tf.minimum(height / shape[0], width / shape[1])
    size = tf.cast(shape * scale, tf.int32)
    image = tf.image.resize(image, size)[:height, :width]
    return tf.image.pad_to_bounding_box(image, 0, 0, height, width), 1 / scale


def decoded(tf: Any, config: EfficientDetConfig, heads: Any) -> tuple[Any, Any]:
    """(boxes yxyx [1, A, 4] in pixels of the input, logits [1, A, classes])."""
    logits = tf.concat([tf.reshape(x, [1, -1, config.num_classes]) for x in heads[0]], 1)
    ty, tx, th, tw = tf.unstack(tf.concat([tf.reshape(x, [1, -1, 4]) for x in heads[1]], 1), axis=-1)
    anchors = tf.constant(generate_anchors(config).numpy())
    yc, xc = (anchors[:, 0] + anchors[:, 2]) / 2, (anchors[:, 1] + anchors[:, 3]) / 2
    ha, wa = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    y, x, h, w = ty * ha + yc, tx * wa + xc, tf.exp(th) * ha, tf.exp(tw) * wa
    return tf.stack([y - h / 2, x - w / 2, y + h / 2, x + w / 2], -1), logits


def suppressed(tf: Any, config: EfficientDetConfig, boxes: Any, logits: Any, export: Export) -> Any:
    """(boxes [1, 100, 4], scores [1, 100], class ids [1, 100], the number of detections [1])."""
    if export.per_class:
        found = tf.image.combined_non_max_suppression(
            boxes[:, :, None], tf.sigmoid(logits), DETECTIONS, DETECTIONS, 0.5, export.score_threshold,
            clip_boxes=False,
        )  # fmt: skip
        return found[0], found[1], found[2] + 1, found[3]
    classes, scores = tf.argmax(logits[0], -1, tf.int32), tf.sigmoid(tf.reduce_max(logits[0], -1))
    kept, kept_scores, count = tf.raw_ops.NonMaxSuppressionV5(
        boxes=boxes[0], scores=scores, max_output_size=DETECTIONS, iou_threshold=0.5,
        score_threshold=export.score_threshold, soft_nms_sigma=export.sigma, pad_to_max_output_size=True,
    )  # fmt: skip
    height, width = config.image_size
    limit = tf.constant([height, width, height, width], tf.float32)
    kept_boxes = tf.clip_by_value(tf.gather(boxes[0], kept), 0.0, limit)
    return (
        kept_boxes[None],
        kept_scores[None],
        tf.cast(tf.gather(classes, kept) + 1, tf.float32)[None],
        count[None],
    )


def served(
    tf: Any, config: EfficientDetConfig, variables: Mapping[str, Any], images: Any, export: Export
) -> Any:
    """The whole model on uint8 ``images`` [1, h, w, 3]."""
    image, scale = preprocessed(tf, config, images[0])
    boxes, logits = decoded(tf, config, network(tf, config, variables, image[None]))
    boxes, scores, classes, count = suppressed(tf, config, boxes, logits, export)
    boxes *= scale
    if export.joined:
        sides = [boxes[..., i] for i in range(4)]
        return tf.stack([tf.zeros_like(scores), *sides, scores, classes], -1)
    return boxes, scores, classes, count


def keras_model(
    tf: Any, config: EfficientDetConfig, values: Mapping[str, np.ndarray]
) -> tuple[Any, dict[str, Any]]:
    """An object that owns the variables under AutoML's attributes, and the variables by name."""
    model = tf.__internal__.tracking.AutoTrackable()
    paths = automl_paths(config)
    placed = {}
    for name, value in values.items():
        *parents, leaf = paths[name].split("/")
        at = model
        for part in parents:
            if getattr(at, part, None) is None:
                setattr(at, part, tf.__internal__.tracking.AutoTrackable())
            at = getattr(at, part)
        placed[name] = tf.Variable(value, name=name)
        setattr(at, leaf, placed[name])
    setattr(model.resample_layers, "1", tf.__internal__.tracking.AutoTrackable())  # pools only
    return model, placed


def save_model(
    tf: Any, folder: Path, config: EfficientDetConfig, values: Mapping[str, np.ndarray], export: Export
) -> None:
    """A SavedModel of TensorFlow 2."""
    module = tf.Module()
    module.model, placed = keras_model(tf, config, values)

    def serve(images: Any) -> Any:
        tensors = {name: tf.convert_to_tensor(variable) for name, variable in placed.items()}
        found = served(tf, config, tensors, images, export)
        return {f"output_{i}": x for i, x in enumerate(found if isinstance(found, tuple) else (found,))}

    function = tf.function(serve, input_signature=[tf.TensorSpec([1, None, None, 3], tf.uint8, "images")])
    tf.saved_model.save(module, str(folder), signatures=function.get_concrete_function())
