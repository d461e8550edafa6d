"""Detect objects in images or a video with a ported EfficientDet: drawn boxes, COCO results, a summary."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from porting.cli.arguments.shared import (
    JSON_HELP,
    WEIGHTS_HELP,
    add_detection_options,
    check_detection_options,
)
from porting.cli.process import EXIT_CODES
from porting.hparams import Hparams

EPILOG = f"""
examples:
  python tools/detect.py --weights efficientdet_d0.safetensors --images street.jpg --out found
  python tools/detect.py --weights d2.pth --images photos/ --out found --device cuda --batch-size 16
  python tools/detect.py --weights d0.pth --images clip.mp4 --out found
  # everything AutoML's COCO evaluation would report, from the same pixels
  python tools/detect.py --weights d0.pth --images val2017/ --out found --score-threshold 0 --decoder fast-dct

The folder --out receives each image with its boxes, detections.json (COCO results: a list of image_id,
category_id, bbox as x, y, width, height in pixels, score), the same as detections.csv, and summary.json (the
settings, what decoded each image, how long each part took), which --json prints too. An image_id is the
file's name as a number if it is one (000000000139.jpg: 139), otherwise the name. An image that cannot be read
is skipped and makes the exit status 1. Images are turned according to their EXIF orientation; boxes are those
of the turned image. (COCO's evaluation ignores EXIF, and so does eval_coco.py.)
For a video (needs PyAV), --out receives an .mp4 with the boxes and no sound, and detections by frame, from 0,
and time in seconds, instead of image_id.

{EXIT_CODES}
"""


@dataclass(frozen=True)
class DetectOptions:
    weights: Path
    images: Path
    out: Path
    score_threshold: float
    labels: Path | None
    decoder: str
    nms: str
    hparams: Hparams
    device: str
    engine: str
    precision: str
    threads: int | None
    workers: int | None
    batch_size: int | None
    json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, required=True, help=WEIGHTS_HELP)
    parser.add_argument(
        "--images", type=Path, required=True, metavar="PATH", help="an image, a folder of images, or a video"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results, created if needed"
    )
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.3,
        metavar="SCORE",
        help="leave out detections with this score or less, 0 to 1 (default: 0.3)",
    )
    add_detection_options(parser)
    parser.add_argument("--json", action="store_true", help=f"{JSON_HELP}: summary.json")


def read_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> DetectOptions:
    if not 0 <= arguments.score_threshold <= 1:
        parser.error(f"--score-threshold is {arguments.score_threshold}, must be from 0 to 1")
    check_detection_options(parser, arguments)
    return DetectOptions(**vars(arguments))
