"""Detect in image files or a video, and write drawings, COCO results, CSV and a summary into a folder."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from pytorch_model.detection.detector import Detector
from pytorch_model.detection.drawing import draw
from pytorch_model.detection.labels import ClassNames
from pytorch_model.detection.pipeline import Pipeline
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
    """One image: its lines of ``detections.json`` and its entry in ``summary.json``."""

    rows: list[dict[str, Any]]
    description: dict[str, Any]


def detect_into(
    out: Path,
    detector: Detector,
    files: Sequence[Path],
    classes: ClassNames,
    *,
    weights: str,
    batch_size: int | None = None,
    workers: int | None = None,
    listener: Listener = SILENT,
) -> DetectionResult:
    """Detect in ``files`` (see :func:`list_images`) and write into ``out`` (see :func:`prepare_folder`).

    ``classes``: the names to draw and to list. ``weights``: what the summary calls the weights.
    ``batch_size``, ``workers``: see :class:`Pipeline`. Writes the drawings, ``detections.json``,
    ``detections.csv`` and ``summary.json``. An image that cannot be read is skipped and noted; ``listener``
    hears how many are done. Raises :class:`EfficientDetError`.
    """
    names = classes.shown
    unreadable: dict[str, str] = {}
    notes: list[str] = []
    rows: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    pipeline = Pipeline(detector, batch_size=batch_size, workers=workers)
    video = len(files) == 1 and is_video(files[0])
    if video:
        stream = _detect_video(pipeline, files[0], out, names, unreadable, notes, listener)
    else:
        stream = _detect_files(pipeline, files, out, names, unreadable, listener)
    with closing(stream):
        for found in stream:
            rows += found.rows
            images.append(found.description)
    summary = {
        "weights": weights,
        "model": detector.model.config.name,
        "image_size": list(detector.image_size),
        "device": str(next(detector.model.parameters()).device),
        "engine": detector.engine,
        "precision": detector.precision,
        "class_names": classes.source,
        "score_threshold": detector.score_threshold,
        "nms_configs": asdict(detector.nms),
        "images": images,
        "unreadable": unreadable,
        "notes": notes,
        "batch_size": pipeline.batch_size,
        "workers": pipeline.workers,
        "speed": pipeline.speed.content(),
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
    pipeline: Pipeline,
    files: Sequence[Path],
    out: Path,
    names: Mapping[int, str],
    unreadable: dict[str, str],
    listener: Listener,
) -> Generator[_Found, None, None]:
    """Detect and draw. An image that cannot be read is noted in ``unreadable`` and skipped."""
    detector = pipeline.detector

    def finish(path: Path, image: DecodedImage, detections: dict[str, Tensor]) -> _Found:
        kept = detector.above_threshold(detections)
        with replacing(out / drawn_name(path)) as temporary:
            draw(image.pixels, kept, names).save(temporary, quality=95)
        rows = to_results(image_id(path), kept)
        _, height, width = image.pixels.shape
        description = {
            "image_id": image_id(path),
            "file_name": path.name,
            "height": height,
            "width": width,
            "decoder": image.decoder,
            "exif_orientation": image.orientation,
            "detections": len(kept["scores"]),
        }
        return _Found(rows, description)

    done = 0
    listener.progress(done, len(files))
    batches = pipeline.run(files, lambda path: detector.load(path, upright=True), finish)
    with closing(batches):
        for batch in batches:
            unreadable.update((str(path), problem) for path, problem in batch.unreadable)
            yield from batch.found[0]
            done += batch.count
            listener.progress(done, len(files))


def _detect_video(
    pipeline: Pipeline,
    path: Path,
    out: Path,
    names: Mapping[int, str],
    unreadable: dict[str, str],
    notes: list[str],
    listener: Listener,
) -> Generator[_Found, None, None]:
    """Detect frame by frame and write the annotated video, up to the frame where the file breaks off."""
    detector = pipeline.detector
    with VideoReader(path) as reader, replacing(out / drawn_name(path)) as temporary:
        writer = VideoWriter(temporary, reader.rate, reader.time_base)

        def finish(frame: Frame, image: DecodedImage, detections: dict[str, Tensor]) -> _Found:
            kept = detector.above_threshold(detections)
            writer.add(np.asarray(draw(image.pixels, kept, names)), frame.time)
            where = {"frame": frame.number, "time": frame.time}
            rows = [
                {**where, **{key: row[key] for key in row if key != "image_id"}}
                for row in to_results("", kept)
            ]
            return _Found(rows, {**where, "decoder": image.decoder, "detections": len(kept["scores"])})

        done = 0
        listener.progress(done, reader.count)
        frames = _until_broken(reader, unreadable, notes)
        batches = pipeline.run(frames, lambda frame: DecodedImage(frame.pixels, "pyav"), finish)
        try:
            with closing(batches):
                for batch in batches:
                    yield from batch.found[0]
                    done += batch.count
                    listener.progress(done, reader.count)
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


# --- output -------------------------------------------------------------------------------------------


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
