"""Augmentation: every recorded input of AutoML's training, bit for bit, and what must hold for any image."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.helpers.paths import GOLDENS
from parity_tests.training import input_truth
from parity_tests.training.input_truth import D0, SETTINGS, as_draws, drawn
from pytorch_model.config import Resizer, model_config
from pytorch_model.detection.preprocess import preprocess
from pytorch_model.detection.resizing.tensors import normalise, resize_bilinear
from pytorch_model.errors import ConfigError
from pytorch_model.training.data.augment import (
    NO_DRAWS,
    Counts,
    Draws,
    NetworkExample,
    augment,
    draw,
    flip,
    for_validation,
    place,
)
from pytorch_model.training.data.auto_augment.operations import Picture
from pytorch_model.training.data.settings import InputSettings
from pytorch_model.training.data.window import resize_window

SMALL = InputSettings.of(D0, image_size=(48, 64))


def boxes_of(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, np.float32).reshape(-1, 4)


def augmented(
    pixels: np.ndarray,
    boxes_yxyx: np.ndarray,
    draws: Draws = NO_DRAWS,
    given: InputSettings = SMALL,
    crowd: Any = None,
) -> NetworkExample:
    """Classes 1, 2, 3, … tell which box is which."""
    classes = np.arange(1, len(boxes_yxyx) + 1)
    crowd = np.zeros(len(boxes_yxyx), bool) if crowd is None else np.array(crowd)
    return augment(pixels, boxes_yxyx, classes, crowd, draws, given)


def nhwc(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).contiguous().numpy()


# --- recordings ---------------------------------------------------------------------------------------


def test_every_recorded_input_bit_for_bit(shared: Path) -> None:
    """Boxes, classes, scale and pixels of Google's pipeline, for its draws; both decoders."""
    pytest.importorskip("PIL", reason="needs Pillow")
    pytest.importorskip("simplejpeg", reason="needs simplejpeg for the fast DCT")
    cases = input_truth.document()["cases"]
    for case in cases:
        key, size, image_id = case["key"], tuple(case["image_size_hw"]), case["image_id"]
        pixels = input_truth.picture(image_id, "fast-dct" if key.endswith("/fast") else "pillow")
        found = augment(
            pixels,
            *input_truth.annotated(image_id, size),
            as_draws(case["draws"]),
            SETTINGS[case["hparams"]],
        )
        expected = input_truth.recorded(key)
        image = nhwc(found.image)
        assert image.shape == tuple(expected.stats["shape"]), key
        np.testing.assert_array_equal(
            image.reshape(-1)[:: expected.stats["stride"]], expected.samples, err_msg=key
        )
        # The values that are not recorded: 1e-6 of a deviation each is what another order of adding may do.
        assert abs(image.sum(dtype=np.float64) - expected.stats["sum"]) < 1e-6 * image.size, key
        np.testing.assert_array_equal(found.boxes_yxyx.numpy(), expected.boxes_yxyx, err_msg=key)
        np.testing.assert_array_equal(found.classes.numpy(), expected.classes, err_msg=key)
        assert found.image_scale == case["image_scale_to_original"], key
    assert len(cases) == 112


def test_recorded_boxes_at_the_edges(shared: Path) -> None:
    crafted = input_truth.document()["crafted"]
    boxes = input_truth.relative(list(crafted["xywh"].values()), (426, 640))
    for name, draws in crafted["draws"].items():
        found = augmented(np.zeros((426, 640, 3), np.uint8), boxes, as_draws(draws), SETTINGS["512"])
        expected = input_truth.arrays()
        np.testing.assert_array_equal(found.boxes_yxyx.numpy(), expected[f"crafted/{name}/boxes"])
        np.testing.assert_array_equal(found.classes.numpy(), expected[f"crafted/{name}/classes"].reshape(-1))
        assert found.counts == Counts(vanished=len(boxes) - len(found.boxes_yxyx))


