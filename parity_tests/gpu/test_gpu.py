"""What a GPU must compute: every engine, every precision, postprocessing without a wait, the whole detector.

Every test also runs on the CPU, so that it is known to work; ``pytest -m gpu`` runs the other half.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor

from parity_tests.engines.computed import check_rounding, images, network
from pytorch_model.config import model_config
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.postprocess import postprocess_per_class
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import ENGINES
from pytorch_model.engines.choose import make_engine

SIZE = (128, 128)
#: Relative L2 of head outputs in lower precision: their epsilon, 2⁻⁸ and 2⁻¹¹, through up to 300 layers.
COARSE = {torch.bfloat16: 0.2, torch.float16: 0.03}

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_both = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """No TF32, which keeps 10 bits of a float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def model() -> EfficientDet:
    return network(model_config("efficientdet-d0", image_size=SIZE))


def engine_on(name: str, device: str) -> str:
    engine = ENGINES[name]
    if engine.missing:
        pytest.skip(f"needs {', '.join(engine.missing)}: pip install -e '.[{engine.extra}]'")
    if name == "compile" and device == "cpu":
        pytest.skip("compiling for a CPU takes minutes: test_engines.py does it")
    if device == "cuda" and name == "openvino":
        pytest.skip("OpenVINO computes on the CPU")
    if device == "cuda" and name == "onnxruntime":
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip("needs ONNX Runtime for CUDA: pip install onnxruntime-gpu")
    return name


def on_cpu(outputs: tuple[list[Tensor], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    class_outputs, box_outputs = ([x.float().cpu() for x in head] for head in outputs)
    return class_outputs, box_outputs


@on_both
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("count", [1, 3])
def test_engines_in_float32(name: str, count: int, device: str, model: EfficientDet) -> None:
    """Compared with float64 on the CPU; two calls, so that a CUDA graph is recorded and then replayed."""
    run = make_engine(engine_on(name, device), copy.deepcopy(model).to(device), SIZE)
    x = images(model.config, count, SIZE)
    run(x.to(device))
    class_outputs, box_outputs = run(x.to(device))
    assert {output.device.type for output in class_outputs} == {device}
    check_rounding(on_cpu((list(class_outputs), list(box_outputs))), model, x)


@on_both
@pytest.mark.parametrize("name", ["eager", "folded"])
@pytest.mark.parametrize("dtype", COARSE, ids=str)
def test_engines_in_lower_precision(name: str, dtype: torch.dtype, device: str, model: EfficientDet) -> None:
    run = make_engine(name, copy.deepcopy(model).to(device, dtype), SIZE)
    x = images(model.config, 2, SIZE)
    class_outputs, box_outputs = run(x.to(device))
    found = on_cpu((list(class_outputs), list(box_outputs)))
    with torch.no_grad():
        expected = model(x)
    for ours, exact in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert float((ours - exact).norm() / exact.norm()) < COARSE[dtype]


@on_both
def test_an_engine_leaves_the_outputs_of_its_last_call_alone(device: str, model: EfficientDet) -> None:
    """A CUDA graph writes to the same memory at every call."""
    name = "compile" if device == "cuda" else "folded"
    run = make_engine(name, copy.deepcopy(model).to(device), SIZE)
    x = images(model.config, 2, SIZE).to(device)
    first = run(x[:1])[0][0]
    kept = first.clone()
    run(x[1:])
    assert torch.equal(first, kept)


@on_both
@pytest.mark.parametrize("scope", ["per-class", "global"])
def test_a_detector_finds_the_same(scope: str, device: str, model: EfficientDet) -> None:
    """The whole detector on a device against the eager one on the CPU, for images of several sizes."""
    rng = np.random.default_rng(0)
    shapes = [(96, 128, 3), (128, 80, 3), (40, 40, 3)]
    several = [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    nms = NMSConfig(scope=scope, max_output_size=5)
    expected = Detector(copy.deepcopy(model), nms=nms, engine="eager")(several)
    found = Detector(copy.deepcopy(model).to(device), nms=nms, engine="folded")(several)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours["scores"].cpu(), theirs["scores"], rtol=0, atol=1e-4)
        torch.testing.assert_close(ours["boxes"].cpu(), theirs["boxes"], rtol=1e-4, atol=0.05)
        assert torch.equal(ours["labels"].cpu(), theirs["labels"])


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """In this context, whatever makes the CPU wait for the GPU raises an error."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_both
def test_nothing_waits_between_images_and_detections(device: str, model: EfficientDet) -> None:
    from pytorch_model.anchors import generate_anchors

    run = make_engine("folded", copy.deepcopy(model).to(device), SIZE)
    x = images(model.config, 2, SIZE).to(device)
    anchors_yxyx = generate_anchors(model.config, SIZE).to(device)
    scales = torch.ones(2, device=device)
    postprocess_per_class(*run(x), anchors_yxyx, NMSConfig(), scales)  # what is made once is made here
    with no_waiting(device):
        found = postprocess_per_class(*run(x), anchors_yxyx, NMSConfig(), scales)
    assert found.scores.shape == (2, 100)
