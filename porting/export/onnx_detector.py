"""ONNX: the network followed by AutoML's postprocessing, images → detections.

The suppression is Gaussian and per class, as in AutoML's evaluation, and unrolled over its output slots.
ONNX's own operator only does hard suppression.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from porting.export import Weights, Written
from porting.export.network import COUNTS, DetectingNetwork, example_images, loaded, require_rounding
from porting.export.onnx_file import about, check_onnx, export_onnx, run_onnx
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.files import replacing

OUTPUTS = ("boxes_yxyx", "scores", "classes", "valid_len")


def write(weights: Weights, out: Path, nms: NMSConfig | None = None) -> Written:
    """Write ``out`` (``.onnx``) and compare its scores with PyTorch's, for 1 and 3 images."""
    check_onnx(out)
    nms = nms or NMSConfig()
    detector = DetectingNetwork(loaded(weights), nms).eval()
    with replacing(out) as temporary:
        export_onnx(detector, _inputs(weights, 2), OUTPUTS, temporary, about(weights))
        worst = 0.0
        for count in COUNTS:
            inputs = _inputs(weights, count)
            worst = max(worst, _check(detector, inputs, run_onnx(temporary, inputs)))
    height, width = weights.config.image_size
    return Written(
        (out,),
        (
            f"images float32 [batch, 3, {height}, {width}], normalised, and image_scales float32 [batch] → "
            f"{', '.join(OUTPUTS)}",
            f"{nms.method} suppression per class, {nms.max_output_size} detections an image",
            f"run by ONNX Runtime, 1 and 3 images: scores within {worst:.1e} of float64's",
        ),
    )


def _inputs(weights: Weights, count: int) -> dict[str, Tensor]:
    scales = torch.linspace(1, 2, count)
    return {"images": example_images(weights.config, count), "image_scales": scales}


def _check(detector: DetectingNetwork, inputs: dict[str, Tensor], found: list[Tensor]) -> float:
    """The largest difference of scores. Boxes and classes whose scores are nearly equal may change places.

    Raises :class:`CheckFailedError` if it is more than rounding explains.
    """
    with torch.no_grad():
        _, single, *_ = detector(*inputs.values())
        _, double, *_ = copy.deepcopy(detector).double()(*(tensor.double() for tensor in inputs.values()))
    error, own = (float((scores - double).abs().max()) for scores in (found[1], single))
    require_rounding(f"scores are off by {error:.1e}", error, own)
    return error
