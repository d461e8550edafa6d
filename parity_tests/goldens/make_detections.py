"""Thin the recordings of anchors and detections: ``python parity_tests/goldens/make_detections.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parity_tests.helpers.paths import GOLDENS, SHARED
from parity_tests.helpers.recordings import CONFIGS, GENERATED
from pytorch_model.config import MODELS

ANCHOR_VALUES = 120  # kept per array
TOP_PAIRS = 5000  # the most candidates of any kept configuration


def anchors() -> dict[str, np.ndarray]:
    """``<model>/anchors/<size>@<stride>`` → values, thinned by an odd step, which keeps every column."""
    kept = {}
    for model in MODELS:
        for file in sorted((SHARED / "oracle" / model).glob("post_s*.npz")):
            with np.load(file) as stored:
                stats = json.loads(bytes(stored["__stats_json__"]))
                for key in (key for key in stored.files if key.startswith("anchors/")):
                    name, _, strided = key.partition("@")
                    values = stored[key].reshape(-1)
                    step = max(1, len(values) // ANCHOR_VALUES) | 1
                    stride = step * (stats[name]["stride"] if strided else 1)
                    kept[f"{model}/{name}@{stride}"] = values[::step]
    return kept


def detections() -> dict[str, np.ndarray]:
    """The ``synth`` recording, with only the logits that can become candidates."""
    with np.load(SHARED / "oracle/efficientdet-d0/post_s128.npz") as stored:
        logits = np.concatenate(
            [stored[f"synth/class_outputs/{level}"].reshape(2, -1, 90) for level in range(3, 8)], axis=1
        )
        boxes = np.concatenate(
            [stored[f"synth/box_outputs/{level}"].reshape(2, -1, 4) for level in range(3, 8)], axis=1
        )
        kept = {"synth/box_outputs": boxes, "synth/image_scales": stored["synth/image_scales"]}
        for image in range(2):
            flat = logits[image].reshape(-1)
            best = np.arange(len(logits[image])) * 90 + logits[image].argmax(axis=1)
            top = np.argsort(-flat, kind="stable")[:TOP_PAIRS]
            indices = np.union1d(best, top).astype(np.int32)
            kept[f"synth/logit_indices/{image}"] = indices
            kept[f"synth/logits/{image}"] = flat[indices]
        for scope in ("per_class", "global"):
            for name in CONFIGS:
                for part in ("boxes", "scores", "classes", "valid_len"):
                    key = f"synth/{scope}/{name}/{part}"
                    kept[key] = stored[key]
        for name in GENERATED:
            key = f"synth/generate_detections/{name}/id_box_score_class"
            kept[key] = stored[key]
    return kept


if __name__ == "__main__":
    arrays: dict[str, Any] = {**anchors(), **detections()}
    np.savez_compressed(GOLDENS / "detections.npz", **arrays)
