"""AutoAugment: Google's recorded applications of all operations, its policies, and small images."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.helpers.paths import GOLDENS
from parity_tests.training import auto_augment_truth, input_truth
from parity_tests.training.auto_augment_truth import applications
from parity_tests.training.input_truth import drawn
from pytorch_model.config import model_config
from pytorch_model.training.data.augment import NO_DRAWS, augment
from pytorch_model.training.data.auto_augment.operations import (
    OPERATIONS,
    Operation,
    OperationDraws,
    Picture,
    apply_operation,
)
from pytorch_model.training.data.auto_augment.policies import (
    MOST_OPERATIONS,
    POLICIES,
    PolicyDraws,
    apply_policy,
    draw_policy,
)
from pytorch_model.training.data.settings import InputSettings

_F = np.float32


def draws(boxes: int = 0, **numbers: float) -> OperationDraws:
    values = {name: _F(numbers.get(name, 0)) for name in ("apply", "sign", "y", "x", "box")}
    return OperationDraws(**values, per_box=np.zeros((boxes, 4), _F))


def test_every_recorded_application(shared: Path) -> None:
    """Pixels and boxes equal those of Google's code; all 25 operations occur."""
    pytest.importorskip("PIL", reason="needs Pillow")
    with np.load(input_truth.TRUTH / "autoaugment.npz") as stored:
        recorded = {name: stored[name] for name in stored.files}
    stats = json.loads(bytes(recorded["__stats_json__"]))
    photograph = input_truth.picture(139, "pillow")
    cases = applications(auto_augment_truth.document()["cases"])
    for key, operation, numbers, count in cases:
        found = apply_operation(Picture(photograph, recorded["boxes"][:count]), operation, numbers)
        about = stats[f"{key}/image"]
        samples = found.pixels.reshape(-1)[:: about["stride"]]
        np.testing.assert_array_equal(samples, recorded[f"{key}/image@strided"], err_msg=key)
        assert found.pixels.sum(dtype=np.int64) == about["sum"], key  # the values not recorded
        np.testing.assert_array_equal(found.boxes_yxyx, recorded[f"{key}/boxes"], err_msg=key)
        assert found.boxes_yxyx.dtype == _F
    assert {case.operation.name for case in cases} == set(OPERATIONS)
    assert (len(cases), len(OPERATIONS)) == (82, 25)


