"""The parts of AutoML's training that one step needs: losses, clipping, momentum, averages; and Google's
step.

The losses are the trainer's, on arrays with the layout of TensorFlow's outputs. Source of the rest: AutoML
``det_model_fn.py`` (``model_fn``).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from parity_tests.helpers.paths import GOLDENS, SHARED
from parity_tests.helpers.recordings import golden_recording, normalise, shared_recording
from porting.parity.backward import Outputs
from porting.scopes import EMA_SUFFIX, MOMENTUM_SUFFIX
from pytorch_model.config import EfficientDetConfig
from pytorch_model.training import losses
from pytorch_model.training.losses import LossSettings
from pytorch_model.training.targets import Targets
from tf_reference.variables import variables as catalogue

WEIGHT_DECAY = 4e-5
VARIABLE_CLIP, GLOBAL_CLIP = 10.0, 10.0
MOMENTUM = 0.9
DEFAULTS = LossSettings()
EMA_DECAY = 0.9998

STEP = 100  # global_step before the recorded step
LEVELS = range(3, 8)


# --- losses -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """The training targets of a batch's anchors, one array per level.

    ``classes``: int [N, H, W, anchors], from 0; −1 background, −2 ignored. ``boxes``: float
    [N, H, W, anchors · 4], 0 for anchors without a box. ``positives``: anchors with a box, in the batch.
    """

    classes: list[np.ndarray]
    boxes: list[np.ndarray]
    positives: float


@dataclass(frozen=True)
class DetectionLoss:
    """``total``: class loss plus weighted box loss, before weight decay; and its gradient."""

    total: float
    classes: float
    boxes: float
    gradient: Outputs


def detection_loss(outputs: Outputs, labels: Labels, settings: LossSettings = DEFAULTS) -> DetectionLoss:
    """The trainer's loss in float64, and its gradient with respect to every output."""
    logits, regressions = (
        [torch.tensor(x, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_() for x in kind]
        for kind in outputs
    )
    images = len(outputs[0][0])
    targets = Targets(
        torch.cat([torch.from_numpy(x).long().reshape(images, -1) for x in labels.classes], dim=1),
        torch.cat([torch.from_numpy(x).reshape(images, -1, 4) for x in labels.boxes], dim=1),
        torch.tensor(labels.positives / images).expand(images),
    )
    no_anchors = torch.empty(0, 4)  # only an IoU loss needs them
    normaliser = labels.positives + 1  # a batch without objects must not divide by zero
    loss = losses.detection_loss(logits, regressions, targets, normaliser, settings, no_anchors)
    found = torch.autograd.grad(loss.total, logits + regressions)
    arrays = [gradient.permute(0, 2, 3, 1).numpy() for gradient in found]
    gradient = arrays[: len(logits)], arrays[len(logits) :]
    return DetectionLoss(loss.total.item(), loss.classes.item(), loss.boxes.item(), gradient)


def is_decayed(name: str) -> bool:
    """AutoML decays every kernel (also depthwise, pointwise), but no bias, batch norm or fusion weight."""
    return name.endswith("kernel")


# --- one step -----------------------------------------------------------------------------------------


def cosine_learning_rate(step: int, batch_size: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine over ``total − warmup`` steps that starts at step 0, not after it."""
    scale = batch_size / 64
    if step < warmup_steps:
        return scale * (0.008 + (0.08 - 0.008) * step / warmup_steps)
    return scale * 0.04 * (1 + math.cos(math.pi * step / (total_steps - warmup_steps)))


def clip(gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each variable's gradient to norm 10, then all together to 10."""
    each = clip_each(gradients)
    norm = global_norm(each)
    return {name: gradient * min(1.0, GLOBAL_CLIP / norm) for name, gradient in each.items()}


def clip_each(gradients: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients with a norm above 10 are scaled down to 10; the others stay."""
    clipped = dict(gradients)
    for name, gradient in gradients.items():
        norm = float(np.linalg.norm(gradient))
        if norm > VARIABLE_CLIP:
            clipped[name] = gradient * (VARIABLE_CLIP / norm)
    return clipped


def global_norm(gradients: Mapping[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(np.sum(np.square(gradient))) for gradient in gradients.values()))


def average(old: np.ndarray, new: np.ndarray, step: int) -> np.ndarray:
    """The exponential moving average after ``step`` steps; in the first steps it decays faster."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    return decay * old + (1 - decay) * new


# --- Google's step ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Every ``stride``-th element of a flattened array, and the L2 of the whole."""

    values: np.ndarray
    stride: int
    norm: float

    def of(self, array: np.ndarray) -> np.ndarray:
        """The same elements of ``array``."""
        return array.reshape(-1)[:: self.stride]


@dataclass(frozen=True)
class TrainStep:
    """One training step of D0 by Google's code, in float32: the step after ``STEP``, two images.

    ``averages``: the EMA values before the step. ``gradients`` are those before clipping, weight decay
    included. ``after`` contains every variable, its ``/Momentum`` and its ``/ExponentialMovingAverage``.
    ``scalars``: AutoML's losses, learning rate and gradient norms.
    """

    config: EfficientDetConfig
    images: np.ndarray
    averages: dict[str, np.ndarray]
    labels: Labels
    scalars: dict[str, float]
    gradients: dict[str, Sample]
    after: dict[str, Sample]

    def variables(self) -> dict[str, np.ndarray]:
        """The raw values before the step: the averages plus noise, float32."""
        return {name: raw_value(name, value) for name, value in self.averages.items()}

    def momentum(self) -> dict[str, np.ndarray]:
        """The optimizer's slots before the step, float32."""
        return {
            v.name: np.float32(0.01 * _rng("mom", v.name + MOMENTUM_SUFFIX).normal(size=v.shape))
            for v in catalogue(self.config)
            if v.trainable
        }


def raw_value(name: str, average: np.ndarray, spread: float | None = None) -> np.ndarray:
    """``spread``: the average's deviation, whose last bit depends on NumPy's version; None: NumPy's."""
    noise = _rng("raw", name).normal(size=average.shape)
    if name.endswith("moving_variance"):
        return np.asarray(average * np.exp(0.1 * noise), np.float32)
    if spread is None:
        spread = float(np.std(average)) if average.size > 1 else 0.5
    return np.asarray(average + 0.1 * (spread + 0.02) * noise, np.float32)


def _rng(*keys: object) -> np.random.Generator:
    return np.random.default_rng([0, *(zlib.crc32(str(key).encode()) for key in keys)])


def shared_step() -> TrainStep:
    """The whole recording."""
    folder = SHARED / "oracle" / "efficientdet-d0"
    with np.load(folder / "train_step_legacy_s128.npz") as stored:
        arrays = {key.removesuffix("@strided"): stored[key] for key in stored.files}
    stats = json.loads(bytes(arrays.pop("__stats_json__")))

    def samples(group: str) -> dict[str, Sample]:
        return {
            key.removeprefix(group): Sample(value.reshape(-1), stats[key]["stride"], stats[key]["l2"])
            for key, value in arrays.items()
            if key.startswith(group) and key != "after/global_step"
        }

    report = json.loads((folder / "report.json").read_text())["train_step_legacy_s128"]
    recording = shared_recording("efficientdet-d0", 128)
    return TrainStep(
        recording.config,
        arrays["input"],
        recording.variables(),
        read_labels({key.removeprefix("labels/"): value for key, value in arrays.items()}),
        {
            **dict(zip(("detection", "class", "box"), arrays["det_cls_box"].tolist(), strict=True)),
            "decay": float(arrays["reg_l2_loss"]),
            "total": float(arrays["total_loss"]),
            "learning_rate": float(arrays["lr"]),
            "norm": report["grad_global_norm_raw"],
            "norm_variables_clipped": report["grad_global_norm_after_pervar_clip"],
            "norm_clipped": report["grad_global_norm_final"],
            "variables_clipped": report["n_vars_clipped"],
        },
        samples("grad/"),
        samples("after/"),
    )


def read_labels(arrays: Mapping[str, np.ndarray]) -> Labels:
    """``mean_num_positives`` has the batch's mean once per image, so its sum counts the batch's anchors."""
    return Labels(
        [arrays[f"cls_targets_{level}"] for level in LEVELS],
        [arrays[f"box_targets_{level}"] for level in LEVELS],
        float(arrays["mean_num_positives"].sum()),
    )


def golden_step() -> TrainStep:
    """The thinned copy that is part of the project, written by ``goldens/make_gradients.py``."""
    recording = golden_recording("efficientdet-d0")
    with np.load(GOLDENS / "train_step.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}

    def samples(group: str) -> dict[str, Sample]:
        ends = np.cumsum(arrays[f"{group}/count"])
        values = np.split(arrays[f"{group}/values"], ends[:-1])
        rows = zip(values, arrays[f"{group}/stride"].tolist(), arrays[f"{group}/norm"].tolist(), strict=True)
        return {
            name: Sample(*row)
            for name, row in zip(recorded_names(recording.config)[group], rows, strict=True)
        }

    return TrainStep(
        recording.config,
        normalise(arrays["picture"], recording.config),
        recording.variables(),
        read_labels(arrays),
        json.loads(bytes(arrays["scalars"])),
        samples("gradients"),
        samples("after"),
    )


def recorded_names(config: EfficientDetConfig) -> dict[str, list[str]]:
    """Names of the variables with gradients, and of those that the step changes, in the golden's order."""
    names = [v.name for v in catalogue(config)]
    trainable = [v.name for v in catalogue(config) if v.trainable]
    slots = [name + MOMENTUM_SUFFIX for name in trainable]
    return {"gradients": trainable, "after": [*names, *slots, *(name + EMA_SUFFIX for name in names)]}
