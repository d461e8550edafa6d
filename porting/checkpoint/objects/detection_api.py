"""EfficientDet of the TensorFlow 2 Object Detection API (``ckpt-0``): the same layers in a different tree.

The differences from AutoML, and how they are handled:

- Anchors at a location are ordered by aspect ratio, then by scale; AutoML's by scale, then by aspect ratio.
  The channels of the predicting layers are put in AutoML's order.
- The predicted boxes are divided by the scale factors of the box coder, and there may be a background class
  before the others. Both are only in ``pipeline.config``, not in the weights. The weights of the box
  predictor are divided by the scales; the background class is left out.
- P3, P4 and P5 come from fixed blocks (:data:`ENDPOINTS`). Only in b0 are these the last blocks of their
  resolution. With a deeper backbone the network is different from AutoML's, although the variables fit. The
  configuration then holds the numbers of the blocks, and the blocks after the last one are left out.
- Image size, the way to resize and anchors are those of ``pipeline.config``, not of a variant.

Source: TensorFlow Models, ``research/object_detection``:
``models/ssd_efficientnet_bifpn_feature_extractor.py``, ``utils/bifpn_utils.py``,
``models/bidirectional_feature_pyramid_generators.py``, ``predictors/convolutional_keras_box_predictor.py``,
``anchor_generators/`` and ``box_coders/``; ``official/vision/image_classification/efficientnet/``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from porting.checkpoint.base import Checkpoint
from porting.checkpoint.objects.assemble import Piece, assemble
from porting.checkpoint.objects.detection_api_layout import Layout, read_layout
from porting.checkpoint.objects.graph import ObjectTree, Variable
from porting.checkpoint.objects.label_map import find_class_names
from porting.checkpoint.objects.pipeline_config import Pipeline, read_pipeline
from porting.checkpoint.objects.text_format import NAME as PIPELINE
from porting.errors import CheckpointError
from pytorch_model.config import BN_EPSILON, shown

PARTS = ("_feature_extractor", "_box_predictor")
FORMAT = "TensorFlow Object Detection API checkpoint"

#: Level → (stage, block in the stage) that the API takes it from, for every depth of the backbone.
ENDPOINTS = {3: (2, 1), 4: (4, 2), 5: (6, 0)}

_AUTOML_RATIOS = (1.0, 2.0, 0.5)  # AutoML's aspect_ratios, in its order
_FUSIONS = {"fast_attention": "fastattn", "sum": "sum"}  # combine_method → fpn_weight_method

#: What the API's code does whatever the pipeline says, or what the pipeline must say (_of_network).
_FIXED: Mapping[str, Any] = {
    "anchor_stride": "power_of_two",
    "mean_rgb": (0.485 * 255, 0.456 * 255, 0.406 * 255),
    "stddev_rgb": (0.229 * 255, 0.224 * 255, 0.225 * 255),
    "act_type": "swish",
    "conv_after_downsample": False,
    "survival_prob": None,
}


def read(tree: ObjectTree, root: int) -> Checkpoint:
    """Read the detector at ``root``, an object with all of :data:`PARTS`.

    Needs the model's ``pipeline.config``: in the folder of the checkpoint or SavedModel, where training
    leaves it, or in the folder above, where the API exports it. Raises CheckpointError if it is missing, if
    it is of another detector, and for anything that AutoML's network cannot do.
    """
    source = tree.bundle.source
    variables = tree.variables(root)
    place = find_pipeline(source)
    pipeline = read_pipeline(place) if place else None  # first: it names another detector
    layout = read_layout(variables, source)
    endpoints = _endpoints(layout, source)
    if pipeline is None:
        raise _no_pipeline(source)
    _check_pipeline(pipeline, layout, variables)
    pieces = {**layout.pieces, **dict(_predictors(layout, pipeline, variables))}
    class_names, about_names = find_class_names(pipeline)
    settings = settings_of(pipeline, endpoints) | ({"class_names": class_names} if class_names else {})
    notes = [
        "an Object Detection API checkpoint: this layout was not tested with real weights; input and anchors "
        "were compared with recordings of the API's own code",
        *_about_pipeline(pipeline),
        *notes_about_input(pipeline, layout.max_level),
        *([about_names] if about_names else []),
    ]
    kept = {path: variable for path, variable in variables.items() if path not in layout.unused}
    return assemble(tree, kept, pieces, FORMAT, notes, settings=settings)


def _endpoints(layout: Layout, source: str) -> tuple[int, int, int]:
    """The blocks of P3, P4 and P5. Raises CheckpointError unless the detector ends at the last of them."""
    stages = layout.backbone.stages
    third, fourth, fifth = (sum(s.repeats for s in stages[:stage]) + b for stage, b in ENDPOINTS.values())
    if layout.detector_blocks != fifth + 1:
        raise CheckpointError(
            f"{source} runs {layout.detector_blocks} blocks of {layout.backbone.name}, the Object Detection "
            f"API runs {fifth + 1}; the blocks that its pyramid levels come from are unknown"
        )
    return third, fourth, fifth


def settings_of(pipeline: Pipeline, endpoints: tuple[int, int, int]) -> dict[str, Any]:
    """The part of the configuration that is not in the weights: :attr:`Checkpoint.settings`."""
    ratios = pipeline.aspect_ratios
    settings = {
        "endpoints": endpoints,
        "num_scales": pipeline.scales_per_octave,
        "anchor_scale": pipeline.anchor_scale,
        "aspect_ratios": _AUTOML_RATIOS if sorted(ratios) == sorted(_AUTOML_RATIOS) else ratios,
        "fpn_weight_method": _FUSIONS[pipeline.combine_method],
        **_FIXED,
    }
    if pipeline.resizer and pipeline.image_size:
        settings |= {"image_size": pipeline.image_size, "resizer": pipeline.resizer}
    return settings


def find_pipeline(source: str) -> Path | None:
    """The ``pipeline.config`` of the checkpoint ``source``; None if there is none."""
    folder, _ = _folder(source)
    for place in (folder, folder.parent):  # a file further up would not be this model's
        if (place / PIPELINE).is_file():
            return place / PIPELINE
    return None


def _folder(source: str) -> tuple[Path, str]:
    """The folder of the checkpoint or SavedModel ``source``, and what of it lies there."""
    prefix = Path(os.path.abspath(source))
    folder, neighbour = prefix.parent, f"{prefix.name}.index"
    if prefix.name == folder.name == "variables":  # of a SavedModel
        folder, neighbour = folder.parent, "its folder variables"
    return folder, neighbour


def _no_pipeline(source: str) -> CheckpointError:
    _, neighbour = _folder(source)
    return CheckpointError(
        f"{source} is an Object Detection API checkpoint, and the box coding, the anchors and the background "
        f"class are only in its {PIPELINE}; put that file, which comes with the model, beside "
        f"{neighbour} (unpack an archive for that)"
    )


def _check_pipeline(pipeline: Pipeline, layout: Layout, variables: Mapping[str, Variable]) -> None:
    """Raise CheckpointError if the pipeline is not this model's, or does not fit AutoML's network."""
    for compared in (_of_weights(pipeline, layout, variables), _of_network(pipeline)):
        for what, found, wanted, fits in compared:
            if not fits:
                raise CheckpointError(
                    f"{pipeline.path} does not belong to the checkpoint, or describes a network different "
                    f"from AutoML's: its {what} is {_text(found)}, must be {_text(wanted)}"
                )


#: What is compared, its value in the pipeline, what it must be, whether it is.
_Comparison = tuple[str, Any, Any, bool]


def _of_weights(
    pipeline: Pipeline, layout: Layout, variables: Mapping[str, Variable]
) -> Iterator[_Comparison]:
    """Settings that the variables show too."""
    here = " as in the checkpoint"
    name = layout.backbone.name
    yield (
        "feature_extractor type",
        pipeline.feature_extractor,
        name + here,
        name in pipeline.feature_extractor,
    )
    levels = (layout.max_level - layout.num_levels + 1, layout.max_level)
    for what, theirs in (("anchor levels", pipeline.anchor_levels), ("bifpn levels", pipeline.bifpn_levels)):
        yield what, theirs, _text(levels) + here, theirs == levels
    weighted = "fpn_cells/cell_0/fnode0/WSM" in layout.pieces
    method = "fast_attention" if weighted else "sum"
    yield "combine_method", pipeline.combine_method, method + here, pipeline.combine_method == method
    ratios = pipeline.aspect_ratios
    yield "list of aspect_ratios", ratios, "different numbers", len(set(ratios)) == len(ratios) > 0
    anchors = _width(layout, variables, "box_net/box-predict") / 4
    ours = _num_anchors(pipeline)
    yield "number of anchors at a location", ours, f"{anchors:g}{here}", ours == anchors
    background = int(pipeline.add_background_class)
    classes = _width(layout, variables, "class_net/class-predict") / anchors - background
    besides = " besides the background class" if background else ""
    found = pipeline.num_classes
    yield "num_classes", found, f"{classes:g}{besides}{here}", found == classes > 0


def _of_network(pipeline: Pipeline) -> Iterator[_Comparison]:
    """Settings that leave no trace in the variables, and that AutoML's network does not have."""
    yield "activation", pipeline.activations, "SWISH", set(pipeline.activations) == {"SWISH"}
    near = all(abs(epsilon - BN_EPSILON) < 1e-8 for epsilon in pipeline.bn_epsilons)
    yield "batch_norm epsilon", pipeline.bn_epsilons, BN_EPSILON, near
    converter = (pipeline.score_converter, pipeline.logit_scale)
    yield "score_converter with its logit_scale", converter, ("SIGMOID", 1.0), converter == ("SIGMOID", 1.0)
    yield "list of box_coder scales", pipeline.box_scales, "above 0", min(pipeline.box_scales) > 0


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else shown(value)