def test_a_recorded_image_without_boxes(shared: Path) -> None:
    pytest.importorskip("PIL", reason="needs Pillow")
    case = input_truth.document()["no_annotations"]
    pixels = input_truth.picture(case["image_id"], "pillow")
    found = augmented(pixels, boxes_of(), as_draws(case["draws"]), SETTINGS["128"])
    stats = json.loads(bytes(input_truth.arrays()["__stats_json__"]))["no_annotations/image"]
    samples = nhwc(found.image).reshape(-1)[:: stats["stride"]]
    np.testing.assert_array_equal(samples, input_truth.arrays()["no_annotations/image@strided"])
    assert list(found.boxes_yxyx.shape) == case["boxes_shape"]
    assert found.classes.tolist() == []


def golden() -> Mapping[str, np.ndarray]:
    with np.load(GOLDENS / "training" / "augmentation.npz") as stored:
        return {name: stored[name] for name in stored.files}


def test_every_recorded_input_without_the_recordings() -> None:
    """Some values of each input, from a picture that has only the pixels which they depend on."""
    stored = golden()
    cases = json.loads(bytes(stored["about"]))
    for case in cases:
        key, image_id = case["key"], case["image_id"]
        pixels = np.zeros((*case["image_size_hw"], 3), np.uint8)
        pixels.reshape(-1)[stored[f"{key}/pixel_positions"]] = stored[f"{key}/pixels"]
        found = augment(
            pixels,
            stored[f"{image_id}/boxes"],
            stored[f"{image_id}/classes"],
            stored[f"{image_id}/crowd"],
            as_draws(case["draws"]),
            SETTINGS[case["hparams"]],
        )
        values = nhwc(found.image).reshape(-1)[stored[f"{key}/positions"]]
        np.testing.assert_array_equal(values, stored[f"{key}/values"], err_msg=key)
        np.testing.assert_array_equal(found.boxes_yxyx.numpy(), stored[f"{key}/boxes"], err_msg=key)
        np.testing.assert_array_equal(found.classes.numpy(), stored[f"{key}/classes"], err_msg=key)
        assert found.image_scale == case["image_scale_to_original"], key
    assert len(cases) == 112


# --- where AutoML's code fails -------------------------------------------------------------------------


def test_the_recorded_limit(shared: Path) -> None:
    """AutoML stops at the images that are counted here, and at no others."""
    for text, outcome in input_truth.document()["max_instances"].items():
        boxes, crowds, limit = map(int, re.findall(r"[0-9]+", text))
        rows = np.tile(boxes_of((0.1, 0.2, 0.5, 0.6)), (boxes, 1))
        limited = replace(SMALL, max_instances_per_image=limit)
        found = augmented(drawn(20, 30), rows, NO_DRAWS, limited, np.arange(boxes) < crowds)
        assert found.counts.above_limit == (not outcome.startswith("ok")), text
        assert len(found.boxes_yxyx) == boxes - crowds


@pytest.mark.parametrize(("boxes", "above"), [(99, 0), (100, 1), (150, 1)])
def test_more_boxes_than_the_limit_are_used_and_counted(boxes: int, above: int) -> None:
    """AutoML accepts 99 boxes at a limit of 100, and stops at 100, also if half of them are crowds."""
    rows = np.tile(boxes_of((0.1, 0.2, 0.5, 0.6)), (boxes, 1))
    crowd = np.arange(boxes) % 2 == 0
    found = augmented(drawn(20, 30), rows, crowd=crowd)
    assert len(found.boxes_yxyx) == boxes // 2
    assert found.counts == Counts(crowds=boxes - boxes // 2, above_limit=above)


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (2, 900)])
def test_a_side_scaled_to_nothing_becomes_one_pixel(size: tuple[int, int]) -> None:
    found = augmented(drawn(*size), boxes_of((0, 0, 1, 1)))
    assert found.counts.too_thin == 1
    image = nhwc(found.image)
    assert np.isfinite(image).all()
    assert image.any()
    assert image[1:, 1:].any() == 0  # one row or one column, then padding


