"""The recipe, the schedules and the decay of the averages, beside Google's."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import numpy as np
import pytest

from parity_tests.training.recorded import OWN, TRUTH
from pytorch_model.errors import ConfigError
from pytorch_model.training.averages import moved
from pytorch_model.training.recipe import HPARAM_NAMES, RECIPES, Recipe, with_hparams
from pytorch_model.training.schedule import Schedule

EXACT = 2e-7  # relative, of float32 values
#: 1 + cos has the error of a cosine whose last bit differs, which TensorFlow's does at one angle of 200.
COSINE = 2.0**-24


@cache
def schedules(source: str) -> Any:
    path = (TRUTH if source == "shared" else OWN) / "schedules.json"
    if not path.is_file():
        pytest.skip("needs the recordings in ../shared, which a clone does not carry (goldens/ stand in)")
    return json.loads(path.read_text())


@pytest.mark.parametrize("source", ["golden", "shared"])
@pytest.mark.parametrize("trainer", RECIPES)
def test_every_rate_is_googles(source: str, trainer: str) -> None:
    recorded = schedules(source)[trainer]
    assert len(recorded) >= 27
    for name, case in recorded.items():
        check_rates(trainer, name, case)


def check_rates(trainer: str, name: str, case: Any) -> None:
    hparams, method = dict(case["hparams"]), name.rpartition("/")[2]
    batch, examples = hparams.pop("batch_size"), hparams.pop("num_examples_per_epoch")
    recipe = with_hparams(RECIPES[trainer], {**hparams, "lr_decay_method": method})
    schedule = Schedule(recipe, batch, examples)
    assert (schedule.total_steps, schedule.warmup_steps) == (case["total_steps"], case["lr_warmup_step"])
    for step, rate in zip(case["steps"], case["lr"], strict=True):
        found = schedule(step)
        if math.isnan(rate):
            assert math.isnan(found), (name, step)
            continue
        last_bit = schedule.learning_rate / 2 * COSINE if method == "cosine" else 0
        assert abs(found - rate) <= EXACT * rate + last_bit, (name, step)


def test_a_later_start_of_the_cosine_would_be_found() -> None:
    name, case = "coco_bs64/cosine", dict(schedules("golden")["legacy"]["coco_bs64/cosine"])
    case["steps"] = [step + 1 for step in case["steps"]]
    with pytest.raises(AssertionError):
        check_rates("legacy", name, case)


@pytest.mark.parametrize("source", ["golden", "shared"])
@pytest.mark.parametrize("trainer", RECIPES)
def test_the_averages_move_as_googles(source: str, trainer: str) -> None:
    for decay, case in schedules(source)["ema"].items():
        for step, expected in zip(
            case["global_step_before"], case[f"{trainer}_one_minus_decay"], strict=True
        ):
            found = moved(float(decay), RECIPES[trainer].first_average + step)
            assert found == pytest.approx(expected, rel=EXACT), (decay, step)


def test_off_by_one_step_would_be_found() -> None:
    case = schedules("golden")["ema"]["0.9998"]
    wrong = moved(0.9998, case["global_step_before"][0])
    assert wrong != pytest.approx(case["legacy_one_minus_decay"][0], rel=EXACT)


def test_float64_is_for_comparisons() -> None:
    assert moved(0.9998, 10**6, np.float64) == pytest.approx(2e-4, rel=1e-12)
    assert Schedule(Recipe(), 64, 120_000, np.float64)(0) == 0.008


# --- hyper-parameters -----------------------------------------------------------------------------------


def test_the_defaults_are_automls() -> None:
    from parity_tests.helpers.configs import AUTOML_DEFAULTS

    own = {**vars(Recipe()), **vars(Recipe().losses)}
    assert {name: own[name] for name in HPARAM_NAMES} == {
        name: AUTOML_DEFAULTS[name] for name in HPARAM_NAMES
    }


def test_hparams_reach_recipe_and_losses() -> None:
    recipe = with_hparams(RECIPES["tf2"], {"momentum": 0.8, "gamma": 2.0, "iou_loss_type": "ciou"})
    assert (recipe.momentum, recipe.losses.gamma, recipe.losses.iou_loss_type) == (0.8, 2.0, "ciou")
    assert recipe.betas == (0.8, 0.999)
    assert recipe.rate_in_velocity
    assert RECIPES["legacy"].betas == (0.9, 0.999)


@pytest.mark.parametrize(
    ("trainer", "norm", "limit"),
    [("legacy", -5.0, 5.0), ("tf2", -5.0, 0.0), ("legacy", None, 0.0), ("tf2", 5.0, 5.0)],
)
def test_a_negative_clip(trainer: str, norm: float | None, limit: float) -> None:
    assert with_hparams(RECIPES[trainer], {"clip_gradients_norm": norm}).clip_norm == limit


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("jitter_min", 0.1, "'jitter_min' is not part of the recipe"),
        ("rate_in_velocity", True, "is not part of the recipe"),
        ("num_epochs", 0, "num_epochs is 0, must be a whole number above 0"),
        ("learning_rate", math.nan, "learning_rate is nan, must be a number from 0 on"),
        ("lr_decay_method", "linear", "lr_decay_method is 'linear', must be one of cosine"),
        ("optimizer", "lamb", "optimizer is 'lamb', must be one of sgd, adam"),
        ("momentum", True, "momentum is True, must be a number"),
        ("moving_average_decay", 1.0, "moving_average_decay is 1.0"),
        ("var_freeze_expr", "(", "var_freeze_expr is '\\(', must be a regular expression"),
        ("gamma", "2", "gamma is '2', must be a number"),
        ("iou_loss_type", "l1", "iou_loss_type: 'l1' is none of"),
    ],
)
def test_a_bad_hyper_parameter_is_refused(name: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_hparams(Recipe(), {name: value})


@pytest.mark.parametrize("trainer", RECIPES)
def test_an_epoch_without_a_step_is_refused(trainer: str) -> None:
    with pytest.raises(ConfigError, match="less than one batch of 64; use a smaller batch"):
        Schedule(with_hparams(RECIPES[trainer], {"num_epochs": 1}), 64, 63)
