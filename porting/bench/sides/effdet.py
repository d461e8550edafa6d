"""The package effdet with our weights: eager, compiled, through ONNX Runtime; and its postprocessing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from porting.bench.sides import Runner, Setup
from porting.bench.sides.engine import head_arrays, on_device
from porting.bench.sides.torchvision import stand_in_for_torchvision
from porting.export import Weights
from porting.export.effdet import effdet_recipe, effdet_state_dict
from porting.export.network import head_names
from porting.export.onnx_file import traced_graph

stand_in_for_torchvision()

import effdet  # noqa: E402


def make(setup: Setup) -> Runner:
    """effdet in the way ``setup.variant``. Raises :class:`ConversionError` for a model that effdet lacks."""
    return _WAYS[setup.variant](setup)


def _model(setup: Setup) -> Any:
    weights = setup.weights
    config = weights.config.replace(image_size=setup.image_size)
    names: dict[str, Any] = {"effdet": effdet}
    exec("\n".join(effdet_recipe(config, Path())[:-1]), names)  # all but the line that loads a file
    model = names["model"]
    model.load_state_dict(effdet_state_dict(Weights(weights.state_dict, config)))
    return model.requires_grad_(False).to(setup.device)


def _nchw(setup: Setup) -> Runner:
    model = _model(setup)
    return Runner(lambda images: on_device(images, setup.device), _no_grad(model), head_arrays)


def _nhwc(setup: Setup) -> Runner:
    model = _model(setup).to(memory_format=torch.channels_last)
    return Runner(lambda images: _channels_last(images, setup), _no_grad(model), head_arrays)


def _compiled(setup: Setup) -> Runner:
    from torch._inductor import config as inductor

    model = _model(setup).to(memory_format=torch.channels_last)
    on_gpu = setup.device.type == "cuda"
    compiled: Any = torch.compile(model, mode="reduce-overhead" if on_gpu else None, dynamic=False)

    def run(images: Tensor) -> Any:
        with torch.no_grad(), inductor.patch(freezing=True):
            return compiled(images)

    return Runner(lambda images: _channels_last(images, setup), run, head_arrays)


def _onnx_runtime(setup: Setup) -> Runner:
    import onnxruntime

    names = head_names(setup.weights.config)
    model = _model(setup).cpu()
    images = torch.zeros(2, 3, *setup.image_size)
    graph = traced_graph(model, {"images": images}, names).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setup.threads
    provider = "CUDAExecutionProvider" if setup.device.type == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(graph, options, providers=[provider])
    return Runner(
        lambda array: array,
        lambda array: session.run(None, {"images": array}),
        lambda arrays: arrays,
    )


class _Given(nn.Module):
    """Stands for a network whose outputs are known."""

    def __init__(self, outputs: Any, config: Any) -> None:
        super().__init__()
        self.outputs, self.config = outputs, config

    def forward(self, images: Tensor) -> Any:
        return self.outputs


def _postprocess(setup: Setup) -> Runner:
    """effdet's ``DetBenchPredict`` on known head outputs, with soft suppression as in AutoML's evaluation."""
    model = _model(setup)
    bench: Any = effdet.DetBenchPredict(model).to(setup.device)
    bench.soft_nms = True
    run = _no_grad(bench)

    def prepare(images: np.ndarray) -> Tensor:
        tensor = on_device(images, setup.device)
        bench.model = _Given(_no_grad(model)(tensor), model.config)
        return tensor

    return Runner(prepare, run)


def _no_grad(module: Any) -> Callable[[Any], Any]:
    def run(images: Tensor) -> Any:
        with torch.no_grad():
            return module(images)

    return run


def _channels_last(images: np.ndarray, setup: Setup) -> Tensor:
    return on_device(images, setup.device).contiguous(memory_format=torch.channels_last)


_WAYS: dict[str, Callable[[Setup], Runner]] = {
    "nchw": _nchw,
    "nhwc": _nhwc,
    "compile": _compiled,
    "onnxruntime": _onnx_runtime,
    "postprocess": _postprocess,
}