def test_a_tiny_target_size() -> None:
    """0.1 x 5 pixels is no pixel in AutoML, which then divides by 0."""
    found = augmented(drawn(20, 30), boxes_of(), NO_DRAWS._replace(scale=np.float32(0.1)), small_target(5))
    assert found.image_scale == pytest.approx(30)
    assert found.counts == Counts(too_thin=1)


def small_target(side: int) -> InputSettings:
    return replace(SMALL, target_size=(side, side))


# --- the rules, one by one -----------------------------------------------------------------------------


def test_a_draw_of_exactly_one_half_does_not_flip() -> None:
    pixels = drawn(48, 64)
    box = boxes_of((0.25, 0, 0.5, 0.25))
    kept = augmented(pixels, box, NO_DRAWS._replace(flip=np.float32(0.5)))
    flipped = augmented(pixels, box, NO_DRAWS._replace(flip=np.nextafter(np.float32(0.5), np.float32(1))))
    assert torch.equal(kept.image, augmented(pixels, box).image)
    assert torch.equal(flipped.image, kept.image.flip(2))
    assert kept.boxes_yxyx.tolist() == [[12, 0, 24, 16]]
    assert flipped.boxes_yxyx.tolist() == [[12, 48, 24, 63]]  # clipped to the last column
    without = replace(SMALL, input_rand_hflip=False)
    never = augmented(pixels, box, NO_DRAWS._replace(flip=np.float32(1)), without)
    assert torch.equal(never.image, kept.image)


def test_the_padding_has_the_mean_colour() -> None:
    half = NO_DRAWS._replace(scale=np.float32(0.5))
    found = augmented(np.full((48, 64, 3), 200, np.uint8), boxes_of(), half)
    assert found.image[:, :24, :32].ne(0).all()
    assert found.image[:, 24:].eq(0).all()
    assert found.image[:, :, 32:].eq(0).all()


def test_advprop_pads_with_black() -> None:
    """AutoML maps 0…255 to [-1, 1] after padding."""
    advprop = model_config("efficientdet-d0", mean_rgb=(127.5,) * 3, stddev_rgb=(127.5,) * 3)
    given = InputSettings.of(advprop, scale_range=True, image_size=(48, 64))
    half = NO_DRAWS._replace(scale=np.float32(0.5))
    found = augmented(np.full((48, 64, 3), 255, np.uint8), boxes_of(), half, given)
    assert found.image[:, :24, :32].eq(1).all()
    assert found.image[:, 24:].eq(-1).all()


def test_crowds_are_skipped_unless_asked_for() -> None:
    rows = boxes_of((0, 0, 0.5, 0.5), (0, 0, 1, 1))
    skipped = augmented(drawn(48, 64), rows, crowd=[True, False])
    assert skipped.classes.tolist() == [2]
    assert skipped.counts == Counts(crowds=1)
    keeping = replace(SMALL, skip_crowd_during_training=False)
    kept = augmented(drawn(48, 64), rows, NO_DRAWS, keeping, [True, False])
    assert kept.classes.tolist() == [1, 2]
    assert kept.counts == Counts()


def test_boxes_without_area_or_not_finite_vanish() -> None:
    inf, nan = float("inf"), float("nan")
    rows = boxes_of(
        (1.2, 0, 1.5, 1),
        (0, -1, 1, -0.1),
        (0.5, 0.5, 0.5, 0.9),
        (nan, 0, 1, 1),
        (0, 0, 1, inf),
        (0, 0, 1, 1.005),
    )
    for found in (
        augmented(drawn(48, 64), rows),
        for_validation(drawn(48, 64), rows, np.arange(1, 7), SMALL),
    ):
        assert found.classes.tolist() == [6]
        assert found.boxes_yxyx.tolist() == [[0, 0, 47, 63]]
        assert found.counts == Counts(vanished=5)


