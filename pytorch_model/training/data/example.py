"""One training example, and a data set of them with what was found in it."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from pytorch_model.config import BOUNDS
from pytorch_model.detection.labels import ClassNames
from pytorch_model.detection.results import ImageId
from pytorch_model.evaluation.dataset import DatasetError

#: Why a box is left out: these appear in facts and notes.
NO_AREA = "without width or height"
NOT_FINITE = "with a coordinate that is not a finite number"
OUTSIDE = "past the right or bottom edge of their image, as create_coco_tfrecord.py does"


@dataclass(frozen=True, eq=False)
class Example:
    """One image with its objects.

    ``image``: the encoded file, or pixels, uint8 [H, W, 3], RGB. ``boxes_yxyx``: float32 [M, 4], relative to
    the image's sides; they may reach beyond 0…1. ``classes``: int64 [M], from 1. ``crowd``: bool [M].
    ``area``: float32 [M], as the data states it. ``name``: for messages. ``size``: the (height, width) that
    the boxes were divided by, None if the data states relative boxes.
    """

    image: bytes | np.ndarray
    boxes_yxyx: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    area: np.ndarray
    image_id: ImageId
    name: str
    size: tuple[int, int] | None = None


@dataclass
class Facts:
    """What a data set holds. Crowds are boxes too; ``left_out`` are not.

    ``without_boxes``: images. ``most_boxes``: in one image. ``per_class``: class id → boxes. ``left_out``:
    reason → boxes. ``missing``: image → why it is no example.
    """

    examples: int = 0
    without_boxes: int = 0
    boxes: int = 0
    crowds: int = 0
    most_boxes: int = 0
    per_class: Counter[int] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    missing: dict[str, str] = field(default_factory=dict)

    def lines(self, classes: ClassNames) -> list[str]:
        """The facts as sentences, for a user."""
        unseen = [name for index, name in classes.named.items() if not self.per_class[index]]
        found = [
            f"{self.examples:,} images, {self.boxes:,} boxes of {len(self.per_class)} classes, "
            f"at most {self.most_boxes} in one image",
            f"{len(classes.names)} classes in all, names from {classes.source}",
        ]
        found += [f"images without boxes: {self.without_boxes:,}"] if self.without_boxes else []
        found += [f"boxes of crowds: {self.crowds:,}"] if self.crowds else []
        found += [f"boxes left out, {reason}: {count:,}" for reason, count in self.left_out.items()]
        if self.missing:
            first, reason = next(iter(self.missing.items()))
            count = len(self.missing)
            found.append(f"images left out, not readable: {count:,} (the first is {first}: {reason})")
        if unseen:
            shown = ", ".join(unseen[:5]) + (", …" if len(unseen) > 5 else "")
            found.append(f"{len(unseen)} classes have a name but no box: {shown}")
        return found


class Survey:
    """Counts the examples of a data set, in order, and digests them."""

    def __init__(self) -> None:
        self.facts = Facts()
        self._digest = hashlib.sha256()

    def add(self, example: Example, image_bytes: int, left_out: Counter[str]) -> None:
        """``image_bytes``: the size of the encoded image. ``left_out``: reason → boxes, of this example."""
        count, facts = len(example.classes), self.facts
        facts.examples += 1
        facts.boxes += count
        facts.without_boxes += count == 0
        facts.crowds += int(example.crowd.sum())
        facts.most_boxes = max(facts.most_boxes, count)
        facts.per_class.update(example.classes.tolist())
        facts.left_out.update(left_out)
        self._digest.update(f"{example.image_id!r} {image_bytes} {count}\n".encode())
        for array in (example.boxes_yxyx, example.classes, example.crowd):
            self._digest.update(array.tobytes())

    @property
    def digest(self) -> str:
        """SHA-256 over ids, boxes, classes and image sizes in bytes: whether a resumed run sees the same."""
        return self._digest.hexdigest()


class Examples(Protocol):
    """Examples that are read when they are indexed, in any process.

    Indexing raises :class:`~pytorch_model.detection.preprocess.ImageError` if only an image cannot be read,
    and :class:`~pytorch_model.evaluation.dataset.DatasetError` if the data is damaged.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True, eq=False)
class TrainingData:
    """A data set to train on.

    ``source``: where it was found. ``classes``: one name for each class id from 1, empty where it has none.
    ``notes``: for the user. ``digest``: see :attr:`Survey.digest`.
    """

    source: str
    examples: Examples
    classes: ClassNames
    facts: Facts
    notes: tuple[str, ...]
    digest: str


def most_unreadable(images: int) -> int:
    """How many of a data set's images may be missing or unreadable: one in ten, but always one.

    With more, the folder is rather the wrong one or the copy incomplete.
    """
    return max(1, images // 10)


def check_boxes(facts: Facts, source: str) -> None:
    """Raises :class:`DatasetError` if no box is left in the data set found at ``source``."""
    if not facts.boxes:
        left_out = "".join(
            f"; {count:,} boxes {reason} are left out" for reason, count in facts.left_out.items()
        )
        raise DatasetError(
            f"{source} has {facts.examples:,} images, but no boxes, so there is nothing to learn{left_out}; "
            "give a data set with annotated objects"
        )


def check_classes(largest: int, source: str) -> None:
    """Raises :class:`DatasetError` if the largest class id is beyond what a model may have."""
    most = BOUNDS["num_classes"][1]
    if largest > most:
        raise DatasetError(
            f"{source} has the class id {largest:,}, but a model may have {most:,} classes, one for each "
            "id from 1; number the classes from 1 on"
        )
