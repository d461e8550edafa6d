"""Google's training runs, recorded, and ours beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from parity_tests.helpers.paths import SHARED
from parity_tests.helpers.recordings import golden_recording, normalise, recorded_images
from parity_tests.helpers.training import raw_value
from parity_tests.training.recorded import OWN, TRUTH
from porting.checkpoint import open_checkpoint
from porting.convert import apply_rules
from porting.rules import Rule, rules
from porting.scopes import EMA_SUFFIX
from porting.transforms import FOLD_BIAS_INTO_MEAN
from pytorch_model.anchors import generate_anchors
from pytorch_model.config import model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.training.recipe import RECIPES, Recipe, with_hparams
from pytorch_model.training.schedule import Schedule
from pytorch_model.training.step import Batch, StepResult, TrainStep
from pytorch_model.training.targets import BACKGROUND, Targets

CONFIG = model_config("efficientdet-d0", image_size=(128, 128))
TABLE = list(rules(CONFIG))
VARIABLES = {rule.target: rule.sources for rule in TABLE}
SIZE, BATCH = 128, 2

#: In the recordings: trainer → our recipe, and what the slots and averages are called.
RECIPE_OF = {"legacy": "legacy", "keras": "tf2"}
AVERAGE = {"legacy": "/ExponentialMovingAverage", "keras": "/average"}
SLOTS = {
    ("legacy", "sgd"): {"momentum_buffer": "/Momentum"},
    ("keras", "sgd"): {"velocity": "/momentum"},
    ("keras", "adam"): {"m": "/m", "v": "/v"},
}


@dataclass(frozen=True)
class Run:
    """``steps``: AutoML's scalars of each. ``sums``: step → variable, slot or average → (sum, L2, absmax).

    ``start``, ``averages``: AutoML's variables before the first step. ``images``: uint8 [N, H, W, 3], and
    ``labels``: (anchor, class, box) of each, of all steps.
    """

    trainer: str
    hparams: Mapping[str, Any]
    steps: list[Mapping[str, float]]
    sums: Mapping[int, Mapping[str, np.ndarray]]
    start: Mapping[str, np.ndarray]
    averages: Mapping[str, np.ndarray]
    images: np.ndarray
    labels: list[tuple[np.ndarray, ...]]

    @property
    def recipe(self) -> Recipe:
        return with_hparams(RECIPES[RECIPE_OF[self.trainer]], {**self.hparams, "num_epochs": 4})


@cache
def run(source: str, name: str) -> Run:
    """``name``: ``legacy_float64_s128_b2_plain``. Skips the test if the recordings are not there."""
    if source == "golden":
        return golden_run(name)
    if not TRUTH.is_dir():
        pytest.skip("needs the recordings in ../shared, which a clone does not carry (goldens/ stand in)")
    about = json.loads((TRUTH / f"train_{name}.json").read_text())
    with np.load(TRUTH / f"train_{name}.npz") as stored:
        sums = {
            int(key.removeprefix("step").partition("/")[0]): dict(
                zip(about["variables"], stored[key], strict=True)
            )
            for key in stored.files
            if key.endswith("/sums")
        }
    start, averages = shared_start()
    count = BATCH * len(about["steps"])
    return Run(
        about["trainer"],
        about["hparams"],
        about["steps"],
        sums,
        start,
        averages,
        shared_pictures(count),
        shared_labels(count),
    )


@cache
def shared_start() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    checkpoint = open_checkpoint(SHARED / "oracle" / "checkpoints" / CONFIG.name)
    names = [name for rule in TABLE for name in rule.sources]
    start, averages = (
        {n: np.array(checkpoint[n + suffix], np.float32) for n in names} for suffix in ("", EMA_SUFFIX)
    )
    return start, averages


def shared_pictures(count: int) -> np.ndarray:
    images = recorded_images(SHARED / "oracle" / "none", CONFIG.name, SIZE, count)
    pixels = images * np.array(CONFIG.stddev_rgb, np.float32) + np.array(CONFIG.mean_rgb, np.float32)
    return np.rint(pixels).astype(np.uint8)


def shared_labels(count: int) -> list[tuple[np.ndarray, ...]]:
    with np.load(TRUTH / "train_labels.npz") as stored:
        return [
            tuple(stored[f"s{SIZE}/{i}/{part}"] for part in ("anchor", "class", "box")) for i in range(count)
        ]


def golden_run(name: str) -> Run:
    with np.load(OWN / "runs.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    about = json.loads(bytes(arrays.pop("about")))
    recorded = about[name]
    averages = golden_recording(CONFIG.name).variables()
    spreads = dict(zip(sorted(averages), arrays["spreads"], strict=True))
    start = {key: raw_value(key, value, float(spreads[key])) for key, value in averages.items()}
    ends = np.cumsum(arrays["positives"])[:-1]
    parts = [np.split(arrays[part], ends) for part in ("anchor", "class", "box")]
    sums = {
        step: dict(zip(recorded["variables"], arrays[f"{name}/{step}"], strict=True))
        for step in recorded["summed"]
    }
    return Run(
        recorded["trainer"],
        recorded["hparams"],
        recorded["steps"],
        sums,
        start,
        averages,
        arrays["pictures"],
        list(zip(*parts, strict=True)),
    )


class Ours:
    """Our run beside a recorded one: ``for result in ours``; ``sums()`` at any time."""

    def __init__(self, recorded: Run, dtype: str = "float64", recipe: Recipe | None = None) -> None:
        self.recorded, self.recipe = recorded, recipe or recorded.recipe
        self.dtype = getattr(torch, dtype)
        state, averages = (
            apply_rules(TABLE, values, dtype) for values in (recorded.start, recorded.averages)
        )
        self.model = EfficientDet(CONFIG).to(self.dtype)
        self.model.load_state_dict(state)
        precision = np.float64 if dtype == "float64" else np.float32
        schedule = Schedule(self.recipe, BATCH, 4 * BATCH, precision)
        anchors = generate_anchors(CONFIG)
        self.anchors = len(anchors)
        self.step = TrainStep(self.model, self.recipe, schedule, anchors, VARIABLES, averages)

    def batch(self, step: int) -> Batch:
        chosen = slice(step * BATCH, (step + 1) * BATCH)
        images = torch.from_numpy(normalise(self.recorded.images[chosen], CONFIG)).permute(0, 3, 1, 2)
        labels = self.recorded.labels[chosen]
        classes, boxes = torch.full((BATCH, self.anchors), BACKGROUND), torch.zeros(BATCH, self.anchors, 4)
        for i, (anchor, found, box) in enumerate(labels):
            classes[i, anchor], boxes[i, anchor] = torch.from_numpy(found).long(), torch.from_numpy(box)
        positives = torch.tensor([float(len(anchor)) for anchor, _, _ in labels])
        return Batch(images.to(self.dtype), Targets(classes, boxes, positives))

    def __iter__(self) -> Iterator[StepResult]:
        for step in range(len(self.recorded.steps)):
            yield self.step(self.batch(step))

    def variables(self) -> dict[str, np.ndarray]:
        """Every variable, slot and average by the recording's names, float64.

        The biases that a batch norm absorbs have no gradient, so they are still what they were, and their
        averages move by the recipe's rule. Their slots are left out: Google's hold rounding errors.
        """
        trainer = self.recorded.trainer
        found = undone(dict(self.model.state_dict()), self.recorded.start)
        averages = dict(self.step.averages.values)
        if averages:
            biases = absorbed_averages(self.recorded, self.recipe, self.step.steps)
            found.update((n + AVERAGE[trainer], x) for n, x in {**biases, **undone(averages, biases)}.items())
        for slot, suffix in SLOTS[trainer, self.recipe.optimizer].items():
            state = {name: self.step.optimizer.state[p][slot] for name, p in self.step.parameters.items()}
            found.update((n + suffix, x) for n, x in undone(state, {}).items())
        return found


def undone(state: Mapping[str, Tensor], biases: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """AutoML's variables of those tensors that ``state`` has; with the ``biases`` that were folded."""
    found: dict[str, np.ndarray] = {}
    for rule in TABLE:
        if rule.target in state:
            found.update(_undone(rule, state[rule.target].detach().double().numpy(), biases))
    return found


def _undone(rule: Rule, array: np.ndarray, biases: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if rule.transform is FOLD_BIAS_INTO_MEAN:
        mean, bias = rule.sources
        return {mean: array + biases[bias], bias: np.float64(biases[bias])}
    return dict(zip(rule.sources, rule.transform.inverse(array, len(rule.sources)), strict=True))


def absorbed_averages(recorded: Run, recipe: Recipe, steps: int) -> dict[str, np.ndarray]:
    """The averages of the absorbed biases, by the rule written down a second time."""
    found = {}
    for rule in TABLE:
        if rule.transform is FOLD_BIAS_INTO_MEAN:
            bias = rule.sources[1]
            average, value = np.float64(recorded.averages[bias]), np.float64(recorded.start[bias])
            for n in range(recipe.first_average, recipe.first_average + steps):
                average = value + min(0.9998, (1 + n) / (10 + n)) * (average - value)
            found[bias] = average
    return found
