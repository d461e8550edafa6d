"""Detect in image files or a video, and write drawings, COCO results, CSV and a summary into a folder."""

from __future__ import annotations

import csv
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from pytorch_model.detection.detector import Detector
from pytorch_model.detection.drawing import draw
from pytorch_model.detection.labels import ClassNames
from pytorch_model.detection.preprocess import DecodedImage, ImageError
from pytorch_model.detection.results import to_results
from pytorch_model.detection.settings import FORMATS
from pytorch_model.detection.video import CURE, Frame, VideoReader, VideoWriter, is_video
from pytorch_model.errors import OutputError
from pytorch_model.files import is_special, make_folder, replacing, save_json

SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
DRAWN_SUFFIXES = (".jpg", ".jpeg", ".png")  # other images are drawn as PNG, .png added to the full name


class Listener(Protocol):
    """Hears how the work goes on."""

    def progress(self, done: int, total: int | None) -> None:
        """``done`` of ``total`` images are done; None if it is not known how many there are."""


class _Silent:
    def progress(self, done: int, total: int | None) -> None: ...


SILENT = _Silent()


@dataclass(frozen=True)
class DetectionResult:
    """``rows``: detections in COCO's results format; of a video, ``frame`` and ``time`` replace ``image_id``.

    ``summary``: the content of ``summary.json``; ``images`` there has an entry per image or frame,
    ``unreadable`` is file → why it was skipped, ``notes`` are sentences about what was read.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]


class _Found(NamedTuple):
    """One image and its detections."""

    path: Path
    image: DecodedImage
    detections: dict[str, Tensor]  # as Detector returns them, on the CPU
    frame: int | None = None  # of a video, from 0
    time: float | None = None  # of that frame, in seconds


def detect_into(
    out: Path,
    detector: Detector,
    files: Sequence[Path],
    classes: ClassNames,
    *,
    weights: str,
    batch_size: int = 4,
    listener: Listener = SILENT,
) -> DetectionResult:
    """Detect in ``files`` (see :func:`list_images`) and write into ``out`` (see :func:`prepare_folder`).

    ``classes``: the names to draw and to list. ``weights``: what the summary calls the weights. Writes the
    drawings, ``detections.json``, ``detections.csv`` and ``summary.json``. An image that cannot be read is
    skipped and noted; ``listener`` hears how many are done. Raises :class:`EfficientDetError`.
    """
    names = classes.shown
    unreadable: dict[str, str] = {}
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    video = len(files) == 1 and is_video(files[0])
    if video:
        stream = _detect_video(detector, files[0], batch_size, out, names, unreadable, notes, listener)
    else:
        stream = _detect_files(detector, files, batch_size, unreadable, listener)
    for found in stream:
        if not video:
            with replacing(out / drawn_name(found.path)) as temporary:
                draw(found.image.pixels, found.detections, names).save(temporary, quality=95)
        rows += _rows_of(found)
        images.append(_describe(found))
    summary = {
        "weights": weights,
        "model": detector.model.config.name,
        "image_size": list(detector.image_size),
        "device": str(next(detector.model.parameters()).device),
        "engine": detector.engine,
        "class_names": classes.source,
        "score_threshold": detector.score_threshold,
        "nms_configs": asdict(detector.nms),
        "images": images,
        "unreadable": unreadable,
        "notes": notes,
    }
    save_json(out / "detections.json", rows)
    _save_csv(out / "detections.csv", ("frame", "time") if video else ("image_id",), rows, names)
    save_json(out / "summary.json", summary)
    return DetectionResult(rows, summary)


# --- input --------------------------------------------------------------------------------------------


def list_images(path: Path) -> list[Path]:
    """The image files at ``path``, sorted by name; a file is its own list.

    Raises :class:`ImageError` if there are none, or if two would get the same ``image_id`` or drawing.
    """
    if os.path.isfile(path):  # Path.is_file raises on a name that is too long
        return [path]
    if not os.path.isdir(path):
        problem = "is a pipe or a device" if is_special(path) else "does not exist"
        raise ImageError(f"--images {path} {problem}; give an image or a folder of images")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.is_dir())
    if not files:
        raise ImageError(f"--images {path} holds no image; give a folder with {', '.join(SUFFIXES)} files")
    ids = Counter(image_id(file) for file in files)
    for file in files:
        if ids[image_id(file)] > 1:
            raise ImageError(f"several images in {path} would have the image_id {image_id(file)}; rename one")
    drawn = {drawn_name(file): file for file in files}
    for file in files:
        if drawn[drawn_name(file)] != file:
            raise ImageError(
                f"{file.name} and {drawn_name(file)} in {path} would both be drawn as the latter; rename one"
            )
    return files


def image_id(file: Path) -> int | str:
    """The image's id in a COCO results file: its name as a number if it is one, else its name."""
    return int(file.stem) if file.stem.isdecimal() else file.name


def drawn_name(file: Path) -> str:
    """The name of an image or a video in the output folder."""
    if is_video(file):
        return f"{file.stem}.mp4"
    return file.name if file.suffix.lower() in DRAWN_SUFFIXES else f"{file.name}.png"


