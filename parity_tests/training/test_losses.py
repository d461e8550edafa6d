"""Losses and their gradients against Google's, recorded, and what they do where Google's fail."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from parity_tests.helpers.small_models import one_of_each_layer
from parity_tests.helpers.training import is_decayed
from parity_tests.training.recorded import LossCase, Sample, loss_case, loss_case_names
from porting.rules import rules
from pytorch_model.anchors import generate_anchors
from pytorch_model.config import MODELS, model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.errors import ConfigError
from pytorch_model.training.losses import (
    IOU_LOSSES,
    DetectionLoss,
    LossSettings,
    average_normaliser,
    by_anchor,
    decay_loss,
    decayed,
    detection_loss,
    focal_loss,
    iou_loss,
    iou_values,
)
from pytorch_model.training.targets import BACKGROUND

CASES = [(source, name) for source in ("golden", "shared") for name in loss_case_names(source)]
EXACT = 1e-12  # float64 against float64, relative
FLOAT32_MULTIPLE, FLOAT32_RELATIVE = 3.0, 1e-6  # of Google's own float32 error; of the value


def run(case: LossCase, dtype: torch.dtype) -> tuple[DetectionLoss, list[np.ndarray]]:
    """The losses, and the gradient by every output in TensorFlow's layout."""
    classes, boxes = ([x.to(dtype).requires_grad_() for x in kind] for kind in case.outputs)
    loss = detection_loss(
        classes,
        boxes,
        case.targets,
        float(case.targets.positives.sum()) + 1,
        LossSettings(**case.settings),
        generate_anchors(case.config),
    )
    return loss, gradients(loss.total, classes + boxes)


def gradients(loss: Tensor, outputs: list[Tensor]) -> list[np.ndarray]:
    found = torch.autograd.grad(loss, outputs, materialize_grads=True)
    return [gradient.permute(0, 2, 3, 1).numpy() for gradient in found]


def named(loss: DetectionLoss) -> dict[str, float]:
    """By the names of the recordings."""
    names = ("det_loss", "cls_loss", "box_loss", "box_iou_loss")
    return dict(zip(names, (part.item() for part in loss), strict=True))


def iou_as_googles(case: LossCase, dtype: torch.dtype) -> tuple[float, list[np.ndarray]]:
    """The IoU loss with Google's order of rows: predictions level by level, anchors picture by picture.

    So a prediction is decoded with another anchor, of the same shape in other units. Its IoU is the same but
    for the rounding of anchors to float32, unless a target is exactly 0, which sets a corner to 0.
    """
    boxes = [x.to(dtype).requires_grad_() for x in case.outputs[1]]
    anchors = generate_anchors(case.config).repeat(len(boxes[0]), 1)
    rows = [by_anchor(x, 4) for x in boxes]
    targets = case.targets.boxes.split_with_sizes([x.shape[1] for x in rows], dim=1)
    flat = [torch.cat([x.reshape(-1, 4) for x in kind]) for kind in (rows, targets)]
    loss = iou_loss(flat[0], flat[1], anchors, case.settings["iou_loss_type"])
    loss = loss / (4 * (case.targets.positives.sum() + 1))
    return loss.item(), gradients(loss * case.settings.get("iou_loss_weight", 1.0), boxes)


def run_as_googles(case: LossCase, dtype: torch.dtype) -> tuple[dict[str, float], list[np.ndarray]]:
    """:func:`run` with Google's order of rows in an IoU loss."""
    if "iou_loss_type" not in case.settings:
        loss, found = run(case, dtype)
        return named(loss), found
    plain = {name: value for name, value in case.settings.items() if not name.startswith("iou")}
    loss, found = run(dataclasses.replace(case, settings=plain), dtype)
    value, by_boxes = iou_as_googles(case, dtype)
    parts = named(loss) | {"box_iou_loss": value}
    parts["det_loss"] += case.settings.get("iou_loss_weight", 1.0) * value
    levels = len(by_boxes)
    return parts, found[:levels] + [a + b for a, b in zip(found[levels:], by_boxes, strict=True)]


@pytest.mark.parametrize(("source", "name"), CASES, ids=map("-".join, CASES))
def test_float64_is_googles(source: str, name: str) -> None:
    case = loss_case(source, name)
    parts, found = run_as_googles(case, torch.float64)
    for part, value in case.losses["tf2_float64"].items():
        assert parts[part] == pytest.approx(value, rel=EXACT, abs=0), part
    assert np.isfinite(found[0]).all()
    all_close(found, case)


