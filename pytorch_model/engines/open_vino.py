"""OpenVINO on the CPU, through the same graph as ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines.choose import Network
from pytorch_model.engines.onnx_graph import onnx_model
from pytorch_model.engines.weights import FoldedWeights
from pytorch_model.errors import ConfigError


def make(model: EfficientDet, image_size: tuple[int, int]) -> Network:
    """A compiled model in float32 with as many threads as PyTorch has.

    Raises :class:`ConfigError` if the model is not on the CPU.
    """
    import openvino

    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ConfigError(
            f"the engine openvino computes on the CPU, and the model is on {device.type}; take another "
            "engine, or move the model"
        )
    weights = FoldedWeights(model.state_dict(), model.config.fpn_weight_method, torch.float32)
    core = openvino.Core()
    graph = core.read_model(onnx_model(model.config, weights, image_size).SerializeToString())
    compiled = core.compile_model(
        graph,
        "CPU",
        {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"},
    )
    levels = len(model.config.levels)

    def run(images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        # An own request for each call: several threads may call at once.
        found = compiled.create_infer_request().infer({"images": images.float().numpy()})
        outputs = [torch.from_numpy(found[index].copy()) for index in range(2 * levels)]
        return outputs[:levels], outputs[levels:]

    return run
