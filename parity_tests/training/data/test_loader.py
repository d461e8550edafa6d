"""Batches depend on the seed alone: not on workers, processes, or where an epoch was resumed."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from parity_tests.training.data.written_data import coco_folder, detection_records, picture
from pytorch_model.detection.preprocess import ImageError
from pytorch_model.errors import ConfigError, EfficientDetError
from pytorch_model.evaluation.dataset import DatasetError
from pytorch_model.training.data.example import Example, TrainingData
from pytorch_model.training.data.loader import Batch, Hook, Loader, decode
from pytorch_model.training.data.sampler import Sampler
from pytorch_model.training.data.sources import open_data


class Augmented(NamedTuple):
    image: Tensor
    boxes_yxyx: Tensor
    classes: Tensor
    counts: tuple[int, ...]


def augment(
    image: np.ndarray, boxes: np.ndarray, classes: np.ndarray, crowd: np.ndarray, draws: np.random.Generator
) -> Augmented:
    """Brightness by chance, a fixed size, boxes in pixels; crowds are counted."""
    bright = torch.from_numpy(image[:24, :32].astype(np.float32)).permute(2, 0, 1) * draws.random()
    in_pixels = torch.from_numpy(boxes * np.array([24, 32, 24, 32], np.float32))
    return Augmented(bright, in_pixels, torch.from_numpy(classes), (int(crowd.sum()),))


def batches(loader: Loader, epochs: Sequence[int] = (0,), start: int = 0) -> list[Batch]:
    return [batch for epoch in epochs for batch in loader.epoch(epoch, start)]


def assert_same(some: Sequence[Batch], others: Sequence[Batch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert (one.image_ids, one.names, one.unreadable) == (other.image_ids, other.names, other.unreadable)
        for mine, yours in zip(one[:3], other[:3], strict=True):
            assert torch.equal(mine, yours)


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    return open_data(detection_records(tmp_path / "x.tfrecord", 11))


# --- sampler ------------------------------------------------------------------------------------------


def examples_of(sampler: Sampler, epoch: int, start: int = 0) -> list[list[int]]:
    return [[place.example for place in batch] for batch in sampler.batches(epoch, start)]


def test_every_epoch_takes_every_example_once_in_its_own_order() -> None:
    sampler = Sampler(100, 10)
    epochs = [list(chain(*examples_of(sampler, epoch))) for epoch in range(3)]
    for order in epochs:
        assert sorted(order) == list(range(100))
    assert len({tuple(order) for order in epochs}) == 3
    assert examples_of(sampler, 1) == examples_of(Sampler(100, 10), 1)
    assert examples_of(sampler, 1) != examples_of(Sampler(100, 10, seed=1), 1)


def test_the_order_is_the_same_everywhere() -> None:
    """Numbers noted down: a run goes on with the same batches on another machine and other versions."""
    assert examples_of(Sampler(10, 10, seed=3), 2) == [[9, 0, 1, 5, 6, 4, 7, 3, 8, 2]]


def test_the_last_partial_batch_is_dropped() -> None:
    sampler = Sampler(11, 4)
    assert sampler.steps == 2
    assert [len(batch) for batch in sampler.batches(0)] == [4, 4]


def test_processes_share_the_batches() -> None:
    whole = examples_of(Sampler(50, 8), 4)
    for processes in (2, 4, 8):
        parts = [examples_of(Sampler(50, 8, rank=rank, processes=processes), 4) for rank in range(processes)]
        assert [list(chain(*step)) for step in zip(*parts, strict=True)] == whole


def test_an_epoch_goes_on_where_it_was_left() -> None:
    assert examples_of(Sampler(50, 8), 4, start=3) == examples_of(Sampler(50, 8), 4)[3:]
    assert examples_of(Sampler(50, 8), 4, start=6) == []


def test_the_draws_are_independent() -> None:
    sampler = Sampler(10, 10)
    draws = {
        tuple(Sampler(10, 10, seed).draws(place).random(4))
        for seed in (0, 1)
        for epoch in (0, 1)
        for batch in sampler.batches(epoch)
        for place in batch
    }
    assert len(draws) == 40


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((10, 0), ConfigError, "the batch size is 0, must be at least 1"),
        ((10, 2, -1), ConfigError, "the seed is -1, must be at least 0"),
        ((10, 3, 0, 0, 2), ConfigError, "the batch size is 3, must be a multiple of the 2 processes"),
        ((7, 8), DatasetError, "the data has 7 images, fewer than a batch of 8; choose a smaller batch size"),
    ],
)
def test_what_no_sampler_can_do(arguments: Sequence[int], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Sampler(*arguments)


# --- loader -------------------------------------------------------------------------------------------


def test_a_batch(data: TrainingData) -> None:
    (batch, *_) = batches(Loader(data, Sampler(11, 3), augment))
    assert batch.images.shape == (3, 3, 24, 32)
    assert batch.images.dtype == torch.float32
    assert batch.boxes_yxyx.dtype == torch.float32
    assert batch.classes.dtype == torch.int64
    assert torch.allclose(batch.boxes_yxyx[0, 0], torch.tensor([2.4, 6.4, 14.4, 22.4]))
    assert batch.names == tuple(f"{index}.png" for index in batch.image_ids)


def test_batches_are_the_same_for_any_number_of_workers(data: TrainingData) -> None:
    expected = batches(Loader(data, Sampler(11, 2), augment), (0, 1))
    for workers in (1, 2):
        assert_same(batches(Loader(data, Sampler(11, 2), augment, workers=workers), (0, 1)), expected)


def test_batches_are_the_same_after_a_resume(data: TrainingData) -> None:
    expected = batches(Loader(data, Sampler(11, 2), augment), (0, 1))
    for workers in (0, 2):
        loader = Loader(data, Sampler(11, 2), augment, workers=workers)
        next(loader.epoch(0))  # an epoch that is left early
        assert_same(batches(loader, (1,), start=3), expected[5 + 3 :])


def test_the_union_over_processes_is_the_batch(data: TrainingData) -> None:
    whole = batches(Loader(data, Sampler(11, 4), augment))
    parts = [batches(Loader(data, Sampler(11, 4, rank=rank, processes=2), augment)) for rank in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))


def test_global_random_numbers_stay_as_they_are(data: TrainingData) -> None:
    """Stochastic depth draws from them: a resumed run must not depend on how often data was opened."""

    def hook(*objects: np.ndarray) -> Any:
        random.random(), np.random.rand(), torch.rand(1)
        return objects

    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore
    for workers in (0, 1):
        batches(Loader(data, Sampler(11, 2), augment, hook=hook, workers=workers), (0, 1))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore
    assert torch.equal(torch.get_rng_state(), before[2])


def test_boxes_are_padded_to_the_largest_count(tmp_path: Path) -> None:
    boxes = [[4, 6, 8, 12], [1, 1, 2, 2], [3, 3, 4, 4]]
    entries = [
        {"id": 1 + number, "image_id": image, "category_id": 1, "bbox": box}
        for number, (image, box) in enumerate([(0, boxes[0]), (1, boxes[0]), (1, boxes[1]), (1, boxes[2])])
    ]
    data = open_data(coco_folder(tmp_path / "x", 3, annotations=entries))
    (batch,) = batches(Loader(data, Sampler(3, 3), augment))
    row = {image: number for number, image in enumerate(batch.image_ids)}
    assert batch.classes[row[0]].tolist() == [1, -1, -1]
    assert batch.classes[row[1]].tolist() == [1, 1, 1]
    assert batch.classes[row[2]].tolist() == [-1, -1, -1]
    assert not batch.boxes_yxyx[row[2]].any()
    for one in batches(Loader(data, Sampler(3, 1), augment)):
        assert one.boxes_yxyx.shape == (1, max(1, int((one.classes > 0).sum())), 4)


def test_crowds_go_to_the_augmentation_and_not_to_a_hook(tmp_path: Path) -> None:
    data = open_data(detection_records(tmp_path / "x.tfrecord", 2, is_crowd=[1, 0]))
    (batch,) = batches(Loader(data, Sampler(2, 2), augment))
    assert (batch.classes.tolist(), batch.counts) == ([[1, 3], [1, 3]], ((1,), (1,)))
    (batch,) = batches(Loader(data, Sampler(2, 2), augment, hook=lambda *objects: objects))
    assert (batch.classes.tolist(), batch.counts) == ([[3], [3]], ((0,), (0,)))


# --- a user's augmentation ----------------------------------------------------------------------------


def test_a_hook_sees_and_changes_an_example_with_draws_of_its_own(data: TrainingData) -> None:
    def hook(image: np.ndarray, boxes: np.ndarray, classes: np.ndarray) -> Any:
        assert image.shape == (24, 32, 3)
        assert image.dtype == np.uint8
        drawn = random.random(), np.random.rand(), float(torch.rand(1))
        assert len(set(drawn)) == 3
        return np.full_like(image, int(255 * sum(drawn) / 3)), boxes[:1].tolist(), [2]

    expected = batches(Loader(data, Sampler(11, 2), augment, hook=hook))
    assert len({float(batch.images.max()) for batch in expected}) > 1
    assert all(batch.classes.tolist() == [[2], [2]] for batch in expected)
    assert_same(batches(Loader(data, Sampler(11, 2), augment, hook=hook, workers=2)), expected)


@pytest.mark.parametrize(
    "returned",
    [
        lambda image, boxes, classes: None,
        lambda image, boxes, classes: (image.astype(np.float32), boxes, classes),
        lambda image, boxes, classes: (image[..., 0], boxes, classes),
        lambda image, boxes, classes: (image[:0], boxes, classes),
        lambda image, boxes, classes: (image, boxes[:, :3], classes),
        lambda image, boxes, classes: (image, boxes[:1], classes),
        lambda image, boxes, classes: (image, boxes * np.nan, classes),
        lambda image, boxes, classes: (image, boxes, classes * 0),
        lambda image, boxes, classes: (image, boxes, ["ant", "bee"]),
    ],
)
def test_a_hook_that_returns_something_else(data: TrainingData, returned: Hook) -> None:
    with pytest.raises(
        EfficientDetError, match=r"the augmentation given returned something else for \d+.png"
    ):
        batches(Loader(data, Sampler(11, 2), augment, hook=returned))


# --- images and data that cannot be read ---------------------------------------------------------------


def spoilt(tmp_path: Path, spoil: Callable[[Path], object], *numbers: int) -> TrainingData:
    """20 images, some spoilt after the data set was opened."""
    data = open_data(coco_folder(tmp_path / "x", 20))
    for number in numbers:
        spoil(tmp_path / "x" / "train" / f"{number}.png")
    return data


SPOILERS: dict[str, Callable[[Path], object]] = {
    "cannot read the file: No such file": Path.unlink,
    "not an image": lambda path: path.write_bytes(b"something else"),
    "it has 24 x 32 pixels, but its annotations say 32 x 24": lambda path: path.write_bytes(
        picture(0, (32, 24))
    ),
}


@pytest.mark.parametrize("words", SPOILERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_and_counted(tmp_path: Path, words: str, workers: int) -> None:
    data = spoilt(tmp_path, SPOILERS[words], 5, 6)
    loader = Loader(data, Sampler(20, 4), augment, workers=workers)
    ids = [image for batch in batches(loader) for image in batch.image_ids]
    assert sorted(ids) == sorted([*range(5), 7, 7, *range(7, 20)])
    assert set(loader.unreadable) == {5, 6}
    assert words in loader.unreadable[5]
    assert "5.png" in loader.unreadable[5] or words.startswith("cannot read")
    assert_same(batches(Loader(data, Sampler(20, 4), augment)), batches(loader))


def test_too_many_unreadable_images_stop(tmp_path: Path) -> None:
    data = spoilt(tmp_path, Path.unlink, 3, 9, 15)
    with pytest.raises(DatasetError, match=r"3 of 20 images cannot be used, too many to leave out \(first "):
        batches(Loader(data, Sampler(20, 4), augment))
    with pytest.raises(DatasetError, match="10 images in a row cannot be used"):
        batches(Loader(spoilt(tmp_path / "all", Path.unlink, *range(20)), Sampler(20, 4), augment))


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_data_stops_with_one_sentence(tmp_path: Path, workers: int) -> None:
    path = detection_records(tmp_path / "x.tfrecord", 4)
    data = open_data(path)
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(DatasetError) as raised:
        batches(Loader(data, Sampler(4, 4), augment, workers=workers))
    advice = "fetch the file again, or write it again"
    damage = "is damaged: the checksum of its data is wrong"
    assert str(raised.value) == f"{path}, record 1 at byte 0, {damage}; {advice}"


def test_a_worker_that_ends(data: TrainingData) -> None:
    def end(*_: Any) -> Any:
        os._exit(1)

    with pytest.raises(EfficientDetError, match="a process that reads the data was ended from outside"):
        batches(Loader(data, Sampler(11, 2), end, workers=1))


def test_other_errors_keep_their_traceback(data: TrainingData) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("a mistake of the augmentation")

    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="a mistake of the augmentation"):
            batches(Loader(data, Sampler(11, 2), fail, workers=workers))


def test_a_resized_image_keeps_its_boxes() -> None:
    nothing = np.zeros(0)
    for size, stated, fits in (
        ((24, 32), (48, 64), True),
        ((25, 33), (100, 133), True),
        ((24, 32), (32, 24), False),
    ):
        pixels = np.zeros((*size, 3), np.uint8)
        example = Example(pixels, nothing, nothing, nothing, nothing, 1, "x", stated)
        if fits:
            assert decode(example).shape == pixels.shape
        else:
            with pytest.raises(ImageError, match="but its annotations say 24 x 32; if it is to be turned"):
                decode(example)
