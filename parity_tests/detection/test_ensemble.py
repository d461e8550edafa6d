"""Flip test-time augmentation: mirrored boxes, and weighted boxes fusion by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parity_tests.helpers.small_models import one_object_detector
from pytorch_model.detection.ensemble import mirrored, weighted_boxes_fusion
from pytorch_model.errors import ConfigError


def found(*rows: tuple[float, float, float, float, float, int]) -> dict[str, Tensor]:
    """Detections from rows of x1, y1, x2, y2, score, label."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long()}


def check(fused: dict[str, Tensor], *rows: tuple[float, float, float, float, float, int]) -> None:
    expected = found(*rows)
    for key, values in fused.items():
        torch.testing.assert_close(values, expected[key], rtol=1e-5, atol=1e-6)


def test_seen_twice_is_the_weighted_mean() -> None:
    # Overlap 8 / 12: the same object. (0.9 · 0 + 0.3 · 2) / 1.2 = 0.5.
    fused = weighted_boxes_fusion([found((0, 0, 10, 1, 0.9, 3)), found((2, 0, 12, 1, 0.3, 3))])
    check(fused, (0.5, 0, 10.5, 1, 0.6, 3))


def test_seen_once_counts_half() -> None:
    fused = weighted_boxes_fusion([found((0, 0, 10, 10, 0.8, 3)), found((50, 0, 60, 10, 0.9, 90))])
    check(fused, (50, 0, 60, 10, 0.45, 90), (0, 0, 10, 10, 0.4, 3))


def test_more_members_than_runs_are_averaged() -> None:
    same = (0.0, 0.0, 10.0, 10.0)
    fused = weighted_boxes_fusion([found((*same, 0.9, 1), (*same, 0.6, 1)), found((*same, 0.3, 1))])
    check(fused, (*same, 0.6, 1))


def test_classes_never_fuse() -> None:
    same = (0.0, 0.0, 10.0, 10.0)
    check(
        weighted_boxes_fusion([found((*same, 0.8, 1)), found((*same, 0.6, 2))]),
        (*same, 0.4, 1),
        (*same, 0.3, 2),
    )


def test_the_overlap_that_fuses_is_0_55() -> None:
    for shift, count in ((2.8, 1), (3.0, 2)):  # overlaps 7.2 / 12.8 = 0.5625 and 7 / 13 = 0.538
        fused = weighted_boxes_fusion(
            [found((0, 0, 10, 1, 0.5, 1)), found((shift, 0, 10 + shift, 1, 0.5, 1))]
        )
        assert len(fused["scores"]) == count


def test_the_nearest_cluster_takes_it_and_clusters_move() -> None:
    # Two clusters; the third overlaps the second more. The fourth reaches only the mean of the two, 0.75.
    first = found((0, 0, 10, 1, 0.6, 1), (4, 0, 14, 1, 0.6, 1))
    check(
        weighted_boxes_fusion([first, found((2.5, 0, 12.5, 1, 0.6, 1))]),
        (3.25, 0, 13.25, 1, 0.6, 1),
        (0, 0, 10, 1, 0.3, 1),
    )
    moved = weighted_boxes_fusion(
        [found((0, 0, 10, 1, 0.5, 1)), found((2.5, 0, 12.5, 1, 0.5, 1), (4, 0, 14, 1, 0.5, 1))]
    )
    assert len(moved["scores"]) == 1  # 4 is 0.43 from 0, and 0.57 from 1.25


def test_nothing_found() -> None:
    fused = weighted_boxes_fusion([found(), found()])
    assert fused["boxes"].shape == (0, 4)
    check(weighted_boxes_fusion([found(), found((0, 0, 1, 1, 0.5, 1))]), (0, 0, 1, 1, 0.25, 1))


rows = st.lists(
    st.tuples(*[st.floats(0, 100, width=32)] * 4, st.floats(2**-9, 1, width=32), st.integers(1, 3)),
    max_size=12,
)


@given(rows)
def test_fusion_keeps_scores_in_order_and_boxes_within(content: Any) -> None:
    run = found(*((x, y, x + w, y + h, score, label) for x, y, w, h, score, label in content))
    fused = weighted_boxes_fusion([run, run])
    scores = fused["scores"].tolist()
    assert scores == sorted(scores, reverse=True)
    assert set(fused["labels"].tolist()) == set(run["labels"].tolist())
    if content:
        assert max(scores) <= run["scores"].max() * (1 + 1e-5)
        low, high = run["boxes"].min(0).values, run["boxes"].max(0).values
        assert ((fused["boxes"] >= low - 1e-3) & (fused["boxes"] <= high + 1e-3)).all()


@given(rows, st.integers(1, 500))
def test_mirroring_twice_changes_nothing(content: Any, width: int) -> None:
    run = found(*((x, y, x + w, y + h, score, label) for x, y, w, h, score, label in content))
    twice = mirrored(mirrored(run, width), width)
    torch.testing.assert_close(twice["boxes"], run["boxes"], rtol=1e-5, atol=1e-3)
    once = mirrored(run, width)["boxes"]
    assert (once[:, 2] >= once[:, 0] - 1e-3).all()


def test_the_detector_mirrors_input_and_boxes() -> None:
    """This network finds its object at the same place of every input, so the mirrored input gives another."""
    detector = one_object_detector(tta="flip")
    image = torch.zeros(1, 3, 64, 128, dtype=torch.uint8)  # half the network's input of 128 x 256
    (detections,) = detector(image)
    # Centre 88 of 256, side 64: 56 to 120, and mirrored 136 to 200. Each was seen once in two runs.
    expected = torch.tensor([[56.0, 24.0, 120.0, 88.0], [136.0, 24.0, 200.0, 88.0]]) * 0.5
    torch.testing.assert_close(detections["boxes"], expected)
    torch.testing.assert_close(detections["scores"], torch.tensor([4.0, 4.0]).sigmoid() / 2)
    (alone,) = one_object_detector()(image)
    torch.testing.assert_close(alone["boxes"], expected[:1])


def test_the_mirrored_input_is_the_input_mirrored() -> None:
    shown: list[Tensor] = []
    detector = one_object_detector(tta="flip")
    batch = detector.preprocess(torch.arange(3 * 64 * 128).reshape(1, 3, 64, 128).to(torch.uint8))

    def network(images: Tensor) -> Any:
        shown.append(images)
        return detector.model(images)

    detector.detect(batch, network)
    assert torch.equal(shown[0], batch.images)
    assert torch.equal(shown[1], batch.images.flip(3))


def test_an_unknown_augmentation() -> None:
    with pytest.raises(ConfigError, match="tta is 'rotate', must be one of none, flip"):
        one_object_detector(tta="rotate")
