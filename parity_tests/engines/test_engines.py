"""Every engine computes the function of the eager model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from parity_tests.helpers.configs import configs
from parity_tests.helpers.small_models import small
from porting.convert import apply_rules
from porting.rules import rules
from porting.synthetic import synthetic_variables
from pytorch_model.config import MODELS, EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import ENGINES
from pytorch_model.engines.choose import make_engine

#: The bound of float32, relative L2 of head outputs. Seeded weights measure below 1e-6.
FLOAT32 = 1e-5
#: The folded network in float64: only the order of the arithmetic differs.
FLOAT64 = 1e-12

#: `compile` needs a compiler and minutes; test_compile has it.
FAST = [name for name in ENGINES if name != "compile"]


def network(config: EfficientDetConfig) -> EfficientDet:
    """With seeded weights, whose activations are of order 1 on every level."""
    variables = synthetic_variables(config)
    state_dict = apply_rules(rules(config), variables)
    return EfficientDet.from_state_dict(state_dict, config).requires_grad_(False)


def images(config: EfficientDetConfig, count: int, size: tuple[int, int]) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count))


def error(found: tuple[Sequence[Tensor], Sequence[Tensor]], model: EfficientDet, x: Tensor) -> float:
    """The largest relative L2 of a head output to the eager model in float64."""
    import copy

    with torch.no_grad():
        expected = copy.deepcopy(model).double()(x.double())
    pairs = zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def installed(name: str) -> str:
    for package in ENGINES[name].packages:
        pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[{ENGINES[name].extra}]'")
    return name


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("model", MODELS)
def test_every_engine_on_every_model(name: str, model: str) -> None:
    side = 256 if model == "efficientdet-d7x" else 128
    net = network(model_config(model))
    x = images(net.config, 1, (side, side))
    found = error(make_engine(installed(name), net, (side, side))(x), net, x)
    print(f"{model} {name}: {found:.1e}")
    assert found < FLOAT32


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("size", [(128, 96), (161, 130)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_sizes_and_batches(name: str, size: tuple[int, int], count: int) -> None:
    net = network(small())
    x = images(net.config, count, size)
    assert error(make_engine(installed(name), net, size)(x), net, x) < FLOAT32


@settings(deadline=None, max_examples=40)
@given(configs())
def test_any_configuration_folded_in_float64(config: EfficientDetConfig) -> None:
    net = network(config).double()
    x = images(config, 2, config.image_size).double()
    assert error(make_engine("folded", net, config.image_size)(x), net, x) < FLOAT64


@settings(deadline=None, max_examples=20)
@given(configs())
def test_any_configuration_in_onnx_runtime(config: EfficientDetConfig) -> None:
    net = network(config)
    x = images(config, 2, config.image_size)
    assert error(make_engine(installed("onnxruntime"), net, config.image_size)(x), net, x) < FLOAT32