def prepare_folder(out: Path, files: Sequence[Path]) -> None:
    """Create ``out``. Raises :class:`OutputError` if that fails or results would overwrite ``files``."""
    make_folder(out)
    folder = os.path.realpath(out)
    identities = {identity for file in files if (identity := _identity(file))}
    for file in files:
        # The folders of a link and of its target; Path.resolve raises on a link that leads to itself.
        places = (os.path.realpath(file.parent), os.path.dirname(os.path.realpath(file)))
        if folder in places or _identity(out / drawn_name(file)) in identities:
            raise OutputError(
                f"--out {out} is the folder of the images and would overwrite them; choose another folder"
            )


def _identity(file: Path) -> tuple[int, int] | None:
    """The same for all names and links of one file; None if there is no file."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


# --- detection ----------------------------------------------------------------------------------------


def _detect_files(
    detector: Detector,
    files: Sequence[Path],
    batch_size: int,
    unreadable: dict[str, str],
    listener: Listener,
) -> Iterator[_Found]:
    """Detect batch by batch. An image that cannot be read is noted in ``unreadable`` and skipped."""
    listener.progress(0, len(files))
    for start in range(0, len(files), batch_size):
        chunk = files[start : start + batch_size]
        images: dict[Path, DecodedImage] = {}
        for path in chunk:
            try:
                images[path] = detector.load(path, upright=True)
            except ImageError as error:
                unreadable[str(path)] = str(error)
        if images:
            outputs = detector([image.pixels for image in images.values()])
            for (path, image), detections in zip(images.items(), outputs, strict=True):
                yield _Found(path, image, {key: value.cpu() for key, value in detections.items()})
        listener.progress(start + len(chunk), len(files))


def _detect_video(
    detector: Detector,
    path: Path,
    batch_size: int,
    out: Path,
    names: Mapping[int, str],
    unreadable: dict[str, str],
    notes: list[str],
    listener: Listener,
) -> Iterator[_Found]:
    """Detect frame by frame and write the annotated video, up to the frame where the file breaks off."""
    with VideoReader(path) as reader, replacing(out / drawn_name(path)) as temporary:
        listener.progress(0, reader.count)
        writer = VideoWriter(temporary, reader.rate, reader.time_base)
        try:
            for frames in _batched(_until_broken(reader, unreadable, notes), batch_size):
                outputs = detector([frame.pixels for frame in frames])
                for frame, detections in zip(frames, outputs, strict=True):
                    image = DecodedImage(frame.pixels, "pyav")
                    on_cpu = {key: value.cpu() for key, value in detections.items()}
                    writer.add(np.asarray(draw(frame.pixels, on_cpu, names)), frame.time)
                    yield _Found(path, image, on_cpu, frame.number, frame.time)
                listener.progress(frames[-1].number + 1, reader.count)
        finally:
            writer.close()


def _until_broken(reader: VideoReader, unreadable: dict[str, str], notes: list[str]) -> Iterator[Frame]:
    """The frames up to where the file breaks off, which goes into ``unreadable``.

    A decoder may lose frames without an error, as a rule the last one: that goes into ``notes``.
    """
    count = 0
    try:
        for frame in reader:
            count += 1
            yield frame
    except ImageError as error:
        if not count:
            raise ImageError(f"{reader.path}: {error}") from None
        unreadable[str(reader.path)] = str(error)
    if not count:
        raise ImageError(f"{reader.path} has no frames; {CURE}")
    if count < (reader.count or 0) and str(reader.path) not in unreadable:
        notes.append(
            f"{reader.path} states {reader.count} frames, {count} could be decoded: the rest is damaged or "
            "was never written"
        )


def _batched(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    while batch := list(itertools.islice(frames, size)):
        yield batch


# --- output -------------------------------------------------------------------------------------------


def _rows_of(found: _Found) -> list[dict[str, Any]]:
    """COCO results of one image; for a frame of a video, ``frame`` and ``time`` replace ``image_id``."""
    rows = to_results(image_id(found.path), found.detections)
    if found.frame is None:
        return rows
    where = {"frame": found.frame, "time": found.time}
    return [{**where, **{key: row[key] for key in row if key != "image_id"}} for row in rows]


def _describe(found: _Found) -> dict[str, Any]:
    _, height, width = found.image.pixels.shape
    if found.frame is not None:
        where = {"frame": found.frame, "time": found.time}
        return {**where, "decoder": found.image.decoder, "detections": len(found.detections["scores"])}
    return {
        "image_id": image_id(found.path),
        "file_name": found.path.name,
        "height": height,
        "width": width,
        "decoder": found.image.decoder,
        "exif_orientation": found.image.orientation,
        "detections": len(found.detections["scores"]),
    }


def _save_csv(
    path: Path, where: Sequence[str], rows: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> None:
    """``where``: the columns that identify the image or frame of a row."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*where, "category_id", "name", "x", "y", "width", "height", "score"])
        for row in rows:
            category = row["category_id"]
            writer.writerow(
                [*(row[key] for key in where), category, names[category], *row["bbox"], row["score"]]
            )
