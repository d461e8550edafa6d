"""Google's training code, recorded: anchor labels, losses and networks with stochastic depth.

Every function takes a ``source``: ``shared``, the whole recordings next to the project, or ``golden``, a part
of them that travels with it and is written by ``goldens/training/make_network.py``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from parity_tests.helpers.paths import GOLDENS, SHARED
from parity_tests.helpers.recordings import golden_recording, normalise, shared_recording
from pytorch_model.config import EfficientDetConfig, model_config
from pytorch_model.training.targets import BACKGROUND, IGNORED, Targets

TRUTH, OWN = SHARED / "train_truth", GOLDENS / "training"


class Sample(NamedTuple):
    """Every ``stride``-th value of a flattened array; ``facts``: ``l2``, ``sum``, ``absmax`` of the whole."""

    values: np.ndarray
    stride: int
    facts: Mapping[str, float]

    def of(self, array: np.ndarray) -> np.ndarray:
        """The same values of ``array``."""
        return array.reshape(-1)[:: self.stride]


class Recorded(NamedTuple):
    """One recording: what its JSON says, its whole arrays, and its samples of larger ones."""

    about: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    samples: Mapping[str, Sample]


@cache
def read(source: str, name: str) -> Recorded:
    """Skips the test if the recordings are not there."""
    if source == "golden":
        with np.load(OWN / f"{name}.npz") as stored:
            arrays = {key: stored[key] for key in stored.files}
        about = json.loads(bytes(arrays.pop("about")))
    else:
        if not TRUTH.is_dir():
            pytest.skip("needs the recordings in ../shared, which a clone does not carry (goldens/ stand in)")
        with np.load(TRUTH / f"{name}.npz") as stored:
            arrays = {key: stored[key] for key in stored.files}
        about = json.loads((TRUTH / f"{name.removesuffix('_op')}.json").read_text())
        about["stats"] = json.loads(bytes(arrays.pop("__stats_json__")))
    arrays = {key.removesuffix("@strided"): value for key, value in arrays.items()}
    facts = {key: value for key, value in about["stats"].items() if key in arrays}
    samples = {key: Sample(arrays[key].reshape(-1), fact["stride"], fact) for key, fact in facts.items()}
    return Recorded(about, arrays, samples)


def seeded(*keys: object) -> np.random.Generator:
    """The random numbers that the recordings were made from."""
    return np.random.default_rng([0, *(zlib.crc32(str(key).encode()) for key in keys)])


# --- labels -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelling:
    """One picture's boxes and the labels of its anchors.

    ``boxes_yxyx`` [M, 4] in pixels, ``classes`` [M] from 1, ``matches`` [A] (the box, or −1), ``targets`` of
    one picture.
    """

    config: EfficientDetConfig
    boxes_yxyx: Tensor
    classes: Tensor
    matches: Tensor
    targets: Targets


def labelling_names(source: str) -> list[str]:
    if source == "shared" and not TRUTH.is_dir():
        return ["absent"]
    return list(read(source, "labels").about["cases"])


def labelling(source: str, name: str) -> Labelling:
    recorded = read(source, "labels")
    config = labels_config(recorded.about["configs"][recorded.about["cases"][name]["config"]])
    count = sum(rows * columns for rows, columns in config.feature_sizes().values()) * config.num_anchors
    found = {
        part: torch.from_numpy(recorded.arrays[f"{name}/{part}"])
        for part in ("gt_boxes", "gt_classes", "anchor", "gt_index", "class", "box")
    }
    anchor = found["anchor"].long()
    matches, classes = torch.full((count,), -1), torch.full((1, count), BACKGROUND)
    boxes = torch.zeros(1, count, 4)
    matches[anchor], classes[0, anchor] = found["gt_index"].long(), found["class"].long()
    boxes[0, anchor] = found["box"]
    return Labelling(
        config,
        found["gt_boxes"].reshape(-1, 4),
        found["gt_classes"].long(),
        matches,
        Targets(classes, boxes, torch.tensor([recorded.about["cases"][name]["num_positives"]])),
    )


def labels_config(about: Mapping[str, Any]) -> EfficientDetConfig:
    """D0 with the recorded levels, anchors and picture size."""

    def tuples(value: Any) -> Any:
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    names = ("min_level", "max_level", "num_scales", "aspect_ratios", "anchor_scale", "num_classes")
    size = tuples(about["image_size"])
    return model_config(
        "efficientdet-d0",
        image_size=size if isinstance(size, tuple) else (size, size),
        **{name: tuples(about[name]) for name in names},
    )


# --- losses -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCase:
    """One batch with its recorded losses, by precision, and float64 gradients, by ``cls_3`` … ``box_7``.

    ``outputs``: float32 [N, outputs, H, W], class then box, one a level. ``settings``: AutoML's names.
    ``float32``: the facts of Google's float32 gradients in the order of ``outputs``, one list a trainer.
    """

    config: EfficientDetConfig
    targets: Targets
    outputs: tuple[list[Tensor], list[Tensor]]
    settings: Mapping[str, Any]
    losses: Mapping[str, Mapping[str, float]]
    gradients: list[Sample]
    float32: list[list[Mapping[str, float]]]


def loss_case_names(source: str) -> list[str]:
    if source == "shared" and not TRUTH.is_dir():
        return ["absent"]
    return list(read(source, "losses").about["cases"])


def loss_case(source: str, name: str) -> LossCase:
    recorded = read(source, "losses")
    about = recorded.about["cases"][name]
    pictures = [labelling(source, picture) for picture in about["batch"]]
    config, (batch, _, variant) = pictures[0].config, name.partition("/")
    classes, boxes, positives = (
        torch.cat([getattr(p.targets, part) for p in pictures]) for part in ("classes", "boxes", "positives")
    )
    if "ignored" in variant:
        classes = some_ignored(classes, config)
    kinds, trainers = ("cls", "box"), ("legacy_float32", "tf2_float32", "tf2_float64")
    return LossCase(
        config,
        Targets(classes, boxes, positives),
        seeded_outputs(batch, len(pictures), config, spread=60.0 if "large_logits" in variant else 1.5),
        about["hparams"],
        {trainer: about[trainer] for trainer in trainers if trainer in about},
        [recorded.samples[f"{name}/grad_{kind}_{level}"] for kind in kinds for level in config.levels],
        [about[f"{trainer}_gradient"] for trainer in trainers[:2] if trainer in about],
    )


def seeded_outputs(
    batch: str, images: int, config: EfficientDetConfig, spread: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs that the losses were recorded with: normal numbers, class logits around −3."""
    found = []
    for kind, outputs, deviation, mean in (("cls", config.num_classes, spread, -3.0), ("box", 4, 0.3, 0.0)):
        arrays = [
            seeded(f"loss-{kind}", batch, level).normal(
                size=(images, rows, columns, config.num_anchors * outputs)
            )
            * deviation
            + mean
            for level, (rows, columns) in config.feature_sizes().items()
        ]
        found.append([torch.from_numpy(np.float32(x)).permute(0, 3, 1, 2).contiguous() for x in arrays])
    return found[0], found[1]


