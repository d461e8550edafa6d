"""Our detections compared with the reference's, for weights of every size; faults must make it fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from porting.convert import apply_rules
from porting.rules import rules
from porting.synthetic import (
    CALIBRATION_IMAGES,
    CALIBRATION_SIZE,
    synthetic_image,
    synthetic_variables,
)
from pytorch_model.config import EfficientDetConfig, model_config
from pytorch_model.detection.boxes import iou
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.results import Result, to_results
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.evaluation.detection_parity import DetectionParity, compare_detections, pair

pytest.importorskip("pycocotools", reason="needs pycocotools")


def build(config: EfficientDetConfig, variables: dict[str, np.ndarray], dtype: str) -> EfficientDet:
    model = EfficientDet(config).to(getattr(torch, dtype))
    model.load_state_dict(apply_rules(rules(config), variables, dtype))
    return model


def both(
    name: str, pictures: list[np.ndarray], size: int, dtype: str = "float32"
) -> tuple[list[Result], list[Result]]:
    """(ours, the reference's) in ``pictures`` at ``size`` pixels, with synthetic weights."""
    from porting.parity.reference.networks import ops_network

    config = model_config(name)
    variables = synthetic_variables(config)
    detector = Detector(build(config, variables, dtype), image_size=(size, size))
    reference = ops_network(variables, config, dtype)
    ours: list[Result] = []
    theirs: list[Result] = []
    for number, picture in enumerate(pictures):
        batch = detector.preprocess([picture])
        ours += to_results(number, detector.detect(batch)[0])
        theirs += to_results(number, detector.detect(batch, reference)[0])
    return ours, theirs


# --- the bar ------------------------------------------------------------------------------------------

# Random deep networks have moderate outputs on the images their batch norms were calibrated on. On others the
# logits of some reach hundreds: then thousands of scores round to 1 and their order is random in float32.
CALIBRATED = [synthetic_image(CALIBRATION_SIZE, CALIBRATION_SIZE, seed) for seed in range(CALIBRATION_IMAGES)]

MODELS = [
    pytest.param("efficientdet-d0", 4),
    pytest.param("efficientdet-d2", 2),
    pytest.param("efficientdet-d4", 2, marks=pytest.mark.slow),
    pytest.param("efficientdet-d7", 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "count"), MODELS)
def test_synthetic_weights(tensorflow: object, name: str, count: int) -> None:
    ours, theirs = both(name, CALIBRATED[:count], CALIBRATION_SIZE)
    _, exact = both(name, CALIBRATED[:count], CALIBRATION_SIZE, "float64")
    parity = compare_detections(ours, theirs)
    print(name, parity)
    assert parity.saturated == 0
    assert parity.reference == 100 * count
    assert parity.passed
    assert (parity.unmatched_ours, parity.unmatched_reference, parity.label_flips) == (0, 0, 0)
    # The effect of float32 on the reference's own detections is the limit for ours.
    allowed = compare_detections(theirs, exact)
    print("the reference's float32 against its float64", allowed)
    assert allowed.pairs == parity.pairs
    for figure in ("score_largest", "score_mean", "box_largest", "box_mean"):
        assert getattr(parity, figure) <= 3 * getattr(allowed, figure), figure


@pytest.mark.parametrize(("name", "count"), MODELS)
def test_synthetic_weights_in_float64(tensorflow: object, name: str, count: int) -> None:
    """If float32 makes the order random, float64 does not: the same detections in the same order.

    Also where a network has run wild, and boxes are too thin or too large for their overlap to say anything.
    """
    size = 512 if name == "efficientdet-d0" else CALIBRATION_SIZE
    ours, theirs = both(name, [synthetic_image(size * 3 // 4, size), CALIBRATED[0]], size, "float64")
    assert len(ours) == len(theirs) == 200
    for key in ("image_id", "category_id"):
        assert [row[key] for row in ours] == [row[key] for row in theirs]
    # The last bit of float32, in which boxes are decoded: 2^-23, and again where a side is a difference.
    for key in ("score", "bbox"):
        np.testing.assert_allclose([row[key] for row in ours], [row[key] for row in theirs], rtol=5e-7)


# --- faults -------------------------------------------------------------------------------------------


def rows(count: int = 40, seed: int = 0) -> list[Result]:
    """Detections like those of a network: several classes, overlapping, small and large."""
    rng = np.random.default_rng(seed)
    return [
        {
            "image_id": int(rng.integers(3)),
            "category_id": int(rng.integers(1, 6)),
            "bbox": [*rng.uniform(0, 300, 2), *rng.uniform(8, 200, 2)],
            "score": float(score),
        }
        for score in np.sort(rng.uniform(0.01, 0.9, count))[::-1]
    ]


def changed(change: Callable[[Result], dict[str, Any]], every: int = 1) -> DetectionParity:
    theirs = rows()
    ours = copy.deepcopy(theirs)
    for row in ours[::every]:
        row.update(change(row))
    return compare_detections(ours, theirs)


def moved(row: Result, pixels: float) -> dict[str, Any]:
    return {"bbox": [row["bbox"][0] + pixels, row["bbox"][1] + pixels, *row["bbox"][2:]]}


def test_nothing_changed() -> None:
    parity = compare_detections(rows(), rows())
    assert parity.passed
    assert parity.ap == 1
    assert parity.pairs == 40
    assert parity.score_largest == parity.box_largest == parity.label_flips == 0


FAULTS = {
    "boxes 2 pixels off": lambda row: moved(row, 2.0),
    "boxes not scaled back": lambda row: {"bbox": [side * 0.9 for side in row["bbox"]]},
    "x and y swapped": lambda row: {"bbox": [row["bbox"][i] for i in (1, 0, 3, 2)]},
    "corners for sides": lambda row: {
        "bbox": [*row["bbox"][:2], row["bbox"][0] + row["bbox"][2], row["bbox"][1] + row["bbox"][3]]
    },
    "classes off by one": lambda row: {"category_id": row["category_id"] + 1},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_fail(fault: str) -> None:
    parity = changed(FAULTS[fault])
    print(f"{fault}: AP {parity.ap:.4f}")
    assert not parity.passed
    assert parity.ap < 0.9


def test_one_label_swapped_fails() -> None:
    parity = changed(lambda row: {"category_id": row["category_id"] % 5 + 1}, every=40)
    assert parity.label_flips == 1
    assert parity.pairs == 40
    assert not parity.passed


def test_one_detection_missing_fails() -> None:
    parity = compare_detections(rows()[:-1], rows())
    assert (parity.unmatched_ours, parity.unmatched_reference) == (0, 1)
    assert not parity.passed


def test_one_detection_too_many_ahead_fails() -> None:
    extra = {**rows()[0], "bbox": [500.0, 500.0, 20.0, 20.0], "score": 0.95}
    parity = compare_detections([extra, *rows()], rows())
    assert (parity.unmatched_ours, parity.unmatched_reference) == (1, 0)
    assert not parity.passed


def test_small_differences_are_shown_and_pass() -> None:
    parity = changed(lambda row: {**moved(row, 0.01), "score": row["score"] * 0.999})
    assert parity.passed
    assert parity.box_largest == pytest.approx(0.01)
    assert parity.score_largest == pytest.approx(0.001 * rows()[0]["score"])


def test_nothing_to_compare_does_not_pass() -> None:
    assert not compare_detections([], []).passed
    assert not compare_detections([], rows()).passed
    assert not compare_detections(rows(), []).passed


def test_hard_instead_of_soft_suppression_fails(tensorflow: object) -> None:
    """Complete detectors that differ in one option each, on the same synthetic D0."""
    config = model_config("efficientdet-d0")
    model = build(config, synthetic_variables(config), "float32")

    def found(**options: Any) -> list[Result]:
        detector = Detector(model, image_size=(256, 256), nms=NMSConfig(**options))
        outputs = [detector(CALIBRATED[i : i + 1])[0] for i in range(2)]
        return [row for i, output in enumerate(outputs) for row in to_results(i, output)]

    right = found()
    assert compare_detections(found(), right).passed
    for options in ({"method": "hard"}, {"sigma": 0.25}, {"max_nms_inputs": 0}, {"max_output_size": 90}):
        parity = compare_detections(found(**options), right)
        print(f"{options}: AP {parity.ap:.4f}, {parity.unmatched_ours} unmatched")
        assert not parity.passed, options


# --- pairing ------------------------------------------------------------------------------------------


def test_iou() -> None:
    boxes = np.array([[0.0, 0, 2, 2], [5.0, 5, 5, 5]])
    others = np.array([[1.0, 1, 3, 3], [0.0, 0, 2, 2], [5.0, 5, 5, 5]])
    np.testing.assert_allclose(iou(boxes, others), np.array([[1 / 7, 1, 0], [0, 0, 0]]))


def test_one_of_the_reference_is_found_once() -> None:
    (row,) = rows(1)
    assert len(pair([row, row], [row])) == len(pair([row], [row, row])) == 1
    assert compare_detections([row, row], [row]).unmatched_ours == 1


def test_the_same_class_goes_before_a_closer_box() -> None:
    """Soft suppression may keep one object under two classes; that is not a changed label."""
    (row,) = rows(1)
    other = {**row, "category_id": row["category_id"] + 1}
    near = {**row, **moved(row, 0.5)}
    assert pair([row], [other, near]) == [(0, 1)]
    assert compare_detections([row, other], [other, near]).label_flips == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 30), st.integers(0, 30))
def test_pairs_are_one_to_one_and_find_themselves(seed: int, count: int, dropped: int) -> None:
    theirs = rows(count, seed)
    order = np.random.default_rng(seed).permutation(count)
    ours = [theirs[i] for i in order][: max(0, count - dropped)]
    pairs = pair(ours, theirs)
    assert sorted(i for i, _ in pairs) == list(range(len(ours)))
    assert all(order[i] == j for i, j in pairs)
