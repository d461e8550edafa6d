"""Fresh weights against AutoML's: every kind of variable, and the class predictor for other classes."""

from __future__ import annotations

import json
import math
from functools import cache

import numpy as np
import pytest
import torch

from parity_tests.helpers.recordings import golden_recording, normalise
from parity_tests.training.recorded import OWN, read
from porting.convert import apply_rules
from porting.rules import rules
from porting.transforms import FOLD_BIAS_INTO_MEAN
from pytorch_model.anchors import generate_anchors
from pytorch_model.bifpn import Fuse
from pytorch_model.config import model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.training.initial import CLASS_PREDICTORS, fresh_class_predictor, initialise
from pytorch_model.training.losses import LossSettings, detection_loss
from pytorch_model.training.targets import label_anchors

KERNELS = json.loads((OWN / "fresh_kernels.json").read_text())


@cache
def fresh() -> EfficientDet:
    model = EfficientDet(model_config("efficientdet-d0"))
    initialise(model, torch.Generator().manual_seed(0))
    return model


def kernels() -> dict[str, np.ndarray]:
    """By AutoML's names, float64."""
    parameters = dict(fresh().named_parameters())
    found = {}
    for rule in rules(fresh().config):
        if rule.sources and rule.sources[0].endswith("kernel"):
            array = parameters[rule.target].detach().double().numpy()
            (found[rule.sources[0]],) = rule.transform.inverse(array, 1)
    return found


def test_every_kernel_is_drawn_as_googles() -> None:
    """Both are samples: n values give the deviation to about 1/√n, and less for a bounded distribution."""
    ours = kernels()
    assert ours.keys() == KERNELS.keys()
    for name, (shape, deviation, least, most) in KERNELS.items():
        array = ours[name]
        assert list(array.shape) == shape
        assert array.std() == pytest.approx(deviation, rel=5 / math.sqrt(array.size)), name
        assert abs(array.mean()) <= 5 * deviation / math.sqrt(array.size), name
        if name.startswith("efficientnet"):  # normal, so without bounds
            assert array.size < 5000 or np.abs(array).max() > 3 * deviation, name
        elif array.size > 500:  # both samples nearly reach the bounds, which differ by the distribution
            assert array.min() == pytest.approx(least, rel=0.06), name
            assert array.max() == pytest.approx(most, rel=0.06), name


def test_a_depthwise_kernel_of_a_head_counts_all_channels() -> None:
    """effdet counts 9 connections where AutoML counts 9 · 64: its kernels are 8 times as wide."""
    depthwise = kernels()["class_net/class-0/depthwise_kernel"]
    assert depthwise.std() == pytest.approx(math.sqrt(1 / (9 * 64)), rel=0.1)
    assert np.abs(depthwise).max() <= 2 * math.sqrt(1 / (9 * 64)) / 0.8796


def test_everything_else_is_constant() -> None:
    for name, module in fresh().named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            constants = {
                "weight": 1,
                "bias": 0,
                "running_mean": 0,
                "running_var": 1,
                "num_batches_tracked": 0,
            }
            assert all(bool((module.state_dict()[key] == value).all()) for key, value in constants.items())
        elif isinstance(module, Fuse):
            assert module.weights is not None
            assert bool((module.weights == 1).all())
        elif isinstance(module, torch.nn.Conv2d) and module.bias is not None:
            expected = -4.59511995 if name == "class_net.predict.pointwise" else 0.0
            assert bool((module.bias == torch.tensor(expected)).all()), name


def test_the_generator_decides() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        model = EfficientDet(model_config("efficientdet-lite0", num_classes=3))
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(7)  # nothing of what was there stays
        initialise(model, torch.Generator().manual_seed(seed))
        return model.state_dict()

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(tensor, again[key]) for key, tensor in first.items())
    assert not any(torch.equal(first[key], other[key]) for key in first if first[key].dim() == 4)
    assert not any(bool((tensor == 7).any()) for tensor in first.values())


# --- another number of classes ---------------------------------------------------------------------------


def class_loss(model: EfficientDet) -> float:
    """On seeded pictures with one box each, batch norms in training."""
    pictures = read("golden", "pictures").arrays["pictures"]
    images = torch.from_numpy(normalise(pictures, model.config)).permute(0, 3, 1, 2)
    anchors = generate_anchors(model.config, (160, 160))
    targets = label_anchors(
        anchors, torch.tensor([[[20.0, 30, 90, 120]]]).expand(3, -1, -1), torch.ones(3, 1)
    )
    with torch.no_grad():
        outputs = model.train()(images)
    normaliser = float(targets.positives.sum()) + 1
    loss = detection_loss(outputs[0], outputs[1], targets, normaliser, LossSettings(), anchors)
    return loss.classes.item()


def test_a_small_class_predictor_starts_near_its_bias() -> None:
    """The depthwise kernel is scaled up: seeded features are smaller than those of trained weights."""
    recording = golden_recording("efficientdet-d0")
    weights = apply_rules(rules(recording.config), recording.variables())
    weights["class_net.predict.depthwise.weight"] *= 8
    losses = {}
    for how in (*CLASS_PREDICTORS, "zero"):
        model = EfficientDet.from_state_dict(weights, recording.config, num_classes=3)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        fresh_class_predictor(model, "small" if how == "zero" else how, torch.Generator().manual_seed(0))
        predictor = model.class_net.predict.pointwise
        changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
        assert changed == {"class_net.predict.pointwise.weight"}
        assert predictor.bias is not None
        assert bool((predictor.bias == torch.tensor(-4.59511995)).all())
        if how == "automl":
            assert float(predictor.weight.detach().std()) == pytest.approx(0.125, rel=0.05)
        if how == "zero":
            torch.nn.init.zeros_(predictor.weight)
        losses[how] = class_loss(model)
    print(losses)
    assert losses["small"] == pytest.approx(losses["zero"], rel=0.05)
    assert losses["automl"] > 1.5 * losses["zero"]


def test_folded_biases_are_in_no_fresh_mean() -> None:
    """AutoML's biases start at 0, so a mean of 0 stands for both."""
    folded = [rule.target for rule in rules(fresh().config) if rule.transform is FOLD_BIAS_INTO_MEAN]
    assert folded
    assert not any(bool(fresh().state_dict()[target].any()) for target in folded)
