"""Anchor labels against Google's, recorded, and against their definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from parity_tests.training.recorded import labelling, labelling_names
from pytorch_model.anchors import decode_boxes, generate_anchors
from pytorch_model.config import model_config
from pytorch_model.training import targets as module
from pytorch_model.training.targets import Targets, encode_boxes, label_anchors, match_anchors, pairwise_iou

CASES = [(source, name) for source in ("golden", "shared") for name in labelling_names(source)]


def test_every_configuration_is_in_the_golden() -> None:
    configs = {labelling("golden", name).config for name in labelling_names("golden")}
    assert len(configs) == 10


@pytest.mark.parametrize(("source", "name"), CASES, ids=[f"{source}-{name}" for source, name in CASES])
def test_labels_are_googles(source: str, name: str) -> None:
    recorded = labelling(source, name)
    anchors, boxes, classes = generate_anchors(recorded.config), recorded.boxes_yxyx, recorded.classes
    found = label_anchors(anchors, boxes[None], classes[None])
    assert torch.equal(found.classes, recorded.targets.classes)
    assert torch.equal(found.positives, recorded.targets.positives)
    assert float((found.boxes - recorded.targets.boxes).abs().max()) <= 1e-6
    assert torch.equal(found.boxes == 0, recorded.targets.boxes == 0)  # such a coordinate does not count
    if len(boxes):
        real = torch.ones(1, len(boxes), dtype=torch.bool)
        assert torch.equal(match_anchors(anchors, boxes[None], real)[0], recorded.matches)


def batch_of_all() -> tuple[Tensor, Tensor, Tensor, list[Targets]]:
    """Golden labellings of D0 at 256 pixels, padded to the one with the most boxes."""
    pictures = [labelling("golden", name) for name in labelling_names("golden")]
    config = model_config("efficientdet-d0", image_size=(256, 256))
    pictures = [p for p in pictures if p.config == config and len(p.boxes_yxyx) < 100]
    most = max(len(picture.boxes_yxyx) for picture in pictures)
    boxes = torch.full((len(pictures), most, 4), -1.0)
    classes = torch.full((len(pictures), most), -1)
    for index, picture in enumerate(pictures):
        boxes[index, : len(picture.boxes_yxyx)] = picture.boxes_yxyx
        classes[index, : len(picture.boxes_yxyx)] = picture.classes
    return generate_anchors(config), boxes, classes, [picture.targets for picture in pictures]


@pytest.mark.parametrize("chunk", [1 << 22, 100_000, 1], ids=["whole", "chunks", "anchor by anchor"])
def test_neither_a_batch_nor_chunks_change_anything(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._CHUNK, "cpu", chunk)
    anchors, boxes, classes, expected = batch_of_all()
    if chunk == 1:  # a loop over anchors: some of them must do
        anchors = anchors[:40]
        matches = match_anchors(anchors, boxes, classes >= 0)
        monkeypatch.setitem(module._CHUNK, "cpu", 1 << 22)
        assert torch.equal(matches, match_anchors(anchors, boxes, classes >= 0))
        return
    found = label_anchors(anchors, boxes, classes)
    assert len(expected) > 5
    for part, recorded in zip(found, map(torch.cat, zip(*expected, strict=True)), strict=True):
        torch.testing.assert_close(part, recorded, rtol=0, atol=1e-6 if part is found.boxes else 0)


def test_padding_may_stand_anywhere() -> None:
    anchors, boxes, classes, expected = batch_of_all()
    found = label_anchors(anchors, boxes.flip(1), classes.flip(1))
    assert found.positives.tolist() == [float(picture.positives) for picture in expected]


def test_images_without_boxes() -> None:
    anchors = generate_anchors(model_config("efficientdet-d0", image_size=(64, 64)))
    none = label_anchors(anchors, torch.empty(2, 0, 4), torch.empty(2, 0, dtype=torch.int64))
    padded = label_anchors(anchors, torch.full((2, 3, 4), -1.0), torch.full((2, 3), -1))
    for found in (none, padded):
        assert bool((found.classes == module.BACKGROUND).all())
        assert not bool(found.boxes.any())
        assert found.positives.tolist() == [0, 0]


def test_the_first_of_two_boxes_gets_the_anchor_that_both_want() -> None:
    anchors = torch.tensor([[0.0, 0, 8, 8], [0, 0, 100, 100], [50, 50, 60, 60]])
    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 8, 8], [500, 500, 600, 600]]])
    real = torch.ones(1, 3, dtype=torch.bool)
    # Anchor 0 is nearest to box 1, and boxes 0, 1 and 2, which meets no anchor, all force it.
    assert match_anchors(anchors, boxes, real).tolist() == [[0, -1, -1]]
    assert match_anchors(anchors, boxes.flip(1), real).tolist() == [[0, -1, -1]]
    assert match_anchors(anchors, boxes[:, 2:], real[:, 2:]).tolist() == [[0, -1, -1]]
    assert match_anchors(anchors, boxes, torch.tensor([[False, True, True]])).tolist() == [[1, -1, -1]]


def test_iou_by_hand() -> None:
    boxes = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 4, 1], [2, 2, 0, 0]]])
    anchors = torch.tensor([[0.0, 0, 2, 2], [1, 0, 3, 2], [2, 2, 3, 3]])
    expected = torch.tensor([[[1, 1 / 3, 0], [1 / 3, 1 / 3, 0], [0, 0, 0]]])
    torch.testing.assert_close(pairwise_iou(boxes, anchors), expected)
    inverted = torch.tensor([[[0.0, 2, 2, 0]]])  # its area is -4, so that the union is 0
    assert pairwise_iou(inverted, torch.tensor([[5.0, 5, 7, 7]])).tolist() == [[[0]]]


def test_regressions_decode_to_the_box() -> None:
    random = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 50, 2, 2, generator=random, dtype=torch.float64).cumsum(dim=2).flatten(2)
    boxes, anchors = corners
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, anchors), anchors), boxes)


def test_labels_do_not_depend_on_the_type_of_the_boxes() -> None:
    anchors, boxes, classes, _ = batch_of_all()
    plain = label_anchors(anchors, boxes, classes)
    double = label_anchors(anchors.double(), boxes.double(), classes.double())
    for a, b in zip(plain, double, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
