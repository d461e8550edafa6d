#!/usr/bin/env python3
"""Detect objects in pictures or a video with a ported EfficientDet: drawn boxes, COCO results, a summary."""

from __future__ import annotations

import _cli  # first: finds the packages

# isort: split
import argparse
import colorsys
import csv
import dataclasses
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import _source
import _video
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from porting.errors import OutputError
from porting.hparams import nms_and_size, read_hparams
from pytorch_model import load_model
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.labels import load_names
from pytorch_model.detection.preprocess import DecodedImage, ImageError
from pytorch_model.detection.settings import DECODERS, FORMATS
from pytorch_model.evaluation.coco import to_results
from pytorch_model.files import is_special, make_folder, replacing

if TYPE_CHECKING:
    from PIL import Image

EXAMPLES = f"""
examples:
  python tools/detect.py --weights efficientdet_d0.safetensors --images street.jpg --out found
  python tools/detect.py --weights d2.pth --images photos/ --out found --device cuda --batch-size 16
  python tools/detect.py --weights d0.pth --images clip.mp4 --out found
  # everything AutoML's COCO evaluation would report, from the very pixels it sees
  python tools/detect.py --weights d0.pth --images val2017/ --out found --score-threshold 0 --decoder fast-dct

The folder --out receives each picture with its boxes, detections.json (COCO results: a list of image_id,
category_id, bbox as x, y, width, height in pixels, score), the same as detections.csv, and summary.json (what
was run, and what decoded each picture). An image_id is the file's name as a number where it is one
(000000000139.jpg: 139), otherwise the name. A picture that cannot be read is passed over and makes the exit
status 1. Pictures are turned as their EXIF orientation says; boxes are of the turned picture. (COCO's
evaluation ignores EXIF: eval_coco.py does.)
Of a video (needs PyAV), --out receives an .mp4 with the boxes and no sound, and detections by frame, from 0,
and time in seconds, in place of image_id.

{_cli.EXIT_CODES}
"""
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
DRAWN_SUFFIXES = (".jpg", ".jpeg", ".png")  # others are drawn as PNG beside their full name


class Found(NamedTuple):
    """One picture and what was found in it."""

    path: Path
    image: DecodedImage
    detections: dict[str, Tensor]  # as Detector returns them, on the CPU
    frame: int | None = None  # of a video, from 0
    time: float | None = None  # of that frame, in seconds


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=_cli.HelpFormatter)
    parser.add_argument("--weights", required=True, type=Path, help="weight file or folder")
    parser.add_argument(
        "--images", required=True, type=Path, help="a picture, a folder of pictures, or a video"
    )
    parser.add_argument("--out", required=True, type=Path, help="folder for the results, created if needed")
    parser.add_argument(
        "--score-threshold", type=float, default=0.3, help="leave out scores up to this, 0 to 1 (default 0.3)"
    )
    parser.add_argument(
        "--labels",
        type=Path,
        help="class names: a text file with one name a line (the first is class 1) or lines 'id: name', "
        "or JSON: a list, an {id: name} object, or COCO annotations (default: COCO's for 90 classes)",
    )
    parser.add_argument(
        "--decoder",
        choices=DECODERS,
        default="pillow",
        help="how JPEG files are read; fast-dct equals tf.io.decode_jpeg, needs simplejpeg (default pillow)",
    )
    parser.add_argument(
        "--hparams", type=read_hparams, default=read_hparams(""), metavar="TEXT", help=_source.HPARAMS_HELP
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="pictures at a time (default 4)")
    args = parser.parse_args()
    if not 0 <= args.score_threshold <= 1:
        parser.error(f"--score-threshold is {args.score_threshold}, must be from 0 to 1")
    if args.batch_size < 1:
        parser.error(f"--batch-size is {args.batch_size}, must be at least 1")
    return args


