"""ONNX: the network and AutoML's postprocessing behind it, images → detections.

The suppression is gaussian and per class, as AutoML evaluates, unrolled over its output slots; ONNX's own
operator for it knows the hard kind alone.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from porting.errors import CheckFailedError
from porting.export import Weights, Written
from porting.export.network import FLOAT32_EPSILON, ROUNDING, DetectingNetwork, example_images, loaded
from porting.export.onnx_file import check_onnx, export_onnx, run_onnx
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.files import replacing

OUTPUTS = ("boxes_yxyx", "scores", "classes", "valid_len")


def write(weights: Weights, out: Path, nms: NMSConfig | None = None) -> Written:
    """Write ``out`` (``.onnx``); its scores are compared with PyTorch's for 1 and 3 images."""
    check_onnx(out)
    nms = nms or NMSConfig()
    detector = DetectingNetwork(loaded(weights), nms).eval()
    about = {**weights.metadata, "model": weights.config.name}
    with replacing(out) as temporary:
        export_onnx(detector, _inputs(weights, 2), OUTPUTS, temporary, about)
        worst = 0.0
        for count in (1, 3):
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
    """The largest difference of scores; boxes and classes of nearly equal scores may trade places.

    Raises CheckFailedError where it exceeds what rounding explains, as :class:`Comparison` does for outputs.
    """
    with torch.no_grad():
        _, single, *_ = detector(*inputs.values())
        _, double, *_ = copy.deepcopy(detector).double()(*(tensor.double() for tensor in inputs.values()))
    error, own = (float((scores - double).abs().max()) for scores in (found[1], single))
    if not error <= ROUNDING * own + FLOAT32_EPSILON:
        raise CheckFailedError(
            f"the exported program's scores are off by {error:.1e}, PyTorch's float32 by {own:.1e}; nothing "
            "was written, try another version of torch or onnx"
        )
    return error
