"""Recordings of Google's own code: activations in float64, and the seeded weights and images they came from.

The weights are a pure function of (name, shape), so they are not stored. Only the batch-norm statistics are
stored, because they were calibrated by running the network.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from parity_tests.helpers.paths import GOLDENS, SHARED
from porting.convert import apply_rules
from porting.export import Weights
from porting.rules import rules
from pytorch_model.config import EfficientDetConfig, model_config
from tf_reference.variables import variable_shapes

GOLDEN_MODELS = ("efficientdet-d0", "efficientdet-d7x", "efficientdet-lite0")
#: Index of a released checkpoint in the shared folder → its model.
RELEASED = {
    "d0_ap3346": "efficientdet-d0",
    "d0_ap3429": "efficientdet-d0",
    "d1": "efficientdet-d1",
    "d2": "efficientdet-d2",
    "d2_other": "efficientdet-d2",
    "d3": "efficientdet-d3",
    "d4": "efficientdet-d4",
}

# Golden input: model, (height, width) of the network's input.
GOLDEN_TARGETS = [("d0", (32, 48)), ("d0", (70, 90)), ("lite0", (48, 32)), ("lite0", (41, 56))]
# Recorded configuration → what it sets. AutoML's default for max_nms_inputs is 0, ours is its evaluation's.
CONFIGS: dict[str, dict[str, Any]] = {
    "default_gaussian": {},
    "hard": {"method": "hard"},
    "hard_iou0.3_score0.05": {"method": "hard", "iou_thresh": 0.3, "score_thresh": 0.05},
    "gaussian_score0.2": {"score_thresh": 0.2},
    "gaussian_sigma0.3_max20": {"sigma": 0.3, "max_output_size": 20},
    "gaussian_topk5000": {"max_nms_inputs": 5000},
    "hard_topk5000": {"method": "hard", "max_nms_inputs": 5000},
}
GENERATED: dict[str, dict[str, Any]] = {
    "tf_per_class": {"max_nms_inputs": 0},
    "tf_per_class_topk5000": {},
    "pyfunc_gaussian": {"pyfunc": True},
    "pyfunc_gaussian_maxreduce": {"pyfunc": True, "max_nms_inputs": 0},
    "pyfunc_hard": {"pyfunc": True, "method": "hard"},
    "pyfunc_linear": {"pyfunc": True, "method": "linear"},
    "pyfunc_diou": {"pyfunc": True, "method": "diou"},
}


@dataclass(frozen=True)
class Recording:
    """Google's activations of one model on one batch.

    ``endpoints``: recorded key → (values, stride): ``values`` is every ``stride``-th element of the flattened
    NHWC activation. ``norms``: L2 of the *full* activation. ``images``: [N, H, W, 3], normalised.
    ``google_error``: relative L2 of Google's float32 to Google's float64 at each endpoint.
    """

    name: str
    config: EfficientDetConfig
    images: np.ndarray
    endpoints: dict[str, tuple[np.ndarray, int]]
    norms: dict[str, float]
    google_error: dict[str, float]
    bn_statistics: Any

    def variables(self) -> dict[str, np.ndarray]:
        """AutoML name → float32 value."""
        return {
            name: self.bn_statistics[name] if "moving_" in name else seeded_value(name, shape)
            for name, shape in variable_shapes(self.config).items()
        }


def seeded_value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The recorded value of a variable that is not a batch-norm statistic."""
    rng = _rng("v", name)
    scope, leaf = name.rsplit("/", 1)
    if leaf == "gamma":
        value = rng.uniform(0.5, 1.5, shape)
    elif leaf == "beta":
        value = rng.normal(0, 0.1, shape)
    elif leaf.startswith("WSM"):
        value = np.full(shape, _fusion_weight(rng, scope, leaf))
    elif leaf == "bias":
        value = rng.normal(0, 0.1, shape)
        if scope.endswith("class-predict"):
            value = rng.normal(0, 0.3, shape) - np.log(99.0)
    else:
        inputs = 1 if leaf == "depthwise_kernel" else shape[2]
        value = rng.normal(size=shape) * _gain(name) / np.sqrt(shape[0] * shape[1] * inputs)
    return np.asarray(value, np.float32)


def _rng(*keys: object) -> np.random.Generator:
    return np.random.default_rng([0, *(zlib.crc32(str(key).encode()) for key in keys)])


def _gain(name: str) -> float:
    if name.endswith("class-predict/pointwise_kernel"):
        return 1.5
    if name.endswith("box-predict/pointwise_kernel"):
        return 0.4
    return 2.0 if "/se/" in name else 1.0


def _fusion_weight(rng: np.random.Generator, scope: str, leaf: str) -> float:
    node = _rng("wsm", scope)
    has_negative = node.uniform() < 0.3
    negative = node.integers(0, 3) if has_negative else -1
    index = int(leaf.partition("_")[2] or 0)
    value = rng.uniform(0.2, 1.5)
    return -value / 3 if index == negative else value


def normalise(picture: np.ndarray, config: EfficientDetConfig) -> np.ndarray:
    """uint8 [..., 3] → float32, (x − mean) / stddev. Independent of the code under test."""
    return (picture.astype(np.float32) - np.array(config.mean_rgb, np.float32)) / np.array(
        config.stddev_rgb, np.float32
    )


