"""The recorded applications of AutoAugment's operations, as operations and draws of ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from parity_tests.training.input_truth import TRUTH
from pytorch_model.training.data.auto_augment.operations import Operation, OperationDraws

#: Where a case's draws go, in the order in which AutoML asks for them.
PLACES: Mapping[str, tuple[str, ...]] = {"Cutout": ("y", "x"), "BBox_Cutout": ("box", "y", "x")}


class Application(NamedTuple):
    """``boxes``: how many boxes the image had, None: all."""

    key: str
    operation: Operation
    draws: OperationDraws
    boxes: int | None


def applications(cases: Mapping[str, Any]) -> list[Application]:
    return [_application(key, case) for key, case in cases.items()]


def _application(key: str, case: Mapping[str, Any]) -> Application:
    name, level, *_ = key.split("/")
    only = name.endswith("_Only_BBoxes")
    places = dict(zip(PLACES.get(name, ()), case["draws"], strict=False))
    numbers = {"apply": 0.0, "sign": case["sign_draw"] or 0.0, "y": 0.0, "x": 0.0, "box": 0.0, **places}
    per_box = _per_box(name, case["draws"]) if only else np.zeros((0, 4), np.float32)
    draws = OperationDraws(**{place: np.float32(u) for place, u in numbers.items()}, per_box=per_box)
    return Application(key, Operation(name, 1.0, float(level)), draws, len(per_box) if only else None)


def _per_box(name: str, draws: list[float]) -> np.ndarray:
    """Boxes in their own order. Cutout asks for a place too, but only for boxes that it is applied to."""
    rows: list[list[float]] = []
    left = list(draws)
    while left:
        apply = left.pop(0)
        place = [left.pop(0), left.pop(0)] if name.startswith("Cutout") and apply + 1 / 3 >= 1 else [0, 0]
        rows.append([len(rows) / 100, apply, *place])
    return np.array(rows, np.float32)


def document() -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads((TRUTH / "autoaugment.json").read_text())
    return content