def all_close(found: list[np.ndarray], case: LossCase) -> None:
    for gradient, recorded in zip(found, case.gradients, strict=True):
        close_to(gradient, recorded)


def close_to(gradient: np.ndarray, recorded: Sample) -> None:
    """Where Google's gradient is a number, ours is the same."""
    known = np.isfinite(recorded.values)
    error = np.linalg.norm((recorded.of(gradient) - recorded.values)[known])
    assert error <= EXACT * np.linalg.norm(recorded.values[known])
    if np.isfinite(recorded.facts["l2"]):
        assert known.all()
        assert np.linalg.norm(gradient) == pytest.approx(recorded.facts["l2"], rel=EXACT, abs=0)


@pytest.mark.parametrize(("source", "name"), CASES, ids=map("-".join, CASES))
def test_float32_is_as_near_as_googles(source: str, name: str) -> None:
    """To the float64 values, which its own float32 misses too."""
    case = loss_case(source, name)
    parts, found = run_as_googles(case, torch.float32)
    exact = case.losses["tf2_float64"]
    for part, value in exact.items():
        theirs = [abs(case.losses[t][part] - value) for t in case.losses if part in case.losses[t]]
        allowed = FLOAT32_MULTIPLE * max(theirs) + FLOAT32_RELATIVE * abs(value)
        assert abs(parts[part] - value) <= allowed, part
    for index, (gradient, recorded) in enumerate(zip(found, case.gradients, strict=True)):
        assert gradient.dtype == np.float32
        for fact, value in (
            ("l2", float(np.linalg.norm(gradient.astype(np.float64)))),
            ("absmax", float(np.abs(gradient).max())),
        ):
            expected = recorded.facts[fact]
            if np.isfinite(expected):
                theirs = [abs(trainer[index][fact] - expected) for trainer in case.float32]
                allowed = FLOAT32_MULTIPLE * max(theirs) + FLOAT32_RELATIVE * expected
                assert abs(value - expected) <= allowed, (index, fact)


@pytest.mark.parametrize("name", [name for name in loss_case_names("golden") if name.startswith("two/iou")])
def test_the_right_anchors_give_the_same_iou(name: str) -> None:
    """So that the trainer may decode every box with its own anchor."""
    case = loss_case("golden", name)
    loss, _ = run(case, torch.float64)
    assert loss.box_iou.item() == pytest.approx(case.losses["tf2_float64"]["box_iou_loss"], rel=1e-8)


def test_the_cases_cover_every_setting() -> None:
    settings = {key for name in loss_case_names("golden") for key in loss_case("golden", name).settings}
    assert settings == {field.name for field in dataclasses.fields(LossSettings)}
    assert len(loss_case_names("golden")) == 27


# --- a wrong loss is found -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("two/default", {"alpha": 0.2500001}),
        ("two/default", {"gamma": 1.500001}),
        ("two/default", {"delta": 0.100001}),
        ("two/label_smoothing=0.1", {"label_smoothing": 0.0}),
        ("two/default", {"box_loss_weight": 50.00001}),
    ],
)
def test_a_wrong_setting_is_found(name: str, wrong: dict[str, float]) -> None:
    case = loss_case("golden", name)
    _, found = run(dataclasses.replace(case, settings={**case.settings, **wrong}), torch.float64)
    with pytest.raises(AssertionError):
        all_close(found, case)


def test_ignored_anchors_are_ignored_and_zero_targets_too() -> None:
    ignored, exact = loss_case("golden", "two/ignored"), loss_case("golden", "exact/default")
    counted = dataclasses.replace(
        ignored, targets=ignored.targets._replace(classes=ignored.targets.classes.clamp(min=BACKGROUND))
    )
    assert run(counted, torch.float64)[0].classes > run(ignored, torch.float64)[0].classes
    targets = exact.targets
    almost = torch.where(targets.boxes == 0, 1e-30, targets.boxes)
    moved = dataclasses.replace(exact, targets=targets._replace(boxes=almost))
    assert run(moved, torch.float64)[0].boxes > run(exact, torch.float64)[0].boxes


def test_another_iou_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="iou_loss_type: 'eiou' is none of iou, giou, diou, ciou"):
        LossSettings(iou_loss_type="eiou")


