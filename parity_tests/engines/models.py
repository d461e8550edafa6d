"""What the tests of engines share: seeded networks, and which engines are here."""

from __future__ import annotations

import pytest

from porting.convert import apply_rules
from porting.rules import rules
from porting.synthetic import synthetic_variables
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import ENGINES

#: `compile` needs a compiler and minutes; test_compile has it.
FAST = [name for name in ENGINES if name != "compile"]


def network(config: EfficientDetConfig) -> EfficientDet:
    """With seeded weights, whose activations are of order 1 on every level."""
    variables = synthetic_variables(config)
    state_dict = apply_rules(rules(config), variables)
    return EfficientDet.from_state_dict(state_dict, config).requires_grad_(False)


def installed(name: str) -> str:
    for package in ENGINES[name].packages:
        pytest.importorskip(package, reason=f"needs {package}: pip install -e '.[{ENGINES[name].extra}]'")
    return name
