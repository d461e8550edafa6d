"""ONNX: the network followed by AutoML's postprocessing, images → detections.

The suppression is Gaussian and per class, as in AutoML's evaluation, and unrolled over its output slots.
AutoML's own exports suppress across classes; this file does not.
ONNX's own operator only does hard suppression. ``image_scales`` is one number per image for AutoML's way of
resizing, which scales both axes alike, and two, down and across, for any other.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from porting.errors import ConversionError
from porting.export import Weights, Written
from porting.export.network import (
    COUNTS,
    EXAMPLES,
    Postprocessing,
    example_images,
    head_names,
    head_outputs,
    loaded,
    require_rounding,
)
from porting.export.onnx_file import check_onnx, network_graph, run_onnx, save_onnx, traced_graph
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.files import replacing

if TYPE_CHECKING:
    from onnx import ModelProto

OUTPUTS = ("boxes_yxyx", "scores", "classes", "valid_len")


def write(weights: Weights, out: Path, nms: NMSConfig | None = None) -> Written:
    """Write ``out`` (``.onnx``) and compare its scores with PyTorch's, for 1 and 3 images.

    Raises :class:`ConversionError` if the size of the network's input, and so its anchors, vary.
    """
    check_onnx(out, ("onnx", "onnxscript", "onnxruntime"))
    if not weights.config.resizer.pad:
        raise ConversionError(
            "onnx-detector needs one size of the network's input, but this model's images are not padded "
            f"({weights.config.resizer}); export to onnx instead and decode the boxes yourself"
        )
    nms = nms or NMSConfig()
    network = loaded(weights)
    postprocessing = Postprocessing(weights.config, nms)
    with replacing(out) as temporary:
        save_onnx(_with_postprocessing(weights, network, postprocessing), temporary, weights)
        worst = 0.0
        for count in COUNTS:
            inputs = _inputs(weights, count)
            worst = max(worst, _check(network, postprocessing, inputs, run_onnx(temporary, inputs)))
    height, width = weights.config.input_size
    return Written(
        (out,),
        (
            f"images float32 [batch, 3, {height}, {width}], normalised, and image_scales float32 "
            f"{'[batch]' if _one_scale(weights) else '[batch, 2] (down, across)'} → {', '.join(OUTPUTS)}",
            f"{nms.method} suppression per class, {nms.max_output_size} detections an image",
            f"run by ONNX Runtime, 1 and 3 images: scores within {worst:.1e} of float64's",
        ),
    )


def _inputs(weights: Weights, count: int) -> dict[str, Tensor]:
    scales = torch.linspace(1, 2, count)
    if not _one_scale(weights):
        scales = torch.stack((scales, scales + 0.5), dim=1)
    return {"images": example_images(weights.config, count), "image_scales": scales}


def _one_scale(weights: Weights) -> bool:
    return weights.config.resizer.rule == "automl"


def _with_postprocessing(
    weights: Weights, network: EfficientDet, postprocessing: Postprocessing
) -> ModelProto:
    """The network's graph, followed by the traced postprocessing."""
    from onnx import compose

    heads = head_names(weights.config)
    inputs = _inputs(weights, EXAMPLES)
    examples = dict(zip(heads, head_outputs(network, inputs["images"]), strict=True))
    traced = traced_graph(postprocessing, {**examples, "image_scales": inputs["image_scales"]}, OUTPUTS)
    front = network_graph(weights)
    front.ir_version = traced.ir_version
    traced = compose.add_prefix(traced, "postprocessing/", rename_inputs=False, rename_outputs=False)
    merged = compose.merge_models(front, traced, io_map=[(name, name) for name in heads])
    del merged.opset_import[1:]  # both graphs' versions, which are equal
    return merged


def _check(
    network: EfficientDet, postprocessing: Postprocessing, inputs: dict[str, Tensor], found: list[Tensor]
) -> float:
    """The largest difference of scores. Boxes and classes whose scores are nearly equal may change places.

    Raises :class:`CheckFailedError` if it is more than rounding explains.
    """
    images, image_scales = inputs.values()
    _, single, *_ = postprocessing(*head_outputs(network, images), image_scales)
    exact = head_outputs(copy.deepcopy(network).double(), images.double())
    _, double, *_ = copy.deepcopy(postprocessing).double()(*exact, image_scales.double())
    error, own = (float((scores - double).abs().max()) for scores in (found[1], single))
    require_rounding(f"scores are off by {error:.1e}", error, own)
    return error