def main() -> int:
    args = parse_arguments()
    console = Console(highlight=False)
    files = list_images(args.images)
    prepare_folder(args.out, files)
    model = load_model(args.weights).to(_cli.choose_device(args.device))
    names = load_names(args.labels, model.config.num_classes)
    nms, image_size = nms_and_size(args.hparams, model.config)
    detector = Detector(
        model, image_size=image_size, nms=nms, score_threshold=args.score_threshold, decoder=args.decoder
    )
    unreadable: dict[str, str] = {}
    results: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    started = time.perf_counter()
    is_video = _video.is_video(args.images)
    if is_video:
        stream = detect_video(detector, args.images, args.batch_size, args.out, names, unreadable, console)
    else:
        stream = detect_files(detector, files, args.batch_size, unreadable, console)
    for found in stream:
        if found.frame is None:
            save_drawing(args.out, found, names)
        results += rows_of(found)
        pictures.append(describe(found))
    seconds = time.perf_counter() - started
    summary = {
        "weights": str(args.weights),
        "model": model.config.name,
        "image_size": list(detector.image_size),
        "device": str(next(model.parameters()).device),
        "score_threshold": args.score_threshold,
        "nms_configs": dataclasses.asdict(detector.nms),
        "images": pictures,
        "unreadable": unreadable,
    }
    save_json(args.out / "detections.json", results)
    save_csv(args.out / "detections.csv", ("frame", "time") if is_video else ("image_id",), results, names)
    save_json(args.out / "summary.json", summary)
    print_summary(console, summary, Counter(names[r["category_id"]] for r in results), seconds, args.out)
    return _cli.EXIT_FAILED if unreadable else 0


# --- input --------------------------------------------------------------------------------------------


def list_images(path: Path) -> list[Path]:
    """The pictures at ``path``, sorted by name. Raises :class:`ImageError` when there are none."""
    if os.path.isfile(path):  # Path.is_file raises on a name that is too long
        return [path]
    if not os.path.isdir(path):
        what = "is a pipe or a device" if is_special(path) else "does not exist"
        raise ImageError(f"--images {path} {what}; give a picture or a folder of pictures")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.is_dir())
    if not files:
        raise ImageError(f"--images {path} holds no picture ({', '.join(SUFFIXES)})")
    ids = Counter(image_id(file) for file in files)
    for file in files:
        if ids[image_id(file)] > 1:
            raise ImageError(
                f"several pictures in {path} would have the image_id {image_id(file)}; rename one"
            )
    drawn = {drawn_name(file): file for file in files}
    for file in files:
        if drawn[drawn_name(file)] != file:
            raise ImageError(
                f"{file.name} and {drawn_name(file)} in {path} would both be drawn as the latter; rename one"
            )
    return files


def image_id(file: Path) -> int | str:
    """What a COCO results file calls the picture: its number, or its name."""
    return int(file.stem) if file.stem.isdecimal() else file.name


def prepare_folder(out: Path, files: Sequence[Path]) -> None:
    """Create ``out``. Raises :class:`OutputError` where that fails, or it would overwrite the pictures."""
    make_folder(out)
    folder = os.path.realpath(out)
    pictures = {identity for file in files if (identity := _identity(file))}
    for file in files:
        # Of a link, and of what it leads to; Path.resolve raises on a link that leads to itself.
        places = (os.path.realpath(file.parent), os.path.dirname(os.path.realpath(file)))
        if folder in places or _identity(out / drawn_name(file)) in pictures:
            raise OutputError(
                f"--out {out} is where the pictures are and would overwrite them; choose another folder"
            )


def _identity(file: Path) -> tuple[int, int] | None:
    """The same for all names and links of one file; None where there is none."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino


# --- detection ----------------------------------------------------------------------------------------


def detect_files(
    detector: Detector, files: Sequence[Path], batch_size: int, unreadable: dict[str, str], console: Console
) -> Iterator[Found]:
    """Detect batch by batch. A picture that cannot be read is noted in ``unreadable`` and passed over."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("detecting", total=len(files))
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
                    yield Found(path, image, {key: value.cpu() for key, value in detections.items()})
            progress.advance(task, len(chunk))


def detect_video(
    detector: Detector,
    path: Path,
    batch_size: int,
    out: Path,
    names: dict[int, str],
    unreadable: dict[str, str],
    console: Console,
) -> Iterator[Found]:
    """Detect frame by frame and write the annotated video. Where the file breaks off, so does the work."""
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        _video.VideoReader(path) as reader,
        Progress(*columns, console=console) as progress,
        replacing(out / drawn_name(path)) as temporary,
    ):
        task = progress.add_task("detecting", total=reader.count)
        writer = _video.VideoWriter(temporary, reader.rate, reader.time_base)
        try:
            for frames in _batched(_until_broken(reader, unreadable), batch_size):
                outputs = detector([frame.pixels for frame in frames])
                for frame, detections in zip(frames, outputs, strict=True):
                    image = DecodedImage(frame.pixels, "pyav")
                    on_cpu = {key: value.cpu() for key, value in detections.items()}
                    found = Found(path, image, on_cpu, frame.number, frame.time)
                    writer.add(np.asarray(draw(found, names)), frame.time)
                    yield found
                progress.advance(task, len(frames))
        finally:
            writer.close()