def some_ignored(classes: Tensor, config: EfficientDetConfig) -> Tensor:
    """Per level, over the batch: every 7th background and every 5th positive anchor is ignored."""
    sizes = [rows * columns * config.num_anchors for rows, columns in config.feature_sizes().values()]
    levels = []
    for level in classes.split_with_sizes(sizes, dim=1):
        flat = level.reshape(-1).clone()
        chosen = [(flat == BACKGROUND).nonzero()[::7], (flat >= 0).nonzero()[::5]]
        flat[torch.cat(chosen)] = IGNORED
        levels.append(flat.reshape(level.shape))
    return torch.cat(levels, dim=1)


# --- stochastic depth ----------------------------------------------------------------------------------

DROPPED = ("drop_efficientdet-lite0", "drop_efficientdet-d0_head0.8")


@dataclass(frozen=True)
class DroppedNetwork:
    """One network in training with given draws, float64: [N, H, W, 3] ``images``, ``draws`` [calls, N].

    ``outputs``: ``class_outputs/3`` … ``gradients``: AutoML name → (sum, L2, largest magnitude).
    """

    config: EfficientDetConfig
    variables: Mapping[str, np.ndarray]
    images: np.ndarray
    draws: Tensor
    loss: float
    outputs: Mapping[str, Sample]
    gradients: Mapping[str, np.ndarray]


def dropped_network(source: str, name: str) -> DroppedNetwork:
    recorded = read(source, name)
    about = recorded.about
    config = model_config(about["model"], survival_prob=about["head_survival_prob"])
    of_model = golden_recording if source == "golden" else lambda model: shared_recording(model, 128)
    count = about["calls"] * about["batch"]
    draws = seeded("drop", name.removeprefix("drop_")).uniform(size=count).astype(np.float32)
    return DroppedNetwork(
        config,
        of_model(about["model"]).variables(),
        normalise(read("golden", "pictures").arrays["pictures"], config),
        torch.from_numpy(draws).double().reshape(about["calls"], about["batch"]),
        about["loss"],
        {key: sample for key, sample in recorded.samples.items() if "outputs/" in key},
        dict(zip(about["gradient_variables"], recorded.arrays["gradient_sums"], strict=True)),
    )