def native_size(model: str) -> int:
    return 256 if model == "efficientdet-d7x" else 128


def shared_recording(model: str, size: int) -> Recording:
    folder = SHARED / "oracle" / model
    with np.load(folder / f"acts_fp64_s{size}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    stats = json.loads(bytes(arrays.pop("__stats_json__")))
    endpoints = {
        key.removesuffix("@strided"): (value.reshape(-1), stats[key.removesuffix("@strided")]["stride"])
        for key, value in arrays.items()
    }
    batch = next(iter(stats.values()))["shape"][0]
    errors = json.loads((SHARED / "oracle" / "google_float32_error.json").read_text())[f"{model}/s{size}"]
    errors["backbone/features"] = errors["backbone/reduction_5"]  # one activation under two names
    return Recording(
        f"{model}/s{size}",
        model_config(model),
        recorded_images(folder, model, size, batch),
        endpoints,
        {key: entry["l2"] for key, entry in stats.items()},
        {key: value["rel_l2"] for key, value in errors.items()},
        np.load(folder / "bn_stats.npz"),
    )


def recorded_images(folder: Path, model: str, size: int, batch: int) -> np.ndarray:
    """The stored input if there is one, otherwise the images that the recordings' own module draws."""
    stored = folder / f"input_s{size}.npz"
    if stored.exists():
        with np.load(stored) as content:
            return content["input"][:batch]
    import importlib.util

    spec = importlib.util.spec_from_file_location("recorded_weights", SHARED / "oracle" / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    images: np.ndarray = module.images(model, batch, size, size)[1]
    return images


def golden_recording(model: str) -> Recording:
    """A thinned copy of one recording, which is part of the project."""
    with np.load(GOLDENS / f"{model}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    about = json.loads(bytes(arrays.pop("about")))
    config = model_config(model)
    return Recording(
        f"{model}/golden",
        config,
        normalise(arrays.pop("picture"), config),
        {key: (arrays[f"endpoint/{key}"], entry["stride"]) for key, entry in about["endpoints"].items()},
        {key: entry["l2"] for key, entry in about["endpoints"].items()},
        {key: entry["google_error"] for key, entry in about["endpoints"].items()},
        {key.removeprefix("bn/"): value for key, value in arrays.items() if key.startswith("bn/")},
    )


def tap_of(endpoint: str, config: EfficientDetConfig) -> str:
    """The reference tap of the activation that the recordings call ``endpoint``."""
    scope, _, rest = endpoint.partition("/")
    if scope in ("class_outputs", "box_outputs"):
        return endpoint
    if scope == "backbone":
        return _backbone_tap(rest, config)
    level = int(rest)
    if scope == "fpn_in":
        if level in config.backbone.reduction_blocks:
            return f"{config.backbone.name}/blocks_{config.backbone.reduction_blocks[level]}"
        return f"resample_p{level}"
    cell = int(scope.removeprefix("fpn_cell_"))
    last = max(n for n, node in enumerate(config.bifpn_nodes) if node.level == level)
    return f"fpn_cells/cell_{cell}/fnode{last}"


def _backbone_tap(endpoint: str, config: EfficientDetConfig) -> str:
    backbone = config.backbone
    if endpoint == "stem":
        return f"{backbone.name}/stem"
    if endpoint == "features":
        return f"{backbone.name}/blocks_{len(backbone.blocks) - 1}"
    part, _, inner = endpoint.partition("/")
    kind, number = part.rsplit("_", 1)
    index = int(number) if kind == "block" else backbone.reduction_blocks[int(number)]
    scope = f"{backbone.name}/blocks_{index}"
    if not inner:
        return scope
    block = backbone.blocks[index]  # "expansion_output": the input of the projection
    if block.se_filters:
        return f"{scope}/se"
    return f"{scope}/tpu_batch_normalization" + ("_1" if block.expand_ratio != 1 else "")


def tensorflow_preprocess(
    tf: Any, pixels: np.ndarray, config: EfficientDetConfig, target: tuple[int, int]
) -> np.ndarray:
    """AutoML's steps in TensorFlow's operations: uint8 [h, w, 3] → float32 [H, W, 3]."""
    image = (tf.cast(pixels, tf.float32) - tf.constant(config.mean_rgb)) / tf.constant(config.stddev_rgb)
    height, width = tf.cast(tf.shape(image)[0], tf.float32), tf.cast(tf.shape(image)[1], tf.float32)
    scale = tf.minimum(target[0] / height, target[1] / width)
    size = tf.cast(tf.stack([height * scale, width * scale]), tf.int32)
    scaled = tf.image.resize(image, size, method="bilinear")
    padded: np.ndarray = tf.image.pad_to_bounding_box(scaled, 0, 0, *target).numpy()
    return padded


def weights_of(recording: Recording, dtype: str = "float32") -> Weights:
    """The ported weights of a recording, with the size of its images."""
    height, width = recording.images.shape[1:3]
    config = recording.config.replace(image_size=(height, width))
    return Weights(apply_rules(rules(config), recording.variables(), dtype), config)


def images_of(recording: Recording) -> torch.Tensor:
    """The recording's images in PyTorch's layout, [N, 3, H, W]."""
    return torch.from_numpy(recording.images).permute(0, 3, 1, 2).contiguous()
