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
- Image size and anchors are those of ``pipeline.config``, not of a variant.

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
from porting.checkpoint.objects.pipeline_config import NAME as PIPELINE
from porting.checkpoint.objects.pipeline_config import Pipeline, read_pipeline
from porting.errors import CheckpointError
from pytorch_model.config import BN_EPSILON

PARTS = ("_feature_extractor", "_box_predictor")
FORMAT = "TensorFlow Object Detection API checkpoint"

#: Level → (stage, block in the stage) that the API takes it from, for every depth of the backbone.
ENDPOINTS = {3: (2, 1), 4: (4, 2), 5: (6, 0)}

_AUTOML_RATIOS = (1.0, 2.0, 0.5)  # AutoML's aspect_ratios, in its order


def read(tree: ObjectTree, root: int) -> Checkpoint:
    """Read the detector at ``root``, an object with all of :data:`PARTS`.

    Needs the model's ``pipeline.config``: in the folder of the checkpoint or SavedModel, where training
    leaves it, or in the folder above, where the API exports it. Raises CheckpointError if it is missing, and
    for anything that AutoML's network cannot do.
    """
    source = tree.bundle.source
    variables = tree.variables(root)
    layout = read_layout(variables, source)
    endpoints = _endpoints(layout, source)
    pipeline = read_pipeline(_find_pipeline(source))
    _check_pipeline(pipeline, layout, variables)
    pieces = {**layout.pieces, **dict(_predictors(layout, pipeline, variables))}
    notes = [
        "an Object Detection API checkpoint: this layout was not tested with real weights, and the API's way "
        "of resizing images was not compared",
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
            f"API runs {fifth + 1}; the blocks that its pyramid levels come from are unknown"
        )
    return third, fourth, fifth


def _settings(pipeline: Pipeline, endpoints: tuple[int, int, int]) -> dict[str, Any]:
    """The part of the configuration that is not in the weights."""
    ratios = pipeline.aspect_ratios
    settings = {
        "endpoints": endpoints,
        "act_type": "swish",  # _check_pipeline saw to it; the API has no residual heads, and pools last
        "fpn_weight_method": "sum" if pipeline.combine_method == "sum" else "fastattn",
        "survival_prob": None,
        "conv_after_downsample": False,
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
    for place in (folder, folder.parent):  # a file further up would not be this model's
        if (place / PIPELINE).is_file():
            return place / PIPELINE
    raise CheckpointError(
        f"{source} is an Object Detection API checkpoint, and the box coding, the anchors and the background "
        f"class are only in its {PIPELINE}; put that file, which comes with the model, beside "
        f"{neighbour} (unpack an archive for that)"
    )


def _check_pipeline(pipeline: Pipeline, layout: Layout, variables: Mapping[str, Variable]) -> None:
    """Raise CheckpointError if the pipeline is not this model's, or does not fit AutoML's network."""
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
            f"{pipeline.path} does not belong to the checkpoint, or describes a network different from "
            f"AutoML's: see its {', '.join(wrong)}"
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
    """The last layer of each head, with AutoML's order of channels and without box scales."""
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
    """Notes about the settings that come from the pipeline."""
    yield f"image size, anchors and the blocks of P3, P4 and P5 are from {pipeline.path}"
    yield f"class and box channels were reordered to AutoML's anchors, as described in {pipeline.path}"
    if set(pipeline.box_scales) != {1.0}:
        scales = ", ".join(f"{scale:g}" for scale in pipeline.box_scales)
        yield f"box_net/box-predict was divided by the box coder's scales {scales}"
    if pipeline.add_background_class:
        yield "the background class was left out of class_net/class-predict"