def golden() -> tuple[Mapping[str, Any], Mapping[str, np.ndarray]]:
    with np.load(GOLDENS / "training" / "auto_augment.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    return json.loads(bytes(arrays.pop("about"))), arrays


def test_every_recorded_application_without_the_recordings() -> None:
    """Recorded boxes; for the pixels, our results when they equalled the recordings."""
    about, arrays = golden()
    blank = np.zeros((*about["photograph"], 3), np.uint8)
    for key, operation, numbers, count in applications(about["cases"]):
        moved = apply_operation(Picture(blank, arrays["boxes"][:count]), operation, numbers)
        np.testing.assert_array_equal(moved.boxes_yxyx, arrays[f"{key}/boxes"], err_msg=key)
        found = apply_operation(Picture(arrays["picture"], arrays["boxes"][:count]), operation, numbers)
        assert zlib.crc32(found.pixels.tobytes()) == about["checksums"][key], key


def test_the_policies_are_those_of_automl() -> None:
    recorded = golden()[0]["policies"]
    ours = {name: [[list(step) for step in chosen] for chosen in POLICIES[name]] for name in recorded}
    assert ours == recorded
    assert set(POLICIES) - set(recorded) == {"randaug"}
    used = {step.name for choices in POLICIES.values() for chosen in choices for step in chosen}
    assert used <= set(OPERATIONS)
    assert MOST_OPERATIONS == 3


@pytest.mark.parametrize(("apply", "moves"), [(0.0, False), (0.39, False), (0.4, True), (0.9, True)])
def test_an_operation_is_applied_with_its_probability(apply: float, moves: bool) -> None:
    """floor(u + p) = 1, in the last sub-policy of v0: Rotate_BBox 0.6, then Color 1."""
    picture = Picture(drawn(30, 40), np.array([[0.1, 0.3, 0.4, 0.6]], _F))
    numbers = PolicyDraws(_F(0.99), (draws(apply=apply), draws(apply=0.0), draws()))
    found = apply_policy(picture, "v0", numbers)
    turned = apply_operation(picture, Operation("Rotate_BBox", 1, 10), draws()) if moves else picture
    expected = apply_operation(turned, Operation("Color", 1, 6), draws())
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    np.testing.assert_array_equal(found.boxes_yxyx, expected.boxes_yxyx)
    assert np.array_equal(found.boxes_yxyx, picture.boxes_yxyx) != moves


def test_boxes_are_changed_in_the_order_of_their_ranks() -> None:
    """Two boxes share pixels, so what the second gets depends on the first."""
    first, second = [0, 0, 0.9, 0.6], [0, 0.3, 0.9, 0.9]
    flips = Operation("Flip_Only_BBoxes", 1, 10)

    def flipped(ranks: list[float], *boxes: list[float]) -> np.ndarray:
        per_box = np.array([[rank, 0.9, 0, 0] for rank in ranks], _F)
        picture = Picture(drawn(30, 40), np.array(boxes, _F))
        return apply_operation(picture, flips, draws()._replace(per_box=per_box)).pixels

    np.testing.assert_array_equal(flipped([0.2, 0.1], first, second), flipped([0.1, 0.2], second, first))
    assert not np.array_equal(flipped([0.2, 0.1], first, second), flipped([0.1, 0.2], first, second))


def test_augment_applies_the_policy_before_everything_else() -> None:
    given = InputSettings.of(
        model_config("efficientdet-d0"), image_size=(48, 64), autoaugment_policy="randaug"
    )
    picture = Picture(drawn(40, 50), np.array([[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1]], _F))
    crowd = np.array([True, False])
    for seed in range(12):
        policy = draw_policy(np.random.default_rng(seed), 2)
        found = augment(*picture, np.array([1, 2]), crowd, NO_DRAWS._replace(policy=policy), given)
        changed = apply_policy(Picture(picture.pixels, picture.boxes_yxyx[1:]), "randaug", policy)
        plain = InputSettings.of(model_config("efficientdet-d0"), image_size=(48, 64))
        expected = augment(*changed, np.array([2]), crowd[1:], NO_DRAWS, plain)
        np.testing.assert_array_equal(found.image.numpy(), expected.image.numpy())
        np.testing.assert_array_equal(found.boxes_yxyx.numpy(), expected.boxes_yxyx.numpy())


units = st.floats(0, 1, width=32, exclude_max=True)
rows = st.lists(st.tuples(*[st.floats(-0.5, 1.5, width=32)] * 4), max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), rows, st.integers(0, 15), st.integers(0, 1 << 32))
def test_any_operation_on_any_image(
    height: int, width: int, boxes: list[tuple[float, ...]], level: int, seed: int
) -> None:
    """Types and shapes stay, the arguments are not changed, and boxes that move lie in the image."""
    given_boxes = np.array(boxes, _F).reshape(-1, 4)
    pixels = drawn(height, width)
    numbers = draw_policy(np.random.default_rng(seed), len(boxes)).operations[0]
    for name in OPERATIONS:
        found = apply_operation(Picture(pixels, given_boxes), Operation(name, 1, level), numbers)
        assert found.pixels.dtype == np.uint8, name
        assert found.pixels.shape == pixels.shape, name
        assert found.boxes_yxyx.dtype == _F, name
        assert found.boxes_yxyx.shape == given_boxes.shape, name
        if found.boxes_yxyx is not given_boxes:
            assert (found.boxes_yxyx >= 0).all(), name
            assert (found.boxes_yxyx <= 1).all(), name
    np.testing.assert_array_equal(pixels, drawn(height, width))
    np.testing.assert_array_equal(given_boxes, np.array(boxes, _F).reshape(-1, 4))
