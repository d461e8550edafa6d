"""Thin the shared recordings into the goldens in this folder: ``python parity_tests/goldens/make.py``."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parity_tests.helpers.paths import GOLDENS, SHARED
from parity_tests.helpers.recordings import GOLDEN_MODELS, native_size, shared_recording
from pytorch_model.config import MODELS

KEPT = 60  # values per endpoint


def names_digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def make_names() -> None:
    """One line per model: the number of variables and of trainable parameters, and a digest of the list."""
    table = {}
    for model in MODELS:
        content = json.loads((SHARED / "oracle" / model / "names_tf1_ckpt.json").read_text())["variables"]
        kept = {
            name: entry
            for name, entry in content.items()
            if not name.endswith(("/ExponentialMovingAverage", "/Momentum")) and name != "global_step"
        }
        lines = [f"{name} {entry['shape']} {entry['trainable']}" for name, entry in kept.items()]
        trainable = sum(int(np.prod(entry["shape"])) for entry in kept.values() if entry["trainable"])
        table[model] = {"variables": len(kept), "trainable": trainable, "sha256": names_digest(lines)}
    (GOLDENS / "names.json").write_text(json.dumps(table, indent=1) + "\n")


def make_activations(model: str) -> None:
    recording = shared_recording(model, native_size(model))
    with np.load(SHARED / "oracle" / model / f"input_s{native_size(model)}.npz") as stored:
        picture = stored["input_uint8"][: len(recording.images)]
    arrays = {
        "picture": picture,
        **{f"bn/{name}": recording.bn_statistics[name] for name in recording.bn_statistics.files},
    }
    about = {}
    for key, (values, stride) in recording.endpoints.items():
        # An odd step, on top of the recorded stride, keeps every channel and position class in the sample.
        step = max(1, len(values) // KEPT) | 1
        arrays[f"endpoint/{key}"] = values[::step]
        about[key] = {
            "stride": stride * step,
            "l2": recording.norms[key],
            "google_error": recording.google_error[key],
        }
    arrays["about"] = np.frombuffer(json.dumps({"endpoints": about}).encode(), np.uint8)
    np.savez_compressed(GOLDENS / f"{model}.npz", **arrays)


if __name__ == "__main__":
    make_names()
    for golden in GOLDEN_MODELS:
        make_activations(golden)
