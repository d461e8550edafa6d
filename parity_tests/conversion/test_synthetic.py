"""Synthetic checkpoints: complete, repeatable, and healthy at every depth."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from parity_tests.helpers.recordings import normalise
from porting.convert import apply_rules
from porting.parity import tapped
from porting.rules import TapPair, rules
from porting.synthetic import synthetic_checkpoint, synthetic_image, synthetic_variables
from pytorch_model.config import MODELS, WEIGHT_METHODS, EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from tf_reference.variables import variable_shapes, variables

FAST = {"efficientdet-d0", "efficientdet-d2", "efficientdet-lite0"}


def deviations(config: EfficientDetConfig, size: int) -> dict[str, float]:
    """The standard deviation of every tapped activation."""
    model = EfficientDet(config).eval()
    model.load_state_dict(apply_rules(rules(config), synthetic_variables(config)))
    found: dict[str, float] = {}

    def visit(pair: TapPair, x: torch.Tensor) -> torch.Tensor:
        found[pair.tap] = float(x.std())
        return x

    images = torch.from_numpy(normalise(synthetic_image(size, size, seed=5)[None], config))
    with torch.no_grad(), tapped(model, visit):
        model(images.permute(0, 3, 1, 2))
    return found


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=[] if m in FAST else pytest.mark.slow) for m in MODELS]
)
def test_activations_neither_vanish_nor_explode(model: str) -> None:
    found = deviations(model_config(model), 256)
    low, high = min(found.values()), max(found.values())
    print(f"{model}: standard deviations {low:.2f} to {high:.2f} over {len(found)} taps")
    assert low > 0.05
    assert high < 30


@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_every_fusion_method_is_healthy(method: str) -> None:
    found = deviations(model_config("efficientdet-d0", fpn_weight_method=method), 256)
    assert 0.05 < min(found.values()) <= max(found.values()) < 30


def test_the_same_seed_gives_the_same_values() -> None:
    config = model_config("efficientdet-d0")
    one, two, other = (synthetic_variables(config, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["resample_p6/conv2d/kernel"], other["resample_p6/conv2d/kernel"])


def test_a_checkpoint_is_complete() -> None:
    config = model_config("efficientdet-lite0")
    content = synthetic_checkpoint(config, momentum=True)
    shapes = variable_shapes(config)
    trainable = {variable.name for variable in variables(config) if variable.trainable}
    assert content.keys() == {
        *shapes,
        *(f"{name}/ExponentialMovingAverage" for name in shapes),
        *(f"{name}/Momentum" for name in trainable),
        "global_step",
    }
    assert all(content[name].shape == shape for name, shape in shapes.items())
    assert all(content[name].min() > 0 for name in shapes if name.endswith("moving_variance"))
    assert any((content[n] != content[n + "/ExponentialMovingAverage"]).any() for n in shapes)


def test_some_fusion_weights_are_negative() -> None:
    values = synthetic_variables(model_config("efficientdet-d0"))
    fusion = [float(v) for name, v in values.items() if "/WSM" in name]
    assert min(fusion) < 0 < np.mean(fusion)


@pytest.mark.parametrize(
    ("model", "digest"), [("efficientdet-d0", "456fbfb6c95357cd"), ("efficientdet-lite0", "255bbe8aac71dc4e")]
)
def test_every_machine_gets_the_same_bytes(model: str, digest: str) -> None:
    """SHA-256 over names and values of a whole checkpoint, the same with every CPU and kernel tried."""
    found = hashlib.sha256()
    for name, value in sorted(synthetic_checkpoint(model_config(model)).items()):
        found.update(name.encode() + value.tobytes())
    assert found.hexdigest().startswith(digest)
