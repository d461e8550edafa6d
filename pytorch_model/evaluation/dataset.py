"""A data set in COCO's format: read, checked, completed if custom annotations leave something out.

Source: COCO's data format (cocodataset.org).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pytorch_model.detection.results import ImageId
from pytorch_model.errors import EfficientDetError, Reason
from pytorch_model.files import parse_json, read_bounded, sha256_of_file

#: Bytes of an annotation file. COCO's largest have 0.5 GB; parsed, they take ten times as much memory.
MOST_BYTES = 4 << 30


class DatasetError(EfficientDetError):
    """Annotations or images are missing, not in COCO's format, or for other classes than the model's."""


@dataclass(frozen=True)
class DatasetImage:
    """``size``: (height, width) according to the annotations, None if they do not state it."""

    id: ImageId
    path: Path
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Dataset:
    """``content``: the annotations, in COCO's format. ``categories``: id → name. ``notes``: for the user."""

    annotations: Path
    folder: Path
    images: tuple[DatasetImage, ...]
    categories: Mapping[int, str]
    content: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def has_ground_truth(self) -> bool:
        """False if the file only lists images, such as COCO's ``image_info_test-dev2017.json``."""
        return "annotations" in self.content

    @cached_property
    def used_categories(self) -> Set[int]:
        """The ids of the categories that have annotations; all ids if there are no annotations at all."""
        return {entry["category_id"] for entry in self.content.get("annotations", ())} or set(self.categories)


def read_dataset(
    folder: Path | None,
    annotations: Path | None = None,
    images: Path | None = None,
    limit: int | None = None,
    split: str = "val",
) -> Dataset:
    """Read a data set in COCO's format.

    ``folder`` holds the images and ``annotations/instances_*.json`` (or a single ``instances_*.json``, or a
    single ``.json``); ``annotations`` and ``images`` override what is found there. ``limit``: how many images
    to use, the first ones of the annotations. ``split``: what the name of the annotation file contains, if
    there are several. Raises :class:`DatasetError`.
    """
    if folder is not None and not os.path.isdir(folder):  # Path.is_dir raises on a name that is too long
        raise DatasetError(f"--coco {folder} is not a folder; give the one with the annotations and images")
    file = annotations or _find_annotations(folder, split)
    content = _read_annotations(file)
    folder = images or _find_images(folder or file.parent, content["images"], file)
    if not os.path.isdir(folder):
        raise DatasetError(f"--images {folder} is not a folder; give the one with the images")
    entries = content["images"][:limit]
    listed = tuple(DatasetImage(image["id"], folder / image["file_name"], _size(image)) for image in entries)
    categories = {category["id"]: str(category["name"]) for category in content["categories"]}
    notes = _repair(content, categories) if "annotations" in content else []
    strangers = _files_without_entry(folder, content["images"])
    if strangers:
        notes.append(f"{strangers} images in {folder} are not in {file.name}: left out")
    return Dataset(file, folder, listed, categories, content, tuple(notes))


def _find_annotations(folder: Path | None, split: str) -> Path:
    if folder is None:
        raise DatasetError("there are no annotations; give --coco or --annotations")
    for place, pattern in (
        ("annotations", "instances_*.json"),
        (".", "instances_*.json"),
        (".", "*.json"),
        ("annotations", "*.json"),
    ):
        found = sorted((folder / place).glob(pattern))
        of_split = [file for file in found if split in file.stem]
        if len(found) > 1 and len(of_split) == 1:
            found = of_split
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:4])
            raise DatasetError(
                f"{folder / place} holds several annotation files ({names}); give --annotations"
            )
        if found:
            return found[0]
    raise DatasetError(
        f"{folder} holds no annotation file (annotations/instances_*.json); give --annotations"
    )


def _find_images(folder: Path, entries: Sequence[Mapping[str, Any]], annotations: Path) -> Path:
    """The folder in ``folder`` that holds most of the first images."""
    split = annotations.stem.partition("_")[2]  # instances_val2017 → val2017
    root = folder.parent if folder.name == "annotations" else folder
    candidates = [root / split, root / "images" / split, root / "images", root]
    candidates += sorted(place for place in root.iterdir() if place.is_dir())
    names = [entry["file_name"] for entry in entries[:20]]
    counts = [sum(os.path.isfile(place / name) for name in names) for place in candidates]
    if not any(counts):
        raise DatasetError(
            f"{folder} holds no image of {annotations.name} ({reprlib.repr(names[0])}, …); give --images"
        )
    return candidates[counts.index(max(counts))]


