"""Every layer of the ONNX graph, computed by ONNX Runtime, equals PyTorch's and Google's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from parity_tests.helpers.recordings import golden_recording, images_of, tap_of, weights_of
from porting.export import TARGETS, network
from porting.parity.lockstep import tapped
from porting.rules import TapPair, taps
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")


def activations(model: EfficientDet, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every tapped activation by its tap, NCHW."""
    found: dict[str, torch.Tensor] = {}

    def visit(pair: TapPair, activation: torch.Tensor) -> torch.Tensor:
        found[pair.tap] = activation.clone()
        return activation

    with tapped(model, visit), torch.no_grad():
        model(images)
    return found


def value_of(module: str, config: EfficientDetConfig) -> str:
    """The name in the graph of a module's output. A convolution and its batch norm are one node."""
    kind = module.rpartition(".")[2]
    if kind in ("stem", "expand", "depthwise"):
        return f"{module}.bn.act"
    if kind == "project":
        return f"{module}.bn"
    if module.startswith("backbone.blocks.") and kind.isdecimal():
        block = config.backbone.blocks[int(kind)]
        return f"{module}.project.bn" + (".add" if block.has_residual else "")
    return f"{module}.bn" if ".nodes." in module and kind.isdecimal() else module


@pytest.mark.slow
def test_every_layer_in_onnx_runtime(tmp_path: Path) -> None:
    """The graph of D0 with its inner activations as additional outputs, against float64 in PyTorch.

    What Google recorded too is held to its own rounding, the rest to that of PyTorch's float32.
    """
    recording = golden_recording("efficientdet-d0")
    config, images = recording.config, images_of(recording)
    TARGETS["onnx"].write(weights_of(recording), tmp_path / "network.onnx")
    graph = onnx.load(tmp_path / "network.onnx")
    named = {name for node in graph.graph.node for name in node.output}
    outputs = {output.name for output in graph.graph.output}
    layers = {pair: value_of(pair.module, config) for pair in taps(config) if pair.output is None}
    layers = {pair: value for pair, value in layers.items() if value in named}
    more = [onnx.helper.make_empty_tensor_value_info(value) for value in {*layers.values()} - outputs]
    graph.graph.output.extend(more)
    onnx.save_model(graph, tmp_path / "taps.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "taps.onnx", providers=["CPUExecutionProvider"])
    values = [output.name for output in session.get_outputs()]
    found = dict(zip(values, session.run(None, {"images": images.float().numpy()}), strict=True))
    single = activations(network.loaded(weights_of(recording)), images.float())
    double = EfficientDet(config).double().eval()
    double.load_state_dict(dict(weights_of(recording, "float64").state_dict))
    exact = activations(double, images.double())
    google = {tap_of(key, config): error for key, error in recording.google_error.items()}
    worst = 0.0
    for pair, value in layers.items():
        error = network.relative_l2(torch.from_numpy(found[value]), exact[pair.tap])
        own = network.relative_l2(single[pair.tap], exact[pair.tap])
        bound = 3 * google.get(pair.tap, own) + 1e-6
        assert error <= bound, f"{value}: relative L2 {error:.2e}, allowed {bound:.2e}"
        worst = max(worst, error / bound)
    print(f"{len(layers)} activations: at most {worst:.2f} of what is allowed")
    assert len(layers) == 163