def _width(layout: Layout, variables: Mapping[str, Variable], scope: str) -> int:
    return variables[layout.pieces[f"{scope}/bias"].path].shape[-1]


def _num_anchors(pipeline: Pipeline) -> int:
    return pipeline.scales_per_octave * len(pipeline.aspect_ratios)


def anchor_order(pipeline: Pipeline) -> np.ndarray:
    """AutoML's anchor at a location → the API's. int [anchors]."""
    ratios = pipeline.aspect_ratios
    if sorted(ratios) == sorted(_AUTOML_RATIOS):
        order = [ratios.index(ratio) for ratio in _AUTOML_RATIOS]
    else:
        order = list(range(len(ratios)))
    scales = np.arange(pipeline.scales_per_octave)
    return (scales[:, None] + pipeline.scales_per_octave * np.array(order, int)[None, :]).reshape(-1)


def class_channels(pipeline: Pipeline) -> np.ndarray:
    """AutoML's class logits → the API's channels. int [anchors · classes]."""
    background = int(pipeline.add_background_class)
    classes = np.arange(pipeline.num_classes) + background
    slots = pipeline.num_classes + background
    return (anchor_order(pipeline)[:, None] * slots + classes[None, :]).reshape(-1)


def _predictors(
    layout: Layout, pipeline: Pipeline, variables: Mapping[str, Variable]
) -> Iterator[tuple[str, Piece]]:
    """The last layer of each head, with AutoML's order of channels and without box scales."""
    boxes = (anchor_order(pipeline)[:, None] * 4 + np.arange(4)[None, :]).reshape(-1)
    divisors = np.tile(np.array(pipeline.box_scales, np.float32), _num_anchors(pipeline))
    for scope, channels, divisor in (
        ("class_net/class-predict", class_channels(pipeline), None),
        ("box_net/box-predict", boxes, None if set(pipeline.box_scales) == {1.0} else divisors),
    ):
        for leaf in ("pointwise_kernel", "bias"):
            path = layout.pieces[f"{scope}/{leaf}"].path
            shape = (*variables[path].shape[:-1], len(channels))
            yield f"{scope}/{leaf}", Piece(path, partial(_select, channels=channels, divisor=divisor), shape)


