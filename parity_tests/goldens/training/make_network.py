"""Thin Google's recordings of labels, losses, stochastic depth and fresh weights into the goldens.

``python parity_tests/goldens/training/make_network.py``, with the recordings in ../shared.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from parity_tests.helpers.paths import SHARED
from parity_tests.helpers.recordings import recorded_images
from parity_tests.training.recorded import DROPPED, OWN, TRUTH, Recorded, Sample, read
from pytorch_model.config import model_config

KEPT = 48  # values of a sample


def make() -> None:
    losses, labels = read("shared", "losses"), read("shared", "labels")
    keep_labels(labels, {picture for case in losses.about["cases"].values() for picture in case["batch"]})
    write("losses", losses.about, {}, {key: s for key, s in losses.samples.items() if "/grad_" in key})
    for name in DROPPED:
        recorded = read("shared", name)
        outputs = {key: sample for key, sample in recorded.samples.items() if "outputs/" in key}
        write(name, recorded.about, {"gradient_sums": recorded.arrays["gradient_sums"]}, outputs)
    write("pictures", {}, {"pictures": pictures()}, {})
    operation = read("shared", "drop_connect_op")
    write("drop_connect_op", operation.about, operation.arrays, {})
    keep_fresh()


def keep_labels(labels: Recorded, wanted: set[str]) -> None:
    """The crafted cases, those that the losses need, and the first picture of every configuration."""
    cases = labels.about["cases"]
    first = {case["config"]: name for name, case in reversed(cases.items()) if case["boxes"] < 30}
    kept = {n: c for n, c in cases.items() if "coco/" not in n or n in wanted or n in first.values()}
    arrays = {key: value for key, value in labels.arrays.items() if key.rpartition("/")[0] in kept}
    write("labels", {**labels.about, "cases": kept}, arrays, {})


def pictures() -> np.ndarray:
    """uint8 [3, 160, 160, 3], the same for every model."""
    config = model_config("efficientdet-d0")
    images = recorded_images(SHARED / "oracle" / config.name, config.name, 160, 3)
    return np.rint(
        images * np.array(config.stddev_rgb, np.float32) + np.array(config.mean_rgb, np.float32)
    ).astype(np.uint8)


def keep_fresh() -> None:
    """Kernels only: shape, deviation, least and largest value."""
    fresh = json.loads((TRUTH / "finetune.json").read_text())["fresh"]["legacy_fresh"]["variables"]
    rows = {
        name: [shape, *(float(f"{x:.6g}") for x in (deviation, least, most))]
        for name, (shape, _, deviation, least, most) in fresh.items()
        if name.endswith("kernel")
    }
    (OWN / "fresh_kernels.json").write_text(
        json.dumps(rows, indent=0).replace("\n", "").replace("],", "],\n") + "\n"
    )


def write(
    name: str, about: Mapping[str, Any], arrays: Mapping[str, np.ndarray], samples: Mapping[str, Sample]
) -> None:
    thin: dict[str, Any] = dict(arrays)
    stats = {}
    for key, sample in samples.items():
        # An odd step, on top of the recorded stride, keeps every channel and position class in the sample.
        step = 1 if len(sample.values) <= KEPT else len(sample.values) // KEPT | 1
        thin[key] = sample.values[::step]
        stats[key] = {**sample.facts, "stride": sample.stride * step}
    thin["about"] = np.frombuffer(json.dumps({**about, "stats": stats}).encode(), np.uint8)
    np.savez_compressed(OWN / f"{name}.npz", **thin)


if __name__ == "__main__":
    make()