def _read_annotations(file: Path) -> dict[str, Any]:
    try:
        data = read_bounded(file, MOST_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(
            f"cannot read the annotations {file}: {reason}; give a JSON file in COCO's format"
        ) from None
    try:
        content = parse_json(data)
        _check_form(content)
    except Reason as reason:
        raise DatasetError(
            f"{file} is not in COCO's format: {reason}; correct it, or give another --annotations"
        ) from None
    return dict(content)


def _check_form(content: Any) -> None:
    """Raises :class:`Reason` unless ``content`` is a data set in COCO's format."""
    if not isinstance(content, dict):
        raise Reason("it is not an object")
    for key, required in (("images", True), ("categories", True), ("annotations", False)):
        if key not in content and required:
            raise Reason(f"it lacks {key!r}")
        entries = content.get(key, [])
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise Reason(f"its {key} are not a list of objects")
        if required and not entries:
            raise Reason(f"its {key} are an empty list")
    try:
        for image in content["images"]:
            _check_image(image)
        for category in content["categories"]:
            _check_category(category)
        for entry in content.get("annotations", ()):
            _check_annotation(entry)
    except KeyError as error:
        raise Reason(f"an entry lacks {error}") from None
    for kind, key in (("image", "images"), ("category", "categories")):
        counts = Counter(entry["id"] for entry in content[key])
        twice = [id_ for id_, count in counts.items() if count > 1]
        if twice:
            raise Reason(f"it has two entries for {kind} {reprlib.repr(twice[0])}")


def _check_image(image: Mapping[str, Any]) -> None:
    if type(image["id"]) not in (int, str):
        raise Reason(f"the image id {reprlib.repr(image['id'])} is neither a whole number nor text")
    if not isinstance(image["file_name"], str):
        raise Reason(f"the file_name of image {reprlib.repr(image['id'])} is not text")


def _check_category(category: Mapping[str, Any]) -> None:
    if type(category["id"]) is not int:
        raise Reason(f"the category id {reprlib.repr(category['id'])} is not a whole number")
    if (
        type(category["name"]) not in (str, int) or category["name"] == ""
    ):  # data sets of digits name them 0 … 9
        raise Reason(f"the name of category {category['id']} is {reprlib.repr(category['name'])}, not text")


def _check_annotation(entry: Mapping[str, Any]) -> None:
    box = entry["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        raise Reason(_problem_of(entry, "bbox", "four numbers"))
    if entry.get("iscrowd", 0) not in (0, 1):
        raise Reason(_problem_of(entry, "iscrowd", "0 or 1"))
    if not _is_finite(entry.get("area", 0)):
        raise Reason(_problem_of(entry, "area", "a number"))
    for key in ("image_id", "category_id"):
        if type(entry[key]) not in (int, str):
            raise Reason(_problem_of(entry, key, "an id"))


def _is_finite(value: Any) -> bool:
    """Whether ``value`` is a number that a float can hold; JSON's whole numbers have no limit."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


def _problem_of(entry: Mapping[str, Any], key: str, expected: str) -> str:
    annotation = reprlib.repr(entry.get("id"))
    return f"the {key} of annotation {annotation} is {reprlib.repr(entry[key])}, not {expected}"


def _repair(content: dict[str, Any], categories: Mapping[int, str]) -> list[str]:
    """Fill in fields that custom annotations often lack, drop orphans; returns a note per kind of change."""
    known = {image["id"] for image in content["images"]}
    kept: list[dict[str, Any]] = []
    counts = Counter[str]()
    for number, entry in enumerate(content["annotations"], start=1):
        if entry["image_id"] not in known:
            counts["annotations of images that are not listed: left out"] += 1
        elif entry["category_id"] not in categories:
            counts["annotations of categories that are not listed: left out"] += 1
        else:
            full = {"iscrowd": 0, "area": entry["bbox"][2] * entry["bbox"][3], **entry}
            if "area" not in entry:
                counts["annotations without an area: the area of their box is used"] += 1
            if min(entry["bbox"][2:]) < 0:
                counts["annotations whose box has a negative side: nothing can match them"] += 1
            kept.append({**full, "id": number})  # pycocotools treats a match with id 0 as no match
    content["annotations"] = kept
    notes = [f"{count} {change}" for change, count in counts.items()]
    if kept and all(entry["iscrowd"] for entry in kept):
        notes.append(
            f"all {len(kept)} annotations have iscrowd=1, a group of objects (CVAT exports masks so): COCO's "
            "evaluation ignores groups, so no object is left to find, and every figure is -1; set iscrowd to "
            "0 if each is one object"
        )
    return notes


def _size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = image.get("height"), image.get("width")
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _files_without_entry(folder: Path, entries: Sequence[Mapping[str, Any]]) -> int:
    suffixes = {Path(entry["file_name"]).suffix for entry in entries}
    here = {file.name for file in folder.iterdir() if file.suffix in suffixes}
    return len(here - {entry["file_name"] for entry in entries})


def dataset_digest(dataset: Dataset) -> str:
    """SHA-256 over the list of images, in order: id, name and content of each, but not their folder.

    This reads every image: for val2017 5,000 images and 0.8 GB, which takes seconds, while detection takes an
    hour. File sizes would not do: uncompressed images of the same dimensions have the same size.
    """
    listed = [(image.id, image.path.name, _content_digest(image.path)) for image in dataset.images]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def _content_digest(path: Path) -> str | None:
    try:
        return sha256_of_file(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None  # the image will be skipped and counted
