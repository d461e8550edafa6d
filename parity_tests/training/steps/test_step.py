"""Whole training steps beside Google's: losses, norms, and every variable, slot and average."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from parity_tests.helpers.small_models import tiny
from parity_tests.training.steps.runs import AVERAGE, CONFIG, VARIABLES, Ours, run
from porting.parity.gradients import shifts
from porting.rules import rules
from porting.transforms import FOLD_BIAS_INTO_MEAN
from pytorch_model.anchors import generate_anchors
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.errors import ConfigError
from pytorch_model.training import step as step_module
from pytorch_model.training.clipping import clip_gradients, stacked_parameters
from pytorch_model.training.optimizers import TensorFlowAdam, VelocitySGD, set_rate
from pytorch_model.training.recipe import RECIPES, Recipe, with_hparams
from pytorch_model.training.schedule import Schedule
from pytorch_model.training.step import Batch, TrainStep, freeze
from pytorch_model.training.targets import Targets

LOSSES, STATE = 1e-11, 1e-10  # relative, float64
#: Slots that hold nothing but rounding errors of a gradient that is 0 by construction.
CANCELLED = {VARIABLES[name][0] for name in shifts(CONFIG, (128, 128))} | {
    rule.sources[1] for rule in rules(CONFIG) if rule.transform is FOLD_BIAS_INTO_MEAN
}
SLOTS = ("/Momentum", "/momentum", "/m", "/v")
#: Of the largest slot: what rounding leaves of fusion weights' gradients, which are differences, see
#: porting/parity/gradients.py.
FUSION = 1e-12

SHORT = "keras_float64_s128_b2_tightclip"
RUNS = [
    pytest.param("golden", SHORT, id="golden"),
    *(
        pytest.param("shared", name, marks=pytest.mark.slow, id=name)
        for name in (
            "legacy_float64_s128_b2_plain",
            "legacy_float64_s128_b2_frozen",
            "keras_float64_s128_b2_plain",
            SHORT,
            "keras_float64_s128_b2_adam",
        )
    ),
]


@pytest.mark.parametrize(("source", "name"), RUNS)
def test_a_run_is_googles(source: str, name: str) -> None:
    recorded = run(source, name)
    check(Ours(recorded))


def check(ours: Ours) -> None:
    recorded = ours.recorded
    for number, (found, expected) in enumerate(zip(ours, recorded.steps, strict=True), 1):
        losses = {
            "total": found.total,
            "det": found.losses.total,
            "cls": found.losses.classes,
            "box": found.losses.boxes,
            "l2": found.decay,
            "lr": torch.tensor(found.rate, dtype=torch.float64),
        }
        norms = {"raw": found.norms.raw, "each": found.norms.each, "final": found.norms.final}
        for key, value in losses.items():
            assert value.item() == pytest.approx(expected[key], rel=LOSSES), (number, key)
        for key, value in norms.items():
            assert value.item() == pytest.approx(expected[f"norm_{key}"], rel=STATE), (number, key)
        assert found.norms.clipped.item() == expected["clipped"]
        if number in recorded.sums:
            check_variables(ours, recorded.sums[number])


def check_variables(ours: Ours, sums: Mapping[str, np.ndarray]) -> None:
    """By sum, L2 and largest magnitude. What the trainer does not average has its first value."""
    found, suffix = ours.variables(), AVERAGE[ours.recorded.trainer]
    largest = {
        slot: max((l2 for name, (_, l2, _) in sums.items() if name.endswith(slot)), default=0)
        for slot in SLOTS
    }
    for name, (total, l2, peak) in sums.items():
        variable, _, kind = name.rpartition("/")
        slot = f"/{kind}" if f"/{kind}" in SLOTS else None
        if slot and variable in CANCELLED:
            continue
        untouched = ours.recorded.averages.get(name.removesuffix(suffix)) if name.endswith(suffix) else None
        array = np.float64(found[name] if name in found or untouched is None else untouched)
        allowed = STATE * l2 * (2 if slot == "/v" else 1)  # a square has twice the error
        if slot and "/WSM" in variable:
            allowed += FUSION * largest[slot]
        assert abs(np.linalg.norm(array) - l2) <= allowed, name
        assert abs(np.abs(array).max() - peak) <= allowed, name
        assert abs(array.sum() - total) <= allowed * np.sqrt(array.size), name
    assert found.keys() <= sums.keys()


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["legacy", "keras"])
def test_float32_is_as_near_to_float64_as_googles(trainer: str) -> None:
    """Within 3 times, over the whole run, whose rounding grows from step to step.

    As in the recordings without oneDNN, whose float32 convolutions are less exact. Of legacy, Google's error
    is that of two runs; images that differ by 1e-7 make the second.
    """
    exact = run("shared", f"{trainer}_float64_s128_b2_plain").steps
    variants = ("plain", "plain_perturbed") if trainer == "legacy" else ("plain",)
    google = [run("shared", f"{trainer}_float32_s128_b2_{variant}").steps for variant in variants]
    errors: dict[str, list[float]] = {key: [] for key in ("total", "cls", "box", "l2", "norm_raw")}
    with torch.backends.mkldnn.flags(enabled=False):
        for found, expected in zip(
            Ours(run("shared", f"{trainer}_float32_s128_b2_plain"), "float32"), exact, strict=True
        ):
            values = {
                "total": found.total,
                "cls": found.losses.classes,
                "box": found.losses.boxes,
                "l2": found.decay,
                "norm_raw": found.norms.raw,
            }
            for key, value in values.items():
                errors[key].append(abs(value.item() - expected[key]) / expected[key])
    for key, ours in errors.items():
        theirs = [
            abs(found[key] - expected[key]) / expected[key]
            for steps in google
            for found, expected in zip(steps, exact, strict=True)
        ]
        assert max(ours) <= 3 * max(theirs), (key, ours)


# --- one fault each -------------------------------------------------------------------------------------


def clip_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "stacked_parameters", lambda model: set())


def add_to_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    clamp = torch.Tensor.clamp
    monkeypatch.setattr(torch.Tensor, "clamp", lambda x, *a, **k: clamp(x, *a, **k) + 1e-6 * ("min" in k))


def decay_after_clipping(monkeypatch: pytest.MonkeyPatch) -> None:
    def clip(parameters: list[torch.Tensor], stacked: set[torch.Tensor], limit: float) -> object:
        kernels = [(p.detach(), p.grad) for p in parameters if p.dim() == 4 and p.grad is not None]
        for kernel, gradient in kernels:
            gradient.sub_(4e-5 * kernel)
        norms = clip_gradients(parameters, stacked, limit)
        for kernel, gradient in kernels:
            gradient.add_(4e-5 * kernel)
        return norms

    monkeypatch.setattr(step_module, "clip_gradients", clip)


PATCHES = [clip_stacked, add_to_the_norm, decay_after_clipping]
OTHER_FIELDS = [{"rate_in_velocity": False}, {"first_average": 1}, {"averages_all": True}]


@pytest.mark.parametrize("patch", PATCHES)
def test_a_fault_of_the_step_is_found(patch: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(patch)
    patch(monkeypatch)
    with pytest.raises(AssertionError):
        check(Ours(run("golden", SHORT)))


@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=str)
def test_a_field_of_the_other_trainer_is_found(fields: dict[str, bool | int]) -> None:
    recorded = run("golden", SHORT)
    ours = Ours(recorded, recipe=dataclasses.replace(recorded.recipe, **fields))  # type: ignore[arg-type]
    with pytest.raises((AssertionError, KeyError)):
        check(ours)


# --- optimizers and clipping, by hand -------------------------------------------------------------------


def test_both_forms_of_momentum_agree_while_the_rate_stays() -> None:
    first, second = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    velocity, plain = VelocitySGD([first], 0.9), torch.optim.SGD([second], lr=0.1, momentum=0.9)
    for rate, agree in ((0.1, True), (0.1, True), (0.05, False)):
        for parameter, optimizer in ((first, velocity), (second, plain)):
            parameter.grad = parameter.detach().clone()
            set_rate(optimizer, rate)
            optimizer.step()
        assert torch.allclose(first, second, rtol=1e-14) == agree


def test_adam_has_tensorflows_epsilon() -> None:
    """The formula for one number, with an ε that counts."""
    w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer, value, m, v = TensorFlowAdam([w], (0.8, 0.99), 0.1), 2.0, 0.0, 0.0
    for t in (1, 2, 3):
        gradient = 3 * value
        w.grad = 3 * w.detach()
        set_rate(optimizer, 0.1 * t)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.99 * v + 0.01 * gradient**2
        value -= 0.1 * t * (1 - 0.99**t) ** 0.5 / (1 - 0.8**t) * m / (v**0.5 + 0.1)
        assert w.item() == pytest.approx(value, rel=1e-14)


def test_optimizers_pass_over_parameters_without_gradient() -> None:
    w = nn.Parameter(torch.ones(2))
    for optimizer in (VelocitySGD([w], 0.9), TensorFlowAdam([w], (0.9, 0.999), 1e-8)):
        optimizer.step()
        assert torch.equal(w, torch.ones(2))


def clipped(
    gradients: list[list[float]], limit: float, stacked: bool = False
) -> tuple[list[list[float]], float]:
    parameters = [nn.Parameter(torch.zeros(len(g), dtype=torch.float64)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    norms = clip_gradients(parameters, set(parameters) if stacked else set(), limit)
    return [p.grad.tolist() for p in parameters if p.grad is not None], norms.final.item()


def test_clipping_by_hand() -> None:
    assert clipped([[3.0, 4.0], [0.0, 0.0]], 1.0)[0] == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    both, norm = clipped([[30.0, 40.0], [0.0, 1.0]], 1.0)  # norms 50 and 1 → 1 and 1 → 1 together
    assert both == [pytest.approx([0.6 * 0.5**0.5, 0.8 * 0.5**0.5]), pytest.approx([0.0, 0.5**0.5])]
    assert norm == pytest.approx(1.0)
    assert clipped([[30.0, 40.0]], 0.0) == ([[30.0, 40.0]], 50.0)
    assert clipped([[0.3, 0.4]], 1.0)[0] == [pytest.approx([0.3, 0.4], rel=1e-15)]
    assert clipped([[3.0, 4.0]], 1.0, stacked=True)[0] == [pytest.approx([0.5**0.5, 0.5**0.5])]


def test_norms_that_are_not_finite_are_as_tensorflows() -> None:
    assert clipped([[1e200, 0.0], [0.5, 0.0]], 1.0)[0] == [[0.0, 0.0], [0.5, 0.0]]
    found, _ = clipped([[float("inf"), 0.0], [0.5, 0.0]], 1.0)
    assert np.isnan(found).all()


@pytest.mark.parametrize("method", ["channel_fastattn", "fastattn"])
def test_fusion_weights_are_several_variables(method: str) -> None:
    model = EfficientDet(tiny(fpn_weight_method=method))
    (weights, *_) = stacked_parameters(model)
    weights.grad = torch.full_like(weights, 2.0)
    norms = clip_gradients([weights], {weights}, 1.0)
    assert norms.clipped.item() == len(weights)
    row = 2.0 * (weights[0].numel() ** 0.5)
    assert norms.raw.item() == pytest.approx(row * len(weights) ** 0.5)


# --- a small network ------------------------------------------------------------------------------------


def small_step(recipe: Recipe, seed: int = 0) -> TrainStep:
    torch.manual_seed(seed)
    model = EfficientDet(tiny()).double()
    names = {rule.target: rule.sources for rule in rules(model.config)}
    anchors = generate_anchors(model.config, (128, 128))
    return TrainStep(model, recipe, Schedule(recipe, 4, 40, np.float64), anchors, names)


def small_batch(step: TrainStep, images: int = 4) -> Batch:
    random = torch.Generator().manual_seed(1)
    anchors = len(generate_anchors(step.model.config, (128, 128)))
    classes = torch.randint(-1, 2, (images, anchors), generator=random)
    boxes = torch.randn(images, anchors, 4, generator=random) * (classes >= 0)[..., None]
    pictures = torch.randn(images, 3, 128, 128, dtype=torch.float64, generator=random)
    return Batch(pictures, Targets(classes, boxes, (classes >= 0).sum(dim=1).float()))


def halves(batch: Batch) -> Iterator[Batch]:
    for chosen in (slice(0, 1), slice(1, None)):  # of different size, so that a mean of means would be wrong
        yield Batch(batch.images[chosen], Targets(*(x[chosen] for x in batch.targets)))


def still(step: TrainStep) -> TrainStep:
    """Batch norms with fixed statistics, so that an image does not depend on the others."""
    step.model.train()
    for module in step.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return step


def state(step: TrainStep) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in step.model.parameters()])


def one_of_two(rank: int, folder: Path) -> None:
    """A process with its part of the batch; the second writes its weights and averages."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    step = still(small_step(RECIPES["legacy"], seed=rank))  # the first process's weights count
    batch = small_batch(step)
    results = [step(list(halves(batch))[rank]) for _ in range(2)]
    if rank == 1:  # which began with other weights
        totals = torch.stack([result.total for result in results])
        torch.save((totals, state(step), dict(step.averages.values)), folder / "result.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    spawn(one_of_two, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    totals, weights, averages = torch.load(tmp_path / "result.pt")
    step = still(small_step(RECIPES["legacy"]))
    batch = small_batch(step)
    expected = torch.stack([step(batch).total for _ in range(2)])
    assert torch.allclose(totals, expected, rtol=1e-12)
    assert torch.linalg.vector_norm(weights - state(step)) <= 1e-12 * torch.linalg.vector_norm(weights)
    assert all(torch.allclose(averages[k], x, rtol=1e-9) for k, x in step.averages.values.items())


@pytest.mark.parametrize("hparams", [{}, {"positives_momentum": 0.5}, {"optimizer": "adam"}], ids=str)
def test_accumulating_equals_the_whole_batch(hparams: dict[str, float | str]) -> None:
    recipe = with_hparams(RECIPES["legacy"], hparams)
    whole, parts = still(small_step(recipe)), still(small_step(recipe))
    batch = small_batch(whole)
    for _ in range(2):
        one, two = whole(batch), parts(*halves(batch))
        assert two.total.item() == pytest.approx(one.total.item(), rel=1e-12)
    assert torch.linalg.vector_norm(state(whole) - state(parts)) <= 1e-12 * torch.linalg.vector_norm(
        state(whole)
    )


@pytest.mark.parametrize("trainer", RECIPES)
def test_a_step_does_not_wait_for_the_device(trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reads a tensor's value, so an accelerator's queue never runs empty."""
    step = small_step(RECIPES[trainer])
    batch = small_batch(step)

    def read(*_: object) -> None:
        raise AssertionError("a value was read")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, read)
    step(batch)


def test_the_moving_normaliser_begins_at_zero() -> None:
    plain, moving = (small_step(with_hparams(Recipe(), h)) for h in ({}, {"positives_momentum": 0.75}))
    batch = small_batch(plain)
    first, second = plain(batch), moving(batch)
    assert second.losses.total.item() == pytest.approx(4 * first.losses.total.item(), rel=1e-6)


def test_without_averages_there_are_none() -> None:
    step = small_step(with_hparams(Recipe(), {"moving_average_decay": 0}))
    step(small_batch(step))
    assert step.averages.values == {}


def test_evaluation_between_steps_does_not_last() -> None:
    step = small_step(Recipe())
    step.model.eval()
    step(small_batch(step))
    assert step.model.training


# --- freezing -------------------------------------------------------------------------------------------


def test_frozen_layers_follow_the_batches_but_do_not_learn() -> None:
    step = small_step(with_hparams(Recipe(), {"var_freeze_expr": "(efficientnet|fpn_cells|resample_p6)"}))
    before = {key: x.clone() for key, x in step.model.state_dict().items()}
    step(small_batch(step))
    changed = {key for key, x in step.model.state_dict().items() if not torch.equal(x, before[key])}
    assert any(key.startswith("backbone") and key.endswith("running_mean") for key in changed)
    assert not any(key.startswith("backbone") and key.endswith("weight") for key in changed)
    assert any(key.startswith("class_net") for key in changed)


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("net/", "matches no variable"),
        ("", "matches every variable"),
        (".*WSM:0", "freezes only some of fpn_cells/cell_0/fnode0/WSM, fpn_cells/cell_0/fnode0/WSM_1"),
    ],
)
def test_an_expression_that_cannot_be_meant_is_refused(expression: str, says: str) -> None:
    step = small_step(Recipe())
    names = {rule.target: rule.sources for rule in rules(step.model.config)}
    with pytest.raises(ConfigError, match=says):
        freeze(step.model, expression, names)
