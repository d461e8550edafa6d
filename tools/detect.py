#!/usr/bin/env python3
"""Detect objects in pictures with a ported EfficientDet: drawn boxes, COCO results, a summary."""

from __future__ import annotations

import _cli  # first: finds the packages

# isort: split
import argparse
import colorsys
import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from porting.errors import OutputError, PortingError
from porting.files import replacing
from pytorch_model import load_model
from pytorch_model.detector import Detector
from pytorch_model.preprocess import DECODERS, DecodedImage, ImageError, load_image

if TYPE_CHECKING:
    from PIL import Image

EXAMPLES = f"""
examples:
  python tools/detect.py --weights efficientdet_d0.safetensors --images street.jpg --out found
  python tools/detect.py --weights d2.pth --images photos/ --out found --device cuda --batch-size 16
  # everything AutoML's COCO evaluation would report, from the very pixels it sees
  python tools/detect.py --weights d0.pth --images val2017/ --out found --score-threshold 0 --decoder fast-dct

The folder --out receives each picture with its boxes, detections.json (COCO results: a list of image_id,
category_id, bbox as x, y, width, height in pixels, score) and summary.json (what was run, and what decoded
each picture). An image_id is the file's name as a number where it is one (000000000139.jpg: 139), otherwise
the name. A picture that cannot be read is passed over and makes the exit status 1.

{_cli.EXIT_CODES}
"""
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif")
DRAWN_SUFFIXES = (".jpg", ".jpeg", ".png")  # others are drawn as PNG beside their full name

# COCO's 90 class ids in order, from 1; ten of them name nothing.
_COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,umbrella,,,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
    "surfboard,tennis racket,bottle,,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,"
    "broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,,dining table,,,toilet,,tv,"
    "laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush"
)
COCO_NAMES = tuple(_COCO_NAMES.split(","))


class Found(NamedTuple):
    """One picture and what was found in it."""

    path: Path
    image: DecodedImage
    detections: dict[str, Tensor]  # as Detector returns them, on the CPU


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=_cli.HelpFormatter)
    parser.add_argument("--weights", required=True, type=Path, help="weight file, .safetensors or .pth")
    parser.add_argument("--images", required=True, type=Path, help="a picture, or a folder of pictures")
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
    model = load_model(args.weights).to(choose_device(args.device))
    names = load_names(args.labels, model.config.num_classes)
    detector = Detector(model, score_threshold=args.score_threshold, decoder=args.decoder)
    unreadable: dict[str, str] = {}
    results: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    started = time.perf_counter()
    for found in detect_files(detector, files, args.batch_size, unreadable, console):
        save_drawing(args.out, found, names)
        results += coco_results(found)
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
    save_json(args.out / "summary.json", summary)
    print_summary(console, summary, Counter(names[r["category_id"]] for r in results), seconds, args.out)
    return _cli.EXIT_FAILED if unreadable else 0


# --- input --------------------------------------------------------------------------------------------


def list_images(path: Path) -> list[Path]:
    """The pictures at ``path``, sorted by name. Raises :class:`ImageError` when there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ImageError(f"--images {path} does not exist; give a picture or a folder of pictures")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise ImageError(f"--images {path} holds no picture ({', '.join(SUFFIXES)})")
    ids = Counter(image_id(file) for file in files)
    for file in files:
        if ids[image_id(file)] > 1:
            raise ImageError(
                f"several pictures in {path} would have the image_id {image_id(file)}; rename one"
            )
    return files


def image_id(file: Path) -> int | str:
    """What a COCO results file calls the picture: its number, or its name."""
    return int(file.stem) if file.stem.isdecimal() else file.name


def prepare_folder(out: Path, files: Sequence[Path]) -> None:
    """Create ``out``. Raises :class:`OutputError` where that fails, or would overwrite the pictures."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot create the folder {out}: {error.strerror or error}") from None
    if any(file.parent.resolve() == out.resolve() for file in files):
        raise OutputError(
            f"--out {out} is where the pictures are and would overwrite them; choose another folder"
        )


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one. Raises :class:`PortingError` when the device cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PortingError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def load_names(path: Path | None, num_classes: int) -> dict[int, str]:
    """Class id → name for every class of the model; classes without a name are called by number.

    Raises :class:`PortingError` when the file cannot be read as labels, or names a class the model lacks.
    """
    names = {index: f"class {index}" for index in range(1, num_classes + 1)}
    if path is None:
        given = dict(enumerate(COCO_NAMES, start=1)) if num_classes == len(COCO_NAMES) else {}
    else:
        try:
            given = _parse_labels(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PortingError(f"--labels {path} is not a label file: {error}") from None
    unknown = given.keys() - names.keys()
    if unknown:
        raise ImageError(
            f"--labels {path} names class {max(unknown)}, but the model has classes 1 to {num_classes}"
        )
    return names | {index: name for index, name in given.items() if name}


def _parse_labels(text: str) -> dict[int, str]:
    if not text.lstrip().startswith(("{", "[")):
        lines = [line.strip() for line in text.splitlines()]
        pairs = [line.partition(":") for line in lines if line]
        if pairs and all(key.strip().isdecimal() and name for key, _, name in pairs):
            return {int(key): name.strip().strip("'\"") for key, _, name in pairs}
        return dict(enumerate(lines, start=1))
    content = json.loads(text)
    if isinstance(content, list):
        return {index: str(name) for index, name in enumerate(content, start=1)}
    if "categories" in content:
        return {int(category["id"]): str(category["name"]) for category in content["categories"]}
    return {int(index): str(name) for index, name in content.items()}


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
                    images[path] = load_image(path, detector.decoder)
                except ImageError as error:
                    unreadable[str(path)] = str(error)
            if images:
                outputs = detector([image.pixels for image in images.values()])
                for (path, image), detections in zip(images.items(), outputs, strict=True):
                    yield Found(path, image, {key: value.cpu() for key, value in detections.items()})
            progress.advance(task, len(chunk))


# --- output -------------------------------------------------------------------------------------------


def coco_results(found: Found) -> list[dict[str, Any]]:
    """The picture's lines of a COCO results file; ``bbox`` is x, y, width, height in pixels."""
    left, top, right, bottom = found.detections["boxes"].unbind(1)
    boxes_xywh = torch.stack((left, top, right - left, bottom - top), dim=1).tolist()
    labels, scores = found.detections["labels"].tolist(), found.detections["scores"].tolist()
    return [
        {"image_id": image_id(found.path), "category_id": label, "bbox": box, "score": score}
        for label, box, score in zip(labels, boxes_xywh, scores, strict=True)
    ]


def describe(found: Found) -> dict[str, Any]:
    _, height, width = found.image.pixels.shape
    return {
        "image_id": image_id(found.path),
        "file_name": found.path.name,
        "height": height,
        "width": width,
        "decoder": found.image.decoder,
        "detections": len(found.detections["scores"]),
    }


def save_drawing(out: Path, found: Found, names: dict[int, str]) -> None:
    name = found.path.name
    if found.path.suffix.lower() not in DRAWN_SUFFIXES:
        name += ".png"
    with replacing(out / name) as temporary:
        draw(found, names).save(temporary, quality=95)


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
    table.add_row("pictures", str(len(pictures)))
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
