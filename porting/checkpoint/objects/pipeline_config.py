"""The settings in the Object Detection API's ``pipeline.config`` that its weights do not contain.

Source: TensorFlow Models ``research/object_detection/protos/*.proto`` (fields and defaults).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from porting.checkpoint.messages import unreadable
from porting.checkpoint.objects.image_resizer import read_resizer
from porting.checkpoint.objects.text_format import Fields, parse
from porting.errors import CheckpointError
from pytorch_model.config import Resizer, shown
from pytorch_model.files import read_bounded

_MOST_BYTES = 1 << 18  # usually a few kilobytes; one that lists 1,000 shards of a data set has 100 kB
_EFFICIENTDET = re.compile(r"efficientnet-b\d")


@dataclass(frozen=True)
class Pipeline:
    """The settings that define the network's outputs, or that must be those of AutoML's network.

    The predicted (ty, tx, th, tw) are divided by ``box_scales``. ``image_size`` is (height, width) in pixels;
    it and ``resizer`` are None if the pipeline does not set them. ``label_maps``: the paths that it names.
    """

    path: Path
    feature_extractor: str
    num_classes: int
    add_background_class: bool
    box_scales: tuple[float, float, float, float]
    scales_per_octave: int
    aspect_ratios: tuple[float, ...]
    anchor_scale: float
    anchor_levels: tuple[int, int]
    bifpn_levels: tuple[int, int]
    combine_method: str
    activations: tuple[str, str]  # of the pyramid, of the heads
    bn_epsilons: tuple[float, ...]
    score_converter: str
    logit_scale: float
    image_size: tuple[int, int] | None
    resizer: Resizer | None
    suppression: Suppression
    label_maps: tuple[str, ...]


@dataclass(frozen=True)
class Suppression:
    """``batch_non_max_suppression``. ``extras``: fields set there that make it another algorithm."""

    score_threshold: float
    iou_threshold: float
    max_per_class: int
    max_total: int
    extras: tuple[str, ...]


def read_pipeline(path: Path) -> Pipeline:
    """Read the file at ``path``. Raises CheckpointError if it is not the pipeline of an EfficientDet."""
    try:
        text = read_bounded(path, _MOST_BYTES).decode()
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; check the file") from None
    return _pipeline(Fields(path, "", parse(path, text)))


def _pipeline(root: Fields) -> Pipeline:
    ssd = _ssd(root)
    extractor, predictor = ssd.message("feature_extractor"), ssd.message("box_predictor")
    head = predictor.message("weight_shared_convolutional_box_predictor")
    layers = extractor.message("conv_hyperparams"), head.message("conv_hyperparams")
    coder = ssd.message("box_coder").message("faster_rcnn_box_coder")
    anchors = ssd.message("anchor_generator").message("multiscale_anchor_generator")
    resizer = read_resizer(ssd.message("image_resizer"), extractor.integer("pad_to_multiple", 1))
    bifpn, post = extractor.message("bifpn"), ssd.message("post_processing")
    y, x, height, width = (
        coder.number(name, default)
        for name, default in (("y_scale", 10), ("x_scale", 10), ("height_scale", 5), ("width_scale", 5))
    )
    return Pipeline(
        path=root.path,
        feature_extractor=extractor.text("type", ""),
        num_classes=ssd.integer("num_classes", 0),
        add_background_class=ssd.flag("add_background_class", True),
        box_scales=(y, x, height, width),
        scales_per_octave=anchors.integer("scales_per_octave", 2),
        aspect_ratios=anchors.numbers("aspect_ratios"),
        anchor_scale=anchors.number("anchor_scale", 4),
        anchor_levels=(anchors.integer("min_level", 3), anchors.integer("max_level", 7)),
        bifpn_levels=(bifpn.integer("min_level", 3), bifpn.integer("max_level", 7)),
        combine_method=bifpn.text("combine_method", "fast_attention"),
        activations=(layers[0].text("activation", "RELU"), layers[1].text("activation", "RELU")),
        bn_epsilons=tuple(layer.message("batch_norm").number("epsilon", 0.001) for layer in layers),
        score_converter=post.text("score_converter", "IDENTITY"),
        logit_scale=post.number("logit_scale", 1),
        image_size=resizer[0],
        resizer=resizer[1],
        suppression=_suppression(post.message("batch_non_max_suppression")),
        label_maps=_label_maps(root),
    )


def _ssd(root: Fields) -> Fields:
    """The detector's message. Raises CheckpointError, with its name, if it is not an EfficientDet."""
    model = root.message("model")
    for kind in model.fields:
        for detector in model.messages(kind):
            extractors = detector.messages("feature_extractor")
            name = extractors[-1].text("type", "") if extractors else ""
            if kind != "ssd" or (name and not _EFFICIENTDET.search(name)):
                raise CheckpointError(
                    f"{root.path} describes another detector, {shown(kind)} with the feature extractor "
                    f"{shown(name)}; of the Object Detection API's models only EfficientDet can be converted "
                    "(ssd with ssd_efficientnet-b0_bifpn_keras … b7)"
                )
    return model.message("ssd")


def _suppression(fields: Fields) -> Suppression:
    extras = {
        "soft_nms_sigma": fields.number("soft_nms_sigma", 0) != 0,
        "max_classes_per_detection": fields.integer("max_classes_per_detection", 1) != 1,
        "use_class_agnostic_nms": fields.flag("use_class_agnostic_nms", False),
        "use_combined_nms": fields.flag("use_combined_nms", False),
    }
    return Suppression(
        score_threshold=fields.number("score_threshold", 0),
        iou_threshold=fields.number("iou_threshold", 0.6),
        max_per_class=fields.integer("max_detections_per_class", 100),
        max_total=fields.integer("max_total_detections", 100),
        extras=tuple(name for name, used in extras.items() if used),
    )


def _label_maps(root: Fields) -> tuple[str, ...]:
    """The paths of label maps, those of the training data first, each once."""
    readers = [*root.messages("train_input_reader"), *root.messages("eval_input_reader")]
    return tuple(dict.fromkeys(path for each in readers if (path := each.text("label_map_path", ""))))
