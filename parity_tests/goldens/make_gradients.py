"""Thin Google's training step into the golden: ``python parity_tests/goldens/make_gradients.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parity_tests.helpers.paths import GOLDENS
from parity_tests.helpers.training import LEVELS, Sample, recorded_names, shared_step

KEPT = {"gradients": 32, "after": 6}  # values per variable


def thinned(sample: Sample, kept: int) -> Sample:
    # An odd step, on top of the recorded stride, keeps every channel and position class in the sample.
    step = 1 if len(sample.values) <= kept else len(sample.values) // kept | 1
    return Sample(sample.values[::step], sample.stride * step, sample.norm)


def make() -> None:
    step = shared_step()
    deviation, mean = (np.array(rgb, np.float32) for rgb in (step.config.stddev_rgb, step.config.mean_rgb))
    arrays = {
        "picture": np.rint(step.images * deviation + mean).astype(np.uint8),
        "mean_num_positives": np.full(2, step.labels.positives / 2, np.float32),
        "scalars": np.frombuffer(json.dumps(step.scalars).encode(), np.uint8),
    }
    for level, classes, boxes in zip(LEVELS, step.labels.classes, step.labels.boxes, strict=True):
        arrays |= {f"cls_targets_{level}": classes.astype(np.int8), f"box_targets_{level}": boxes}
    for group, recorded in (("gradients", step.gradients), ("after", step.after)):
        samples = [thinned(recorded[name], KEPT[group]) for name in recorded_names(step.config)[group]]
        arrays |= {
            f"{group}/values": np.concatenate([sample.values for sample in samples]),
            f"{group}/count": np.array([len(sample.values) for sample in samples], np.int32),
            f"{group}/stride": np.array([sample.stride for sample in samples], np.int32),
            f"{group}/norm": np.array([sample.norm for sample in samples]),
        }
    np.savez_compressed(GOLDENS / "train_step.npz", **arrays)


if __name__ == "__main__":
    make()