def test_the_validation_input_is_that_of_detection() -> None:
    """Crowds stay, nothing is drawn, and ``target_size`` is for training."""
    pixels = drawn(41, 59)
    rows = boxes_of((0, 0, 1, 1), (0.25, 0.25, 0.5, 0.75))
    config = model_config("efficientdet-lite0")
    given = InputSettings.of(config, image_size=(48, 64), target_size=(200, 200))
    found = for_validation(pixels, rows, np.array([3, 4]), given)
    expected = preprocess([pixels], config, (48, 64))
    assert torch.equal(found.image, expected.images[0])
    assert found.image_scale == expected.image_scales[0, 0]
    assert found.classes.tolist() == [3, 4]
    assert found.boxes_yxyx.tolist() == [[0, 0, 44, 63], [11, 16, 22, 48]]


# --- draws ---------------------------------------------------------------------------------------------


def test_draws_repeat_and_keep_their_order() -> None:
    """The first four do not depend on the policy or on the number of boxes."""
    jittered = replace(SMALL, jitter_min=0.8, jitter_max=1.2)
    plain = draw(np.random.default_rng(5), jittered, 3)
    again = draw(np.random.default_rng(5), replace(jittered, autoaugment_policy="v1"), 7)
    assert plain[:4] == again[:4]
    assert plain.policy is None
    assert again.policy is not None
    assert [each.per_box.shape for each in again.policy.operations] == [(7, 4)] * 3
    numbers = np.random.default_rng(5).random(4, np.float32)
    assert plain.flip == numbers[0]
    assert plain[2:4] == (numbers[2], numbers[3])
    assert {type(value) for value in plain[:4]} == {np.float32}


def test_draws_cover_their_ranges() -> None:
    generator = np.random.default_rng(0)
    found = np.array([draw(generator, SMALL, 0)[:4] for _ in range(4000)])
    assert abs((found[:, 0] > 0.5).mean() - 0.5) < 0.05
    assert found[:, 1].min() >= np.float32(0.1)
    assert found[:, 1].max() <= 2
    assert abs(found[:, 1].mean() - 1.05) < 0.05
    assert found[:, 2:].min() >= 0
    assert found[:, 2:].max() < 1


# --- properties ----------------------------------------------------------------------------------------

units = st.floats(0, 1, width=32, exclude_max=True).map(np.float32)
sides = st.integers(1, 70)
numbers = st.floats(-3, 4, width=32)


@st.composite
def all_draws(create: Any, low: float = 0.1, high: float = 2.0) -> Draws:
    scale = np.float32(create(st.floats(low, high)))
    return Draws(create(units), scale, create(units), create(units))


@st.composite
def all_boxes(create: Any) -> np.ndarray:
    rows = create(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=6))
    return boxes_of(*rows)


@settings(max_examples=150, deadline=None)
@given(sides, sides, sides, sides, all_boxes(), all_draws())
def test_boxes_stay_inside_the_input(
    height: int, width: int, high: int, wide: int, boxes: np.ndarray, draws: Draws
) -> None:
    pixels = drawn(height, width)
    before = pixels.copy(), boxes.copy()
    found = augmented(pixels, boxes, draws, InputSettings.of(D0, image_size=(high, wide)))
    np.testing.assert_array_equal(pixels, before[0])
    np.testing.assert_array_equal(boxes, before[1])
    assert found.image.dtype == found.boxes_yxyx.dtype == torch.float32
    assert found.image.shape == (3, high, wide)
    assert found.image.isfinite().all()
    assert found.boxes_yxyx.isfinite().all()
    assert found.boxes_yxyx.ge(0).all()
    assert found.boxes_yxyx.le(torch.tensor([high - 1, wide - 1] * 2)).all()
    assert len(found.boxes_yxyx) == len(found.classes) == len(boxes) - found.counts.vanished
    assert np.isfinite(found.image_scale)


