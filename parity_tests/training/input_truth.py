"""The recorded inputs of AutoML's training: examples, draws, and what reached the network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from parity_tests.helpers.paths import SHARED
from pytorch_model.config import model_config
from pytorch_model.detection.preprocess import load_image
from pytorch_model.training.data.augment import Draws
from pytorch_model.training.data.settings import InputSettings

TRUTH = SHARED / "train_truth"
COCO = SHARED / "coco"
D0 = model_config("efficientdet-d0")
LITE = {"mean_rgb": (127.0,) * 3, "stddev_rgb": (128.0,) * 3}

#: Recorded name → our settings.
SETTINGS: Mapping[str, InputSettings] = {
    "512": InputSettings.of(D0),
    "256x384": InputSettings.of(D0, image_size=(256, 384)),
    "128": InputSettings.of(D0, image_size=(128, 128)),
    "512_target640": InputSettings.of(D0, target_size=(640, 640)),
    "512_jitter0.8-1.2_keepcrowd_noflip": InputSettings.of(
        D0, jitter_min=0.8, jitter_max=1.2, skip_crowd_during_training=False, input_rand_hflip=False
    ),
    "320_lite": InputSettings.of(D0, image_size=(320, 320), **LITE),
}


class Boxes(NamedTuple):
    """The annotations of an image in a TFRecord: relative boxes float32 [M, 4], int64 [M], bool [M]."""

    boxes_yxyx: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray


class Recorded(NamedTuple):
    """What AutoML gave to the labeler. ``samples``: every ``stride``-th value of the image [h, w, 3]."""

    boxes_yxyx: np.ndarray
    classes: np.ndarray
    samples: np.ndarray
    stats: Mapping[str, Any]


def drawn(height: int, width: int) -> np.ndarray:
    """A picture of any size, uint8 [H, W, 3]."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def as_draws(numbers: list[float]) -> Draws:
    """Recorded draws; where there is no flip, there are three."""
    return Draws(*np.array(numbers if len(numbers) == 4 else [0, *numbers], np.float32))


@cache
def document() -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads((TRUTH / "input_pipeline.json").read_text())
    return content


@cache
def arrays() -> Mapping[str, np.ndarray]:
    with np.load(TRUTH / "input_pipeline.npz") as stored:
        return {name: stored[name] for name in stored.files}


@cache
def _annotations() -> Mapping[int, list[Any]]:
    content = json.loads((COCO / "instances_val2017_158.json").read_text())
    found: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


@cache
def picture(image_id: int, decoder: str) -> np.ndarray:
    """uint8 [H, W, 3]."""
    file = COCO / f"val2017/{image_id:012d}.jpg"
    return load_image(file, decoder).pixels.permute(1, 2, 0).contiguous().numpy()


def relative(xywh: Any, size: tuple[int, int]) -> np.ndarray:
    """Pixels [M, 4] → relative float32 [M, 4] yxyx, in float64 until the last step as AutoML's script."""
    x, y, wide, high = np.array(xywh, np.float64).reshape(-1, 4).T
    height, width = size
    corners = [y / height, x / width, (y + high) / height, (x + wide) / width]
    return np.stack(corners, axis=1).astype(np.float32)


def annotated(image_id: int, size: tuple[int, int]) -> Boxes:
    found = _annotations()[image_id]
    return Boxes(
        relative([each["bbox"] for each in found], size),
        np.array([each["category_id"] for each in found], np.int64),
        np.array([bool(each["iscrowd"]) for each in found]),
    )


def recorded(key: str) -> Recorded:
    stored = arrays()
    stats = json.loads(bytes(stored["__stats_json__"]))[f"{key}/image"]
    return Recorded(
        stored[f"{key}/boxes"],
        stored[f"{key}/classes"].reshape(-1).astype(np.int64),
        stored[f"{key}/image@strided"],
        stats,
    )
