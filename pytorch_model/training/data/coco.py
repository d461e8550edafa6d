"""A data set in COCO's format, its boxes as AutoML's ``dataset/create_coco_tfrecord.py`` writes them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pytorch_model.detection.labels import ClassNames
from pytorch_model.detection.preprocess import ImageError, read_image_file, stored_size
from pytorch_model.evaluation.dataset import Dataset, DatasetError, DatasetImage, read_dataset
from pytorch_model.files import check_regular
from pytorch_model.labels.classes import names_of_ids
from pytorch_model.training.data.example import (
    NO_AREA,
    OUTSIDE,
    Example,
    Facts,
    Survey,
    TrainingData,
    check_boxes,
    check_classes,
    most_unreadable,
)


class CocoExamples:
    """The examples of a COCO data set. An image file is read when its example is indexed.

    The objects of all images lie in four arrays: a process that is forked would copy many small ones.
    """

    def __init__(self, listed: Sequence[tuple[Path, Example]]) -> None:
        """``listed``: image file, and its example without the image."""
        examples = [example for _, example in listed]
        self._heads = [(str(path), each.image_id, each.size) for path, each in listed]
        self._ends = np.cumsum([len(each.classes) for each in examples])
        self._objects = tuple(
            np.concatenate([getattr(each, name) for each in examples])
            for name in ("boxes_yxyx", "classes", "crowd", "area")
        )

    def __len__(self) -> int:
        return len(self._heads)

    def __getitem__(self, index: int) -> Example:
        path, image_id, size = self._heads[index]
        own = slice(self._ends[index - 1] if index else 0, self._ends[index])
        boxes, classes, crowd, area = (each[own] for each in self._objects)
        return Example(read_image_file(Path(path)), boxes, classes, crowd, area, image_id, path, size)


def open_coco(
    folder: Path | None, annotations: Path | None = None, images: Path | None = None, split: str = "train"
) -> TrainingData:
    """The data set that :func:`~pytorch_model.evaluation.dataset.read_dataset` finds for the same arguments.

    Class ids are the category ids; if objects have category 0, they are the category ids + 1, and a note says
    so. There are as many classes as the largest id. Boxes without width or height, and those that reach past
    the right or bottom edge, are left out, as in AutoML's TFRecords; images without boxes are examples.
    Raises :class:`DatasetError`, also if there is no box at all, or if too many images are missing.
    """
    dataset = read_dataset(folder, annotations, images, split=split)
    source = str(dataset.annotations)
    if not dataset.has_ground_truth:
        raise DatasetError(f"{source} lists images without annotations; give one that has annotations")
    classes, first, notes = _classes(dataset, source)
    of_image: dict[Any, list[Mapping[str, Any]]] = {image.id: [] for image in dataset.images}
    for entry in dataset.content["annotations"]:
        of_image[entry["image_id"]].append(entry)
    survey, listed = Survey(), []
    for image in dataset.images:
        try:
            size, image_bytes = _size(image)
        except ImageError as error:
            survey.facts.missing[str(image.path)] = str(error)
            continue
        example, left_out = _example(image, size, of_image[image.id], first)
        survey.add(example, image_bytes, left_out)
        listed.append((image.path, example))
    _check_missing(survey.facts, len(dataset.images), source)
    check_boxes(survey.facts, source)
    examples = CocoExamples(listed)
    return TrainingData(source, examples, classes, survey.facts, (*dataset.notes, *notes), survey.digest)


def _classes(dataset: Dataset, source: str) -> tuple[ClassNames, int, list[str]]:
    """(the classes, the category id of class 1, notes)."""
    used = {entry["category_id"] for entry in dataset.content["annotations"]}
    first = 0 if 0 in used else 1
    if used and min(used) < 0:
        raise DatasetError(f"{source} has objects of category {min(used)}; renumber the categories from 1")
    names = {id_ + 1 - first: name for id_, name in dataset.categories.items() if id_ >= first}
    if not names:
        raise DatasetError(f"{source} has no category with an id from 1 on; renumber the categories from 1")
    check_classes(max(names), source)
    notes = []
    if first == 0:
        notes.append(f"category ids of {dataset.annotations.name} count from 0: the class ids are one larger")
    unused = [name for id_, name in dataset.categories.items() if id_ < first]
    if unused:
        notes.append(f"category {unused[0]!r} is no class: its id is below 1, and no object has it")
    if max(names) >= 2 * len(names):
        notes.append(
            f"{len(names)} categories, but {max(names)} classes, one for each id up to the largest: number "
            "the categories from 1 on for a smaller class predictor"
        )
    return ClassNames(names_of_ids(names, max(names)), dataset.annotations.name), first, notes


def _size(image: DatasetImage) -> tuple[tuple[int, int], int]:
    """((height, width), bytes of the file). The annotations' size counts, as for AutoML.

    Raises :class:`ImageError` if the file is missing, or must be read for the size and cannot be.
    """
    if image.size is not None and min(image.size) > 0:
        try:
            check_regular(image.path)
            return image.size, os.stat(image.path).st_size
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            raise ImageError(f"cannot read the file: {getattr(error, 'strerror', None) or error}") from None
    data = read_image_file(image.path)
    return stored_size(data), len(data)


def _example(
    image: DatasetImage, size: tuple[int, int], entries: Iterable[Mapping[str, Any]], first: int
) -> tuple[Example, Counter[str]]:
    """The example without its image, and reason → boxes left out. Divided in float64, as AutoML does."""
    height, width = size
    left_out = Counter[str]()
    boxes, kept = [], []
    for entry in entries:
        x, y, w, h = entry["bbox"]
        if w <= 0 or h <= 0:
            left_out[NO_AREA] += 1
        elif x + w > width or y + h > height:
            left_out[OUTSIDE] += 1
        else:
            boxes.append((y / height, x / width, (y + h) / height, (x + w) / width))
            kept.append(entry)
    return Example(
        b"",
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array([entry["category_id"] + 1 - first for entry in kept], np.int64),
        np.array([bool(entry["iscrowd"]) for entry in kept], bool),
        np.array([entry["area"] for entry in kept], np.float32),
        image.id,
        str(image.path),
        size,
    ), left_out


def _check_missing(facts: Facts, images: int, source: str) -> None:
    if len(facts.missing) > most_unreadable(images) or not facts.examples:
        first, reason = next(iter(facts.missing.items()))
        raise DatasetError(
            f"{len(facts.missing)} of the {images} images of {source} cannot be read, too many to leave out "
            f"(first {first}: {reason}); complete the folder"
        )