# --- where no recording looks ---------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_logits_have_a_finite_gradient(gamma: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([1e4, -1e4, 200.0, -200.0], dtype=dtype).reshape(1, 4, 1, 1).requires_grad_()
    loss = focal_loss(logits, torch.tensor([[1]]), 0.25, gamma, 0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(loss.isfinite())
    assert bool(gradient.isfinite().all())


def test_focal_loss_by_its_formula() -> None:
    """With a balance that float32 does not hold exactly."""
    x = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    truth, alpha, gamma, smoothing = np.array([0, 1, 0, 0]), 0.4, 1.7, 0.1
    p = 1 / (1 + np.exp(-x.numpy()))
    hit, smooth = np.where(truth, p, 1 - p), truth * (1 - smoothing) + smoothing / 2
    entropy = -smooth * np.log(p) - (1 - smooth) * np.log(1 - p)
    expected = (np.where(truth, alpha, 1 - alpha) * (1 - hit) ** gamma * entropy).sum()
    logits, classes = x.reshape(1, 4, 1, 1).requires_grad_(), torch.tensor([[1]])
    assert focal_loss(logits, classes, alpha, gamma, smoothing).item() == pytest.approx(expected, rel=1e-13)
    assert torch.autograd.gradcheck(lambda y: focal_loss(y, classes, alpha, gamma, smoothing), logits)


def test_a_class_beyond_the_last_is_background() -> None:
    logits = torch.randn(1, 6, 1, 1, generator=torch.Generator().manual_seed(0))
    beyond, background = (focal_loss(logits, torch.tensor([[a, 0]]), 0.25, 1.5, 0.0) for a in (3, BACKGROUND))
    assert torch.equal(beyond, background)


def test_the_loss_does_not_depend_on_the_memory_format() -> None:
    case = loss_case("golden", "two/default")
    last = tuple([x.contiguous(memory_format=torch.channels_last) for x in kind] for kind in case.outputs)
    assert len(last) == 2
    plain, other = run(case, torch.float64), run(dataclasses.replace(case, outputs=last), torch.float64)
    assert other[0].total.item() == pytest.approx(plain[0].total.item(), rel=1e-13)


@pytest.mark.parametrize("kind", IOU_LOSSES)
def test_iou_of_boxes_that_are_equal_apart_or_empty(kind: str) -> None:
    boxes = torch.tensor([[0.0, 0, 2, 4], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.float64).requires_grad_()
    truth = torch.tensor([[0.0, 0, 2, 4], [3, 3, 4, 4], [0, 0, 0, 0]], dtype=torch.float64)
    value = iou_values(boxes, truth, kind)
    (gradient,) = torch.autograd.grad(value.sum(), boxes)
    apart = {"iou": 0.0, "giou": -14 / 16, "diou": -18 / 32, "ciou": -18 / 32}[kind]
    assert value.tolist() == pytest.approx([1.0, apart, 0.0])
    assert bool(gradient.isfinite().all())


def test_the_gradient_is_that_of_the_value() -> None:
    random = torch.Generator().manual_seed(1)
    boxes, truth = torch.rand(2, 5, 2, 2, generator=random, dtype=torch.float64).cumsum(dim=2).flatten(2)
    for kind in IOU_LOSSES:
        assert torch.autograd.gradcheck(lambda x, k=kind: iou_values(x, truth, k), boxes.requires_grad_())


# --- weight decay, normaliser -----------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_what_decays_is_what_automl_decays(model: str) -> None:
    """AutoML goes by the names of its variables, this by the kind of the layer."""
    config = model_config(model)
    with torch.device("meta"):
        network = EfficientDet(config)
    parameters = dict(network.named_parameters())
    by_name = {r.target for r in rules(config) if r.target in parameters and is_decayed(r.sources[0])}
    assert set(decayed(network)) == by_name


def test_decay_is_in_the_loss() -> None:
    network = EfficientDet(one_of_each_layer()).double()
    kernels = decayed(network)
    loss = decay_loss(kernels.values(), 4e-5)
    expected = 4e-5 / 2 * sum(float((kernel.detach().numpy() ** 2).sum()) for kernel in kernels.values())
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    for kernel, gradient in zip(
        kernels.values(), torch.autograd.grad(loss, list(kernels.values())), strict=True
    ):
        torch.testing.assert_close(gradient, 4e-5 * kernel.detach(), rtol=1e-14, atol=0)


def test_the_average_of_the_normaliser_starts_at_zero() -> None:
    average: float | Tensor = 0.0
    for normaliser, expected in ((10.0, 1.0), (10.0, 1.9), (20.0, 3.71)):
        average = average_normaliser(average, normaliser, 0.9)
        assert average == pytest.approx(expected)
