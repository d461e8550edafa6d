"""Batches of training examples, read, decoded and augmented by worker processes; the same for any number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pytorch_model.detection.preprocess import ImageError, load_image
from pytorch_model.detection.results import ImageId
from pytorch_model.errors import EfficientDetError
from pytorch_model.evaluation.dataset import DatasetError
from pytorch_model.training.data.example import Example, TrainingData, most_unreadable
from pytorch_model.training.data.sampler import Place, Sampler

#: uint8 image [H, W, 3], RGB, boxes_yxyx float32 [M, 4] relative to it, classes int64 [M] from 1.
Objects: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
#: (image, boxes, classes as above, crowd bool [M], random numbers) → an input of the network.
Augment: TypeAlias = Callable[
    [np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.random.Generator], "NetworkExample"
]
#: A user's own augmentation, before AutoML's: (image, boxes, classes) → the same, changed as it likes. Crowds
#: are left out before. Python's, NumPy's and PyTorch's global random numbers are seeded for each call.
Hook: TypeAlias = Callable[[np.ndarray, np.ndarray, np.ndarray], Objects]

_MOST_TRIES = 10  # examples tried in place of one whose image cannot be read
_ASPECT = 0.02  # relative; rounding the sides of a resized image changes less


class NetworkExample(Protocol):
    """What an augmentation returns.

    ``image``: float32 [3, h, w], normalised, of one size for all examples. ``boxes_yxyx``: float32 [M', 4] in
    its pixels. ``classes``: int64 [M']. ``counts``: what happened on the way, handed on as it is.
    """

    @property
    def image(self) -> Tensor: ...

    @property
    def boxes_yxyx(self) -> Tensor: ...

    @property
    def classes(self) -> Tensor: ...

    @property
    def counts(self) -> tuple[int, ...]: ...


class Batch(NamedTuple):
    """``images``: float32 [N, 3, H, W]. ``boxes_yxyx``: float32 [N, M, 4], pixels. ``classes``: int64 [N, M].

    M is the largest count of the batch, at least 1; the rest is padded with boxes of 0 and class -1.
    ``counts``: of each image, as the augmentation gives them. ``unreadable``: example → its image, and why
    another one is in its place.
    """

    images: Tensor
    boxes_yxyx: Tensor
    classes: Tensor
    image_ids: tuple[ImageId, ...]
    names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    unreadable: dict[int, str]


class _Sample(NamedTuple):
    augmented: NetworkExample
    image_id: ImageId
    name: str
    unreadable: dict[int, str]


class Loader:
    """Batches of ``data``, in the order of ``sampler``.

    ``augment`` makes the network's input; functools.partial binds its settings. ``hook``: a user's own
    augmentation. ``decoder``: see :func:`~pytorch_model.detection.preprocess.load_image`. ``workers``:
    processes; 0: this one. ``pin_memory``: for copies to a GPU.

    The batches depend on the data, the sampler and these settings, not on ``workers``, nor on where an epoch
    was resumed. An image that cannot be read, or that has other proportions than its annotations say, is
    replaced by the next one of the data set and counted in ``unreadable``.
    """

    def __init__(
        self,
        data: TrainingData,
        sampler: Sampler,
        augment: Augment,
        *,
        hook: Hook | None = None,
        decoder: str = "pillow",
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.unreadable: dict[int, str] = {}
        self._sampler = sampler
        self._images = len(data.examples)
        self._position = 0, 0  # the epoch to come, and its first batch
        self._loader = DataLoader(
            _Samples(data, sampler, augment, hook, decoder),
            batch_sampler=_Batches(self),
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # otherwise it draws from the global one, once an epoch
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of ``epoch``, from batch ``start`` on.

        Raises :class:`DatasetError` for damaged data or too many unreadable images, and
        :class:`EfficientDetError` if ``hook`` returns something else than it should, or if a worker ends.
        """
        self._position = epoch, start
        batches = iter(self._loader)
        while (batch := _next(batches)) is not None:
            if isinstance(batch, EfficientDetError):
                raise batch
            self.unreadable.update(batch.unreadable)
            self._check_unreadable()
            yield batch

    def places(self) -> Iterator[list[Place]]:
        """For the DataLoader, which asks at the beginning of each epoch."""
        return self._sampler.batches(*self._position)

    def _check_unreadable(self) -> None:
        if len(self.unreadable) > most_unreadable(self._images):
            raise DatasetError(
                f"{len(self.unreadable)} of {self._images} images cannot be used, too many to leave out "
                f"(first {next(iter(self.unreadable.values()))}); repair the data set"
            )


def _next(batches: Iterator[Any]) -> Any:
    """The next batch, None at the end. The death of a worker becomes one sentence."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise EfficientDetError(
            "a process that reads the data was ended from outside, probably for lack of memory or shared "
            "memory (/dev/shm); use fewer workers"
        ) from None


class _Batches:
    """A batch sampler that begins where its loader is."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[list[Place]]:
        return self._loader.places()


class _Samples(Dataset[Any]):
    """What runs in the workers. Errors are returned: raised, they would come back with tracebacks as text."""

    def __init__(
        self,
        data: TrainingData,
        sampler: Sampler,
        augment: Augment,
        hook: Hook | None,
        decoder: str,
    ) -> None:
        self._examples = data.examples
        self._sampler = sampler
        self._augment = augment
        self._hook = hook
        self._decoder = decoder

    def __getitem__(self, place: Place) -> _Sample | EfficientDetError:
        try:
            example, pixels, unreadable = self._readable(place.example)
            return self._sample(place, example, pixels, unreadable)
        except EfficientDetError as error:
            return error

    def _readable(self, index: int) -> tuple[Example, np.ndarray, dict[int, str]]:
        """(example ``index`` or the next readable one, uint8 [H, W, 3], the unreadable ones)."""
        unreadable: dict[int, str] = {}
        for _ in range(_MOST_TRIES):
            try:
                example = self._examples[index]
                try:
                    return example, decode(example, self._decoder), unreadable
                except ImageError as error:
                    raise ImageError(f"{example.name}: {error}") from None
            except ImageError as error:
                unreadable[index] = str(error)
            index = (index + 1) % len(self._examples)
        raise DatasetError(
            f"{_MOST_TRIES} images in a row cannot be used (the last is {unreadable.popitem()[1]}); repair "
            "the data set"
        )

    def _sample(
        self, place: Place, example: Example, pixels: np.ndarray, unreadable: dict[int, str]
    ) -> _Sample:
        draws = self._sampler.draws(place)
        objects: Objects = pixels, example.boxes_yxyx, example.classes
        crowd = example.crowd
        if self._hook is not None:
            kept = ~crowd
            with _seeded(int(draws.integers(1 << 32))):
                returned = self._hook(pixels, example.boxes_yxyx[kept], example.classes[kept])
            objects = _checked(returned, example.name)
            crowd = np.zeros(len(objects[2]), bool)
        return _Sample(self._augment(*objects, crowd, draws), example.image_id, example.name, unreadable)


def decode(example: Example, decoder: str = "pillow") -> np.ndarray:
    """The pixels of ``example``, uint8 [H, W, 3], RGB.

    Raises :class:`~pytorch_model.detection.preprocess.ImageError` if they cannot be read, or if the size that
    the annotations state has other proportions: its boxes would be elsewhere.
    """
    pixels = load_image(example.image, decoder).pixels.permute(1, 2, 0).contiguous().numpy()
    height, width = pixels.shape[:2]
    if example.size is not None:
        stated = example.size[0] * width, example.size[1] * height
        if abs(stated[0] - stated[1]) > _ASPECT * max(stated):
            raise ImageError(
                f"it has {width} x {height} pixels, but its annotations say {example.size[1]} x "
                f"{example.size[0]}; if it is to be turned (EXIF), turn its pixels, as AutoML does not"
            )
    return pixels


def _checked(objects: Any, name: str) -> Objects:
    """What a hook returned. Raises :class:`EfficientDetError` if it is not what ``augment`` takes."""
    try:
        image, boxes, classes = objects
        image = np.ascontiguousarray(image)
        boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
        classes = np.asarray(classes, np.int64).reshape(-1)
    except (TypeError, ValueError):
        image, boxes, classes = np.zeros(0), np.zeros((0, 4)), np.zeros(0)
    good = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and 0 not in image.shape
    if not good or len(boxes) != len(classes) or not np.isfinite(boxes).all() or (classes < 1).any():
        raise EfficientDetError(
            f"the augmentation given returned something else for {name}; it must return a uint8 image "
            "[H, W, 3], boxes [M, 4] (y, x, y, x, relative to the image) and M classes, from 1"
        )
    return image, boxes, classes


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global random numbers of Python, NumPy and PyTorch; give back their former states."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _collate(samples: Sequence[_Sample | EfficientDetError]) -> Batch | EfficientDetError:
    good: list[_Sample] = []
    for sample in samples:
        if isinstance(sample, EfficientDetError):
            return sample
        good.append(sample)
    inputs = [sample.augmented for sample in good]
    most = max(1, *(len(each.classes) for each in inputs))
    boxes, classes = torch.zeros(len(inputs), most, 4), torch.full((len(inputs), most), -1)
    for row, each in enumerate(inputs):
        boxes[row, : len(each.classes)] = each.boxes_yxyx
        classes[row, : len(each.classes)] = each.classes
    return Batch(
        torch.stack([each.image for each in inputs]),
        boxes,
        classes,
        tuple(sample.image_id for sample in good),
        tuple(sample.name for sample in good),
        tuple(each.counts for each in inputs),
        {index: reason for sample in good for index, reason in sample.unreadable.items()},
    )
