"""Thin Google's recorded schedules and one of its training runs into the goldens.

``python parity_tests/goldens/training/make_runs.py``, with the recordings in ../shared.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from parity_tests.helpers.recordings import golden_recording
from parity_tests.helpers.training import raw_value
from parity_tests.training.recorded import OWN, TRUTH
from parity_tests.training.steps.runs import CONFIG, Run, run

NAME = "keras_float64_s128_b2_tightclip"
KEPT = 24  # steps of a schedule


def make() -> None:
    keep_schedules()
    recorded = run("shared", NAME)
    about = {
        "trainer": recorded.trainer,
        "hparams": recorded.hparams,
        "steps": recorded.steps,
        "variables": list(next(iter(recorded.sums.values()))),
        "summed": list(recorded.sums),
    }
    arrays: dict[str, Any] = {
        f"{NAME}/{step}": np.array(list(rows.values())) for step, rows in recorded.sums.items()
    }
    for i, part in enumerate(("anchor", "class", "box")):
        arrays[part] = np.concatenate([label[i] for label in recorded.labels])
    arrays["positives"] = np.array([len(label[0]) for label in recorded.labels])
    arrays["spreads"] = spreads(recorded)
    arrays["pictures"] = recorded.images
    arrays["about"] = np.frombuffer(json.dumps({NAME: about}).encode(), np.uint8)
    np.savez_compressed(OWN / "runs.npz", **arrays)


def keep_schedules() -> None:
    whole = json.loads((TRUTH / "schedules.json").read_text())

    def thin(case: dict[str, Any], *names: str) -> dict[str, Any]:
        length = len(case[names[0]])
        chosen = sorted({*range(0, length, length // KEPT), length - 1})
        return {**case, **{name: [case[name][i] for i in chosen] for name in names}}

    for trainer in ("legacy", "tf2"):
        whole[trainer] = {name: thin(case, "steps", "lr") for name, case in whole[trainer].items()}
    rates = ("global_step_before", "legacy_one_minus_decay", "tf2_one_minus_decay")
    whole["ema"] = {decay: thin(case, *rates) for decay, case in whole["ema"].items()}
    (OWN / "schedules.json").write_text(json.dumps(whole).replace("}, ", "},\n") + "\n")


def spreads(recorded: Run) -> np.ndarray:
    """The deviation that made each raw value; NumPy's float32 deviations differ in their last bits."""
    averages, found = golden_recording(CONFIG.name).variables(), []
    for name in sorted(averages):
        guess = np.float32(np.std(averages[name]) if averages[name].size > 1 else 0.5)
        near = (guess + k * np.spacing(guess) for k in (0, 1, -1, 2, -2, 3, -3))
        wanted = recorded.start[name]
        found.append(
            next(float(s) for s in near if np.array_equal(raw_value(name, averages[name], float(s)), wanted))
        )
    return np.array(found)


if __name__ == "__main__":
    make()
