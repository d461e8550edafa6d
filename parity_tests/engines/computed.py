"""Networks, images and the measure of rounding that the tests of engines share."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from porting.convert import apply_rules
from porting.rules import rules
from porting.synthetic import synthetic_variables
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import ENGINES

#: Another order of summation changes the rounding error by a factor; a wrong layer is off by percents.
TIMES, EPSILON = 3.0, 1e-6
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


def installed(name: str) -> str:
    for package in ENGINES[name].packages:
        pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[{ENGINES[name].extra}]'")
    return name