@settings(max_examples=150, deadline=None)
@given(sides, sides, st.integers(1, 150), st.integers(1, 150), sides, sides, units, units, st.booleans())
def test_a_window_equals_the_whole_resized_image(
    height: int,
    width: int,
    new_height: int,
    new_width: int,
    high: int,
    wide: int,
    u: float,
    v: float,
    turned: bool,
) -> None:
    """Bit for bit: the pixels that are left out make no difference."""
    pixels = drawn(height, width)
    pixels = pixels[:, ::-1] if turned else pixels
    top, left = int(u * max(0, new_height - high)), int(v * max(0, new_width - wide))
    found = np.zeros((3, high, wide), np.float32)
    resize_window(pixels, (new_height, new_width), (top, left), D0.mean_rgb, D0.stddev_rgb, found)
    whole = resize_bilinear(
        normalise(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), D0), (new_height, new_width)
    ).numpy()
    window = whole[:, top : top + high, left : left + wide]
    np.testing.assert_array_equal(found[:, : window.shape[1], : window.shape[2]], window)
    assert not found[:, window.shape[1] :].any()
    assert not found[:, :, window.shape[2] :].any()


@settings(max_examples=100, deadline=None)
@given(sides, sides, st.lists(st.tuples(*[st.integers(0, 1 << 24)] * 4), max_size=5))
def test_flipping_twice_changes_nothing(height: int, width: int, rows: list[tuple[int, ...]]) -> None:
    """Exactly, for every box whose distance from the right edge float32 can hold."""
    picture = Picture(drawn(height, width), boxes_of(*rows) / np.float32(1 << 24))
    once = flip(picture)
    assert once.boxes_yxyx.dtype == np.float32
    twice = flip(once)
    np.testing.assert_array_equal(once.pixels, picture.pixels[:, ::-1])
    np.testing.assert_array_equal(twice.pixels, picture.pixels)
    np.testing.assert_array_equal(twice.boxes_yxyx, picture.boxes_yxyx)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), all_draws(), st.integers(1, 1600), st.integers(1, 1600))
def test_the_crop_lies_in_the_scaled_image(
    height: int, width: int, draws: Draws, high: int, wide: int
) -> None:
    placement = place((height, width), draws, (high, wide), (high, wide))
    for size, offset, side in zip(placement.size, placement.offset, (high, wide), strict=True):
        assert 0 <= offset <= max(0, size - side)
        assert 1 <= size <= max(1, 2 * side)


# --- settings ------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_automl() -> None:
    found = InputSettings.of(D0)
    assert found == InputSettings(
        image_size=(512, 512),
        mean_rgb=D0.mean_rgb,
        stddev_rgb=D0.stddev_rgb,
        scale_range=False,
        input_rand_hflip=True,
        jitter_min=0.1,
        jitter_max=2.0,
        target_size=None,
        autoaugment_policy=None,
        grid_mask=False,
        skip_crowd_during_training=True,
        max_instances_per_image=100,
    )


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"jitter_min": 0}, "jitter_min is 0, must be a number above 0"),
        ({"jitter_min": float("nan")}, "jitter_min is nan"),
        ({"jitter_min": 3.0}, r"jitter_max is 2.0, must be from jitter_min \(3.0\) to 100"),
        ({"jitter_max": 1e9}, "jitter_max is 1000000000.0"),
        ({"jitter_max": "2"}, "jitter_max is '2'"),
        ({"target_size": (640, 0)}, r"target_size is \(640, 0\), must be None or \(height, width\)"),
        ({"target_size": 640}, "target_size is 640"),
        ({"target_size": (640, 10**6)}, "target_size is "),
        ({"grid_mask": True}, "grid_mask is not supported: no recording proves it"),
        (
            {"autoaugment_policy": "v9"},
            "autoaugment_policy is 'v9', must be None or one of v0, v1, v2, v3, randaug",
        ),
        ({"max_instances_per_image": 0}, "max_instances_per_image is 0, must be a whole number from 1"),
        ({"scale_range": True}, "scale_range=true is for models whose mean_rgb and stddev_rgb are 127.5"),
    ],
)
def test_impossible_settings_are_named(hparams: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        InputSettings.of(D0, **hparams)


def test_another_resizer_is_refused() -> None:
    config = model_config("efficientdet-d0", resizer=Resizer("fixed_shape"))
    with pytest.raises(ConfigError, match="its images are stretched to the input's shape; training makes"):
        InputSettings.of(config)
