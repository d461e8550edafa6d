"""Stochastic depth: the operation, who survives how often, and whole networks for given draws."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from parity_tests.helpers.small_models import SHALLOW, tiny
from parity_tests.training.recorded import DROPPED, DroppedNetwork, dropped_network, read
from porting.convert import apply_rules
from porting.rules import rules
from pytorch_model.config import BackboneConfig, EfficientDetConfig, backbone_config, model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.layers import drop_connect

EXACT = 1e-10  # relative L2 between float64 networks
CANCELLED = 1e-14  # of the largest gradient: what rounding leaves of gradients that cancel by construction

TABLE = read("golden", "drop_connect_op").about


@pytest.mark.parametrize("survival_prob", [0.8, 0.9875, 0.5])
def test_the_operation_is_googles(survival_prob: float) -> None:
    recorded = read("golden", "drop_connect_op")
    key = f"op/{survival_prob}"
    x = torch.from_numpy(recorded.arrays["op/input"]).permute(0, 3, 1, 2)
    found = drop_connect(x, survival_prob, torch.tensor(TABLE[key]["draws"]))
    assert torch.equal(found.permute(0, 2, 3, 1), torch.from_numpy(recorded.arrays[f"{key}/output"]))
    assert (found != 0).flatten(1).any(dim=1).tolist() == TABLE[key]["kept"]


def test_thirteen_backbones_are_recorded() -> None:
    assert len(TABLE["backbones"]) == 13


@pytest.mark.parametrize("name", TABLE["backbones"])
def test_every_block_survives_as_often_as_googles(name: str) -> None:
    recorded, config = TABLE["backbones"][name], backbone_config(name)
    found = config.survival_probs or (None,) * len(config.blocks)
    assert list(found) == [row["survival_prob"] for row in recorded["rows"]]
    model = model_config("efficientdet-d0", backbone=config)
    with torch.device("meta"):
        network = EfficientDet(model)
    applies = [block.survival_prob is not None for block in network.backbone.blocks]
    assert applies == [row["drop_connect_applies"] for row in recorded["rows"]]
    assert network.draw_counts == (sum(applies), 0, 0)


def test_a_backbone_that_automl_does_not_know_keeps_every_block() -> None:
    assert BackboneConfig("mine", 8, SHALLOW).survival_probs is None


def trained(recorded: DroppedNetwork) -> EfficientDet:
    model = EfficientDet(recorded.config).double().train()
    model.load_state_dict(apply_rules(rules(recorded.config), recorded.variables, "float64"))
    return model


def nhwc(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("name", DROPPED)
@pytest.mark.parametrize("source", ["golden", pytest.param("shared", marks=pytest.mark.slow)])
def test_networks_in_training_are_googles(source: str, name: str) -> None:
    recorded = dropped_network(source, name)
    model = trained(recorded)
    images = torch.from_numpy(recorded.images).double().permute(0, 3, 1, 2)
    assert sum(model.draw_counts) == len(recorded.draws)
    outputs = model(images, recorded.draws)
    for kind, levels in zip(("class", "box"), outputs, strict=True):
        for level, found in zip(recorded.config.levels, levels, strict=True):
            sample = recorded.outputs[f"{kind}_outputs/{level}"]
            error = np.linalg.norm(sample.of(nhwc(found)) - sample.values)
            assert error <= EXACT * np.linalg.norm(sample.values), (kind, level)
    loss = torch.stack([y.square().sum() for kind in outputs for y in kind]).sum()
    assert loss.item() == pytest.approx(recorded.loss, rel=EXACT)
    loss.backward()  # type: ignore[no-untyped-call]
    check_gradients(model, recorded)


def check_gradients(model: EfficientDet, recorded: DroppedNetwork) -> None:
    """By their sum, L2 and largest magnitude; every parameter has a recorded gradient."""
    parameters = dict(model.named_parameters())
    largest = max(l2 for _, l2, _ in recorded.gradients.values())
    compared = 0
    for rule in rules(recorded.config):
        if rule.target not in parameters:
            continue
        gradient = parameters[rule.target].grad
        assert gradient is not None
        arrays = rule.transform.inverse(gradient.numpy(), len(rule.sources))
        for name, array in zip(rule.sources, arrays, strict=True):
            total, l2, peak = recorded.gradients[name]
            allowed = EXACT * l2 + CANCELLED * largest
            assert abs(np.linalg.norm(array) - l2) <= allowed, name
            assert abs(np.abs(array).max() - peak) <= allowed, name
            assert abs(array.sum() - total) <= allowed * np.sqrt(array.size), name
            compared += 1
    biases = {name for name in recorded.gradients if name.endswith("/bias")}
    kept = {rule.sources[0] for rule in rules(recorded.config) if rule.sources} & biases
    assert compared == len(recorded.gradients) - len(biases - kept)


@pytest.mark.parametrize("fault", ["order", "none", "probability"])
def test_a_fault_is_found(fault: str) -> None:
    recorded = dropped_network("golden", DROPPED[1])
    model, draws = trained(recorded), recorded.draws
    if fault == "order":
        draws = draws.flip(0)
    elif fault == "probability":
        model.class_net.survival_prob = 0.8000001
    images = torch.from_numpy(recorded.images).double().permute(0, 3, 1, 2)
    with torch.no_grad():
        classes, _ = model(images, None if fault == "none" else draws)
    sample = recorded.outputs["class_outputs/3"]
    error = np.linalg.norm(sample.of(nhwc(classes[0])) - sample.values)
    assert error > 100 * EXACT * np.linalg.norm(sample.values)


# --- draws ----------------------------------------------------------------------------------------------


def dropping() -> EfficientDetConfig:
    """Blocks with a residual in a backbone that AutoML drops, and heads of two repeats."""
    stages = tuple(dataclasses.replace(stage, repeats=2) for stage in SHALLOW)
    backbone = BackboneConfig("efficientnet-lite0", 8, stages, se_ratio=0.0)
    return tiny(backbone=backbone, survival_prob=0.5, box_class_repeats=2)


def test_draws_come_from_the_generator() -> None:
    model = EfficientDet(dropping())
    draws = model.draw(1000, torch.Generator().manual_seed(1))
    assert model.draw_counts == (8, 5, 5)  # a first block with a residual survives always, but draws
    assert draws.shape == (18, 1000)
    assert draws.dtype == torch.float32
    assert 0 <= float(draws.min()) < 0.01
    assert 0.99 < float(draws.max()) < 1
    assert torch.equal(draws, model.draw(1000, torch.Generator().manual_seed(1)))
    assert not torch.equal(draws, model.draw(1000, torch.Generator().manual_seed(2)))


def test_without_draws_training_leaves_nothing_out() -> None:
    """As before there was stochastic depth; a draw of almost 1 keeps every block but scales it."""
    model = EfficientDet(dropping()).train()
    images = torch.randn(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, again = model(images), model(images)
        dropped = model(images, model.draw(4, torch.Generator().manual_seed(0)))
    assert all(torch.equal(a, b) for a, b in zip(plain[0] + plain[1], again[0] + again[1], strict=True))
    assert not torch.equal(plain[0][0], dropped[0][0])


def test_evaluation_and_the_state_dict_know_nothing_of_it() -> None:
    config = dropping()
    plain = config.replace(backbone=dataclasses.replace(config.backbone, name="mine"))
    dropped, other = EfficientDet(config), EfficientDet(plain)
    assert list(dropped.state_dict()) == list(other.state_dict())
    other.load_state_dict(dropped.state_dict())
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = dropped.eval()(images), other.eval()(images)
    assert all(torch.equal(x, y) for x, y in zip(a[0] + a[1], b[0] + b[1], strict=True))


def test_a_network_without_it_takes_no_draws() -> None:
    model = EfficientDet(tiny(box_class_repeats=2))
    draws = model.draw(2)
    assert draws.shape == (0, 2)
    images = torch.zeros(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(images, draws)[0][0], model(images)[0][0])
