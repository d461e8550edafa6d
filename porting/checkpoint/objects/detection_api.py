"""EfficientDet of the TensorFlow 2 Object Detection API (``ckpt-0``): the same layers in another tree.

What differs from AutoML, and what becomes of it:

- Anchors at a location go by aspect ratio, then by scale; AutoML's go by scale, then by aspect ratio. The
  predicting layers' channels are put in AutoML's order.
- The box coder's scale factors divide the predicted boxes, and a background class may come first. Both are
  in ``pipeline.config``, nowhere in the weights. The scales are divided into the box predictor, the
  background is left out.
- P3, P4 and P5 come from fixed blocks (:data:`ENDPOINTS`), which are the last of their resolution in b0
  alone. With a deeper backbone this is another network than AutoML's, though the variables fit: the
  configuration says which blocks, and those after the last are left out.
- Image size and anchors are those of ``pipeline.config``, not of a variant.

Source: TensorFlow Models: ``research/object_detection``, in it
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
from porting.checkpoint.objects.pipeline_config import NAME as PIPELINE
from porting.checkpoint.objects.pipeline_config import Pipeline, read_pipeline
from porting.errors import CheckpointError
from pytorch_model.config import BN_EPSILON

PARTS = ("_feature_extractor", "_box_predictor")
FORMAT = "TensorFlow Object Detection API checkpoint"

#: Level → (stage, block in the stage) that the API takes it from, whatever the depth of the backbone.
ENDPOINTS = {3: (2, 1), 4: (4, 2), 5: (6, 0)}

_AUTOML_RATIOS = (1.0, 2.0, 0.5)  # AutoML's aspect_ratios, in its order


def read(tree: ObjectTree, root: int) -> Checkpoint:
    """The detector at ``root``, an object that has all of :data:`PARTS`, under AutoML's names.

    Needs the model's ``pipeline.config``: in the folder of the checkpoint or SavedModel, as training leaves
    it, or else beside that folder, as the API exports it. Raises CheckpointError without it, and for anything
    that AutoML's network cannot do.
    """
    source = tree.bundle.source
    variables = tree.variables(root)
    layout = read_layout(variables, source)
    endpoints = _endpoints(layout, source)
    pipeline = read_pipeline(_find_pipeline(source))
    _check_pipeline(pipeline, layout, variables)
    pieces = {**layout.pieces, **dict(_predictors(layout, pipeline, variables))}
    notes = [
        "an Object Detection API checkpoint: no real weights of this layout were at hand to run, nor was the "
        "API's way of resizing images compared",
        *_about_pipeline(pipeline),
    ]
    kept = {path: variable for path, variable in variables.items() if path not in layout.unused}
    return assemble(tree, kept, pieces, FORMAT, notes, settings=_settings(pipeline, endpoints))


def _endpoints(layout: Layout, source: str) -> tuple[int, int, int]:
    """The blocks of P3, P4 and P5. Raises CheckpointError unless the detector ends at the last of them."""
    stages = layout.backbone.stages
    third, fourth, fifth = (sum(s.repeats for s in stages[:stage]) + b for stage, b in ENDPOINTS.values())
    if layout.detector_blocks != fifth + 1:
        raise CheckpointError(
            f"{source} runs {layout.detector_blocks} blocks of {layout.backbone.name}, the Object Detection "
            f"API runs {fifth + 1}; where this one takes its pyramid from cannot be known"
        )
    return third, fourth, fifth


def _settings(pipeline: Pipeline, endpoints: tuple[int, int, int]) -> dict[str, Any]:
    """What the configuration takes from elsewhere than the weights."""
    ratios = pipeline.aspect_ratios
    settings = {
        "endpoints": endpoints,
        "num_scales": pipeline.scales_per_octave,
        "anchor_scale": pipeline.anchor_scale,
        "aspect_ratios": _AUTOML_RATIOS if sorted(ratios) == sorted(_AUTOML_RATIOS) else ratios,
    }
    return settings | ({"image_size": pipeline.image_size} if pipeline.image_size else {})


def _find_pipeline(source: str) -> Path:
    prefix = Path(os.path.abspath(source))
    folder, neighbour = prefix.parent, f"{prefix.name}.index"
    if prefix.name == folder.name == "variables":  # of a SavedModel
        folder, neighbour = folder.parent, "its folder variables"
    for place in (folder, folder.parent):  # further up, whatever lies there is not this model's
        if (place / PIPELINE).is_file():
            return place / PIPELINE
    raise CheckpointError(
        f"{source} is an Object Detection API checkpoint, and only its {PIPELINE} tells the box coding, the "
        "anchors and the background class; put that file, which comes with the model, beside "
        f"{neighbour} (unpack an archive for that)"
    )


def _check_pipeline(pipeline: Pipeline, layout: Layout, variables: Mapping[str, Variable]) -> None:
    """Raise CheckpointError where the pipeline is another model's, or asks for what AutoML's cannot do."""
    levels = (layout.max_level - layout.num_levels + 1, layout.max_level)
    weighted = "fpn_cells/cell_0/fnode0/WSM" in layout.pieces
    expected_class = len(_class_channels(pipeline)) + _background_channels(pipeline)
    found = {
        "feature_extractor type": layout.backbone.name in pipeline.feature_extractor,
        "anchor levels": pipeline.anchor_levels == levels,
        "bifpn levels": pipeline.bifpn_levels == levels,
        "combine_method": pipeline.combine_method == ("fast_attention" if weighted else "sum"),
        "activation": set(pipeline.activations) == {"SWISH"},
        "batch_norm epsilon": all(abs(e - BN_EPSILON) < 1e-8 for e in pipeline.bn_epsilons),
        "score_converter": pipeline.score_converter == "SIGMOID" and pipeline.logit_scale == 1,
        "box_coder scales": all(scale > 0 for scale in pipeline.box_scales),
        "aspect_ratios": len(set(pipeline.aspect_ratios)) == len(pipeline.aspect_ratios) > 0,
        "anchors": _width(layout, variables, "box_net/box-predict") == 4 * _num_anchors(pipeline),
        "num_classes": pipeline.num_classes > 0
        and _width(layout, variables, "class_net/class-predict") == expected_class,
    }
    wrong = [what for what, fits in found.items() if not fits]
    if wrong:
        raise CheckpointError(
            f"{pipeline.path} does not go with the checkpoint, or describes a model that AutoML's network "
            f"cannot be: see its {', '.join(wrong)}"
        )


def _width(layout: Layout, variables: Mapping[str, Variable], scope: str) -> int:
    return variables[layout.pieces[f"{scope}/bias"].path].shape[-1]


def _num_anchors(pipeline: Pipeline) -> int:
    return pipeline.scales_per_octave * len(pipeline.aspect_ratios)


def _anchor_order(pipeline: Pipeline) -> np.ndarray:
    """AutoML's anchor at a location → the API's. int [anchors]."""
    ratios = pipeline.aspect_ratios
    if sorted(ratios) == sorted(_AUTOML_RATIOS):
        order = [ratios.index(ratio) for ratio in _AUTOML_RATIOS]
    else:
        order = list(range(len(ratios)))
    scales = np.arange(pipeline.scales_per_octave)
    return (scales[:, None] + pipeline.scales_per_octave * np.array(order, int)[None, :]).reshape(-1)


def _class_channels(pipeline: Pipeline) -> np.ndarray:
    """AutoML's class logits → the API's channels. int [anchors · classes]."""
    background = int(pipeline.add_background_class)
    classes = np.arange(pipeline.num_classes) + background
    slots = pipeline.num_classes + background
    return (_anchor_order(pipeline)[:, None] * slots + classes[None, :]).reshape(-1)


def _background_channels(pipeline: Pipeline) -> int:
    return _num_anchors(pipeline) if pipeline.add_background_class else 0


def _predictors(
    layout: Layout, pipeline: Pipeline, variables: Mapping[str, Variable]
) -> Iterator[tuple[str, Piece]]:
    """The last layer of each head, with channels and box scales as AutoML reads them."""
    boxes = (_anchor_order(pipeline)[:, None] * 4 + np.arange(4)[None, :]).reshape(-1)
    divisors = np.tile(np.array(pipeline.box_scales, np.float32), _num_anchors(pipeline))
    for scope, channels, divisor in (
        ("class_net/class-predict", _class_channels(pipeline), None),
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
    """What was done because of the pipeline."""
    yield f"image size, anchors and the blocks that P3, P4 and P5 come from as {pipeline.path} says"
    yield f"class and box channels in AutoML's order of anchors, as {pipeline.path} says"
    if set(pipeline.box_scales) != {1.0}:
        scales = ", ".join(f"{scale:g}" for scale in pipeline.box_scales)
        yield f"the box coder's scales {scales} were divided into box_net/box-predict"
    if pipeline.add_background_class:
        yield "the background class was left out of class_net/class-predict"