def _until_broken(reader: _video.VideoReader, unreadable: dict[str, str]) -> Iterator[_video.Frame]:
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
        raise ImageError(f"{reader.path} has no frames; {_video.CURE}")


def _batched(frames: Iterator[_video.Frame], size: int) -> Iterator[list[_video.Frame]]:
    while batch := list(itertools.islice(frames, size)):
        yield batch


# --- output -------------------------------------------------------------------------------------------


def rows_of(found: Found) -> list[dict[str, Any]]:
    """COCO results of one picture; ``frame`` and ``time`` in place of ``image_id`` for one of a video."""
    rows = to_results(image_id(found.path), found.detections)
    if found.frame is None:
        return rows
    where = {"frame": found.frame, "time": found.time}
    return [{**where, **{key: row[key] for key in row if key != "image_id"}} for row in rows]


def save_csv(path: Path, where: Sequence[str], rows: Sequence[dict[str, Any]], names: dict[int, str]) -> None:
    """``where``: the columns that say which picture a row is of."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*where, "category_id", "name", "x", "y", "width", "height", "score"])
        for row in rows:
            category = row["category_id"]
            writer.writerow(
                [*(row[key] for key in where), category, names[category], *row["bbox"], row["score"]]
            )


def describe(found: Found) -> dict[str, Any]:
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


def save_drawing(out: Path, found: Found, names: dict[int, str]) -> None:
    with replacing(out / drawn_name(found.path)) as temporary:
        draw(found, names).save(temporary, quality=95)


def drawn_name(file: Path) -> str:
    """What a picture or a video is called in ``--out``."""
    if _video.is_video(file):
        return f"{file.stem}.mp4"
    return file.name if file.suffix.lower() in DRAWN_SUFFIXES else f"{file.name}.png"


def draw(found: Found, names: dict[int, str]) -> Image.Image:
    """The picture with its boxes, class names and scores; the best detection on top."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.fromarray(found.image.pixels.permute(1, 2, 0).contiguous().numpy())
    canvas = ImageDraw.Draw(picture)
    line_width = max(2, min(picture.size) // 250)
    font = ImageFont.load_default(max(11, min(picture.size) // 40))
    limits = torch.tensor([picture.width, picture.height, picture.width, picture.height]) - 1.0
    boxes = found.detections["boxes"].float().clamp(min=0).minimum(limits).tolist()
    labels, scores = found.detections["labels"].tolist(), found.detections["scores"].tolist()
    for (left, top, right, bottom), label, score in reversed(list(zip(boxes, labels, scores, strict=True))):
        colour = _colour(label)
        canvas.rectangle((left, top, right, bottom), outline=colour, width=line_width)
        text = f"{names[label]} {score:.2f}"
        text_box = canvas.textbbox((left + line_width, top + line_width), text, font=font)
        canvas.rectangle(text_box, fill=colour)
        canvas.text((left + line_width, top + line_width), text, fill=(0, 0, 0), font=font)
    return picture


def _colour(label: int) -> tuple[int, int, int]:
    """A light colour of its own for every class: hues a golden section apart."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.6, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def save_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content) + "\n", encoding="utf-8")


def print_summary(
    console: Console, summary: dict[str, Any], classes: Counter[str], seconds: float, out: Path
) -> None:
    pictures, unreadable = summary["images"], summary["unreadable"]
    decoders = Counter(picture["decoder"] for picture in pictures)
    table = Table(title=f"{summary['model']} on {summary['device']}", show_header=False)
    table.add_row("frames" if pictures and "frame" in pictures[0] else "pictures", str(len(pictures)))
    turned = sum(picture.get("exif_orientation", 1) != 1 for picture in pictures)
    if turned:
        table.add_row("turned upright, as EXIF says", str(turned))
    table.add_row("read by", ", ".join(f"{name} ({count})" for name, count in decoders.items()))
    table.add_row(f"detections above {summary['score_threshold']:g}", str(sum(classes.values())))
    for name, count in classes.most_common(8):
        table.add_row(f"  {name}", str(count))
    if len(classes) > 8:
        table.add_row("  others", str(sum(classes.values()) - sum(n for _, n in classes.most_common(8))))
    table.add_row("time", f"{seconds:.1f} s, {1000 * seconds / max(len(pictures), 1):.0f} ms a picture")
    table.add_row("written to", str(out))
    console.print(table)
    for path, reason in unreadable.items():
        console.print(f"skipped {path}: {reason}", style="yellow", markup=False, soft_wrap=True)


if __name__ == "__main__":
    _cli.run(main)