def _select(array: np.ndarray, channels: np.ndarray, divisor: np.ndarray | None) -> np.ndarray:
    chosen = array[..., channels]
    return chosen if divisor is None else chosen / divisor


def _about_pipeline(pipeline: Pipeline) -> Iterator[str]:
    """Notes about the settings that come from the pipeline."""
    yield f"image size, anchors and the blocks of P3, P4 and P5 are from {pipeline.path}"
    yield f"class and box channels were reordered to AutoML's anchors, as described in {pipeline.path}"
    if set(pipeline.box_scales) != {1.0}:
        scales = ", ".join(f"{scale:g}" for scale in pipeline.box_scales)
        yield f"box_net/box-predict was divided by the box coder's scales {scales}"
    if pipeline.add_background_class:
        yield "the background class was left out of class_net/class-predict"


def notes_about_input(pipeline: Pipeline, max_level: int) -> Iterator[str]:
    """Notes about the input and the suppression, where they differ from AutoML's."""
    multiple = 1 << max_level
    resizer, size = pipeline.resizer, pipeline.image_size
    if resizer is None or size is None:
        yield f"{pipeline.path} has no image_resizer: AutoML's way of resizing is assumed"
    elif not resizer.pad or any(side % multiple for side in resizer.padded(size)):
        yield (
            f"the API runs this model only on inputs whose sides are multiples of {multiple} pixels, which "
            "its image_resizer does not ensure; other inputs are computed by AutoML's rules"
        )
    yield (
        "the API clips boxes to the image and drops those outside; here they are not clipped"
        f"{_about_suppression(pipeline)}"
    )


def _about_suppression(pipeline: Pipeline) -> str:
    found = pipeline.suppression
    if found.extras or found.max_per_class < found.max_total:
        what = ", ".join(found.extras) or f"max_detections_per_class: {found.max_per_class}"
        return f"; its suppression ({what}) is not available here, AutoML's is used"
    settings = f"method=hard,iou_thresh={found.iou_threshold:g},max_output_size={found.max_total}"
    if found.score_threshold:
        settings += f",score_thresh={found.score_threshold:g}"
    named = ",".join(f"nms_configs.{setting}" for setting in settings.split(","))
    return f"; its suppression is hard, AutoML's is used unless you give detect and eval --hparams {named}"
