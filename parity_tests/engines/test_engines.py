"""Every engine computes the function of the eager model."""

from __future__ import annotations

import copy
import importlib.util
import sys
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from parity_tests.engines.models import FAST, installed, network
from parity_tests.helpers.configs import configs
from parity_tests.helpers.small_models import small
from porting.parity.engines.proof import EngineComparison
from porting.parity.inputs import seeded_images
from pytorch_model.config import MODELS, EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import ENGINES, compiled, onnx_runtime, open_vino
from pytorch_model.engines.choose import EngineOf, chosen_engine, make_engine
from pytorch_model.errors import ConfigError, WeightsError

#: Another order of summation changes the rounding error by a factor; a wrong layer is off by percents.
TIMES, EPSILON = 3.0, 1e-6
#: The folded network in float64: only the order of the arithmetic differs.
FLOAT64 = 1e-12


def images(config: EfficientDetConfig, count: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))


def error(found: tuple[Sequence[Tensor], Sequence[Tensor]], model: EfficientDet, x: Tensor) -> float:
    """The largest relative L2 of a head output to the eager model in float64."""
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
    pairs = zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def check_rounding(found: tuple[Sequence[Tensor], Sequence[Tensor]], model: EfficientDet, x: Tensor) -> float:
    """The error of ``found`` to float64, at most :data:`TIMES` that of the eager model."""
    with torch.no_grad():
        own = error(model(x.to(next(model.parameters()).dtype)), model, x)
    measured = error(found, model, x)
    assert measured <= TIMES * own + EPSILON, (measured, own)
    return measured


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("model", MODELS)
def test_every_engine_on_every_model(name: str, model: str) -> None:
    side = 256 if model == "efficientdet-d7x" else 128
    net = network(model_config(model))
    comparison = EngineComparison(net, seeded_images(net.config, (side, side)))
    comparison.run(installed(name))
    (result,) = comparison.results({})
    worst, found = result.worst, result.detections
    print(f"{model} {name}: {worst.eager.relative:.1e} to eager in {worst.tap}, {found}")
    assert len(result.outputs) == 2 * len(net.config.levels)
    assert result.passed


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("size", [(128, 96), (161, 130)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_sizes_and_batches(name: str, size: tuple[int, int], count: int) -> None:
    net = network(small())
    x = images(net.config, count, size)
    check_rounding(make_engine(installed(name), net, size)(x), net, x)


@settings(deadline=None, max_examples=12)
@given(configs())
def test_any_configuration_folded_in_float64(config: EfficientDetConfig) -> None:
    net = network(config).double()
    x = images(config, 2, config.image_size).double()
    assert error(make_engine("folded", net, config.image_size)(x), net, x) < FLOAT64


@settings(deadline=None, max_examples=6)
@given(configs())
def test_any_configuration_in_onnx_runtime(config: EfficientDetConfig) -> None:
    net = network(config)
    x = images(config, 2, config.image_size)
    check_rounding(make_engine(installed("onnxruntime"), net, config.image_size)(x), net, x)


def test_a_large_map_is_averaged_without_losing_digits() -> None:
    """Squeeze-and-excitation of a map of 160,000 pixels far from zero, which a plain sum blurs."""
    config = small(image_size=(800, 800))
    net = network(config)
    with torch.no_grad():
        net.backbone.stem.bn.bias.add_(100)
    x = images(config, 1, config.image_size)
    check_rounding(make_engine(installed("onnxruntime"), net, config.image_size)(x), net, x)


def test_the_model_stays_as_it_is() -> None:
    net = network(small())
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    x = images(net.config, 2, (128, 96))
    kept = x.clone()
    for name in FAST:
        if not ENGINES[name].missing:
            make_engine(name, net, (128, 96))(x)
    assert torch.equal(x, kept)
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())


@pytest.mark.parametrize("name", ["folded", "onnxruntime", "auto"])
def test_a_model_that_changes_gets_a_new_engine(name: str) -> None:
    if name in ENGINES:
        installed(name)
    net, other = network(small()), network(small(act_type="relu"))
    x = images(net.config, 1, (128, 96))
    engine = EngineOf(name, net, (128, 96))
    check_rounding(engine(x), net, x)
    first = engine.current()
    assert engine.current() is first
    with torch.no_grad():
        net.box_net.predict.pointwise.weight *= 2
    check_rounding(engine(x), net, x)
    assert engine.current() is not first
    scaled = {key: tensor * 1.5 if "predict" in key else tensor for key, tensor in other.state_dict().items()}
    net.load_state_dict(scaled)
    check_rounding(engine(x), net, x)


def test_images_of_another_size_go_to_the_model() -> None:
    net = network(small())
    x = images(net.config, 1, (96, 128))
    found = EngineOf("folded", net, (128, 96))(x)
    with torch.no_grad():
        expected = net(x)
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


def test_several_threads_use_one_engine() -> None:
    net = network(small())
    engine = EngineOf("auto", net, (128, 96))
    inputs = [images(net.config, count, (128, 96)) for count in (1, 2, 3, 4)]
    found: dict[int, Any] = {}

    def run(index: int) -> None:
        found[index] = engine(inputs[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(inputs):
        check_rounding(found[index], net, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["folded", "onnxruntime"])
def test_other_precisions(name: str, dtype: torch.dtype) -> None:
    """ONNX Runtime computes in float32; the folded network in the model's own type."""
    net = network(small()).to(dtype)
    x = images(net.config, 2, (128, 96))
    found = make_engine(installed(name), net, (128, 96))(x)
    assert {level.dtype for level in found[0]} == {dtype if name == "folded" else torch.float32}
    if name == "folded":  # some processors add up in the low precision
        check_rounding(found, net, x)
    else:
        assert error(found, net, x) < 1e-5


def test_auto_takes_the_fastest_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    everything = importlib.util.find_spec("torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: everything)
    assert chosen_engine("auto", cpu) == "onnxruntime"
    assert chosen_engine("auto", torch.device("cuda")) == "folded"
    assert chosen_engine("auto", cpu, torch.float64) == "folded"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen_engine("auto", cpu) == "folded"


def test_auto_leaves_a_model_of_another_class_alone() -> None:
    class Mine(EfficientDet):
        def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
            return [images], [images]

    model = Mine(small())
    engine = EngineOf("auto", model, (128, 96))
    assert engine.name == "eager"
    x = images(model.config, 1, (128, 96))
    assert engine(x)[0][0] is x


@pytest.mark.parametrize("name", FAST)
def test_weights_that_are_not_finite_are_refused(name: str) -> None:
    """Some operations of other engines would turn NaN into a number."""
    net = network(small(act_type="relu6"))
    with torch.no_grad():
        net.bifpn.cells[0].nodes[0].bn.weight[0] = torch.nan  # type: ignore[index, union-attr]
    if name == "eager":
        found = make_engine(name, net, (128, 96))(images(net.config, 1, (128, 96)))
        assert any(bool(level.isnan().any()) for level in found[0])
        return
    with pytest.raises(WeightsError, match="is not finite"):
        make_engine(installed(name), net, (128, 96))


def test_an_image_that_would_have_to_shrink_and_grow() -> None:
    with pytest.raises(ConfigError, match="one side would grow"):
        make_engine("folded", network(small()), (128, 8))


def test_unknown_and_missing_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="the engine is 'turbo', must be one of auto, eager, folded"):
        chosen_engine("turbo", cpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"openvino needs onnx, openvino: pip install .*\[openvino\]"):
        chosen_engine("openvino", cpu)


def test_devices_that_an_engine_cannot_use() -> None:
    with torch.device("meta"):
        model = EfficientDet(small())
    installed("onnxruntime")
    with pytest.raises(ConfigError, match="onnxruntime cannot compute on meta: this onnxruntime has"):
        onnx_runtime.make(model, (128, 96))


@pytest.mark.parametrize(
    ("message", "expected"),
    [("Failed to allocate memory for requested buffer", MemoryError), ("a bad node\nmore", ConfigError)],
)
def test_errors_of_onnx_runtime_are_told(message: str, expected: type[Exception]) -> None:
    installed("onnxruntime")
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    with pytest.raises(expected) as caught, onnx_runtime._told():
        raise RuntimeException(message)
    assert "\n" not in str(caught.value)
    with pytest.raises(ZeroDivisionError), onnx_runtime._told():
        raise ZeroDivisionError


def test_openvino_computes_on_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", sys)  # it is not used before the device is checked
    with torch.device("meta"):
        model = EfficientDet(small())
    with pytest.raises(ConfigError, match="openvino computes on the CPU, and the model is on meta"):
        open_vino.make(model, (128, 96))


def test_a_machine_that_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Any:
        def run(x: Tensor) -> Any:
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nmore")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    net = network(small())
    with pytest.raises(ConfigError, match="compile cannot compile here: no C\\+\\+ compiler; take another"):
        compiled.make(net, (128, 96))(images(net.config, 1, (128, 96)))


@pytest.mark.slow
def test_compile() -> None:
    net = network(small(fpn_cell_repeats=1, box_class_repeats=1))
    x = images(net.config, 1, (128, 96))
    try:
        found = compiled.make(net, (128, 96))(x)
    except ConfigError as reason:
        pytest.skip(str(reason))
    check_rounding(found, net, x)
