"""Anchors, compared with every anchor array recorded from Google's code; decoding of boxes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.helpers.paths import GOLDENS
from pytorch_model.anchors import decode_boxes, generate_anchors
from pytorch_model.config import MODELS, EfficientDetConfig, model_config
from pytorch_model.errors import ConfigError

# The recordings' names of the sizes that are not square: (height, width).
NAMED_SIZES = {"640x384(WxH)": (384, 640), "100x130_hw": (100, 130)}


def recorded_size(key: str) -> tuple[int, int]:
    """``anchors/native_512@strided`` → (512, 512)."""
    name = key.split("@")[0].removeprefix("anchors/").removeprefix("native_")
    return NAMED_SIZES.get(name) or (int(name), int(name))


@pytest.mark.parametrize("model", MODELS)
def test_recorded_anchors_bit_for_bit(shared: Path, model: str) -> None:
    compared = 0
    for file in (shared / "oracle" / model).glob("post_s*.npz"):
        with np.load(file) as stored:
            stats = json.loads(bytes(stored["__stats_json__"]))
            for key in (key for key in stored.files if key.startswith("anchors/")):
                anchors = generate_anchors(model_config(model), recorded_size(key)).numpy()
                stride = stats[key.split("@")[0]]["stride"] if key.endswith("@strided") else 1
                np.testing.assert_array_equal(anchors.reshape(-1)[::stride], stored[key].reshape(-1))
                compared += 1
    assert compared >= 2


@pytest.mark.parametrize("model", MODELS)
def test_golden_anchors_bit_for_bit(model: str) -> None:
    with np.load(GOLDENS / "detections.npz") as stored:
        keys = [key for key in stored.files if key.startswith(f"{model}/anchors/")]
        assert keys
        for key in keys:
            name, stride = key.removeprefix(f"{model}/").split("@")
            anchors = generate_anchors(model_config(model), recorded_size(name)).numpy()
            np.testing.assert_array_equal(anchors.reshape(-1)[:: int(stride)], stored[key])


def test_the_configured_size_is_the_default() -> None:
    config = model_config("efficientdet-d7x")
    assert torch.equal(generate_anchors(config), generate_anchors(config, (1536, 1536)))
    assert generate_anchors(config).shape == (442260, 4)


def test_pairs_are_factors_of_width_and_height() -> None:
    """The form of AutoML's first year, and of k-means anchors; in rounded numbers."""
    config = model_config("efficientdet-d0", aspect_ratios=((1.0, 1.0), (1.4, 0.7), 0.25), num_scales=1)
    boxes_yxyx = generate_anchors(config, (128, 128))[:3].double()
    heights, widths = (boxes_yxyx[:, 2:] - boxes_yxyx[:, :2]).T
    torch.testing.assert_close(widths, torch.tensor([32, 32 * 1.4, 16], dtype=torch.float64))
    torch.testing.assert_close(heights, torch.tensor([32, 32 * 0.7, 64], dtype=torch.float64))
    assert EfficientDetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_anchor_scale_for_each_level() -> None:
    scales = (1.0, 2.0, 3.0, 4.0, 5.0)
    config = model_config("efficientdet-d0", anchor_scale=scales)
    mixed = generate_anchors(config, (256, 256))
    start = 0
    for level, scale in zip(config.levels, scales, strict=True):
        alone = generate_anchors(config.replace(anchor_scale=scale), (256, 256))
        count = (256 >> level) ** 2 * config.num_anchors
        assert torch.equal(mixed[start : start + count], alone[start : start + count])
        start += count
    assert start == len(mixed)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"anchor_scale": (4.0, 4.0)}, "must be one number or one for each of P3–P7"),
        ({"anchor_scale": (4.0, 4.0, 4.0, 4.0, 0.0)}, "anchor_scale is .* must be above 0"),
        ({"aspect_ratios": ((1.0, 1.0, 1.0),)}, r"must be numbers or \(width, height\) pairs"),
        ({"aspect_ratios": ((1.0, -1.0),)}, "aspect_ratios is .* must be above 0"),
    ],
)
def test_impossible_anchors(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        model_config("efficientdet-d0", **changes)


def test_no_regression_leaves_the_anchor() -> None:
    anchors_yxyx = generate_anchors(model_config("efficientdet-d0"), (64, 128))
    boxes_yxyx = decode_boxes(torch.zeros(2, *anchors_yxyx.shape), anchors_yxyx)
    assert (boxes_yxyx - anchors_yxyx).abs().max() < 1e-4  # sides of up to 800 pixels in float32


def test_decoding_one_box_by_hand() -> None:
    # Anchor 10 high, 20 wide around (15, 30); the centre moves by (1, 2), the sides double and halve.
    anchor_yxyx = torch.tensor([10.0, 20.0, 20.0, 40.0])
    box = decode_boxes(torch.tensor([0.1, 0.1, math.log(2.0), math.log(0.5)]), anchor_yxyx)
    torch.testing.assert_close(box, torch.tensor([16.0 - 10, 32.0 - 5, 16.0 + 10, 32.0 + 5]))


sides = st.floats(2, 500)
places = st.floats(-300, 900)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(places, places, sides, sides, places, places, sides, sides), min_size=1))
def test_decoding_inverts_encoding(rows: list[tuple[float, ...]]) -> None:
    """Encoding as in the paper's box targets, then decoding, gives the same boxes."""
    anchor_y, anchor_x, anchor_h, anchor_w, y, x, h, w = torch.tensor(rows, dtype=torch.float64).unbind(1)
    targets = torch.stack(
        ((y - anchor_y) / anchor_h, (x - anchor_x) / anchor_w, (h / anchor_h).log(), (w / anchor_w).log()), 1
    )

    def corners(y: torch.Tensor, x: torch.Tensor, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.stack((y - h / 2, x - w / 2, y + h / 2, x + w / 2), dim=1)

    decoded = decode_boxes(targets, corners(anchor_y, anchor_x, anchor_h, anchor_w))
    torch.testing.assert_close(decoded, corners(y, x, h, w), rtol=0, atol=1e-8)
