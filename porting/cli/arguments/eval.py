"""COCO's figures of a weight file, next to those of a TensorFlow reference that gets the same input."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from porting.cli.arguments.shared import (
    JSON_HELP,
    WEIGHTS_HELP,
    ReferenceOptions,
    SourceOptions,
    ValuesOptions,
    add_checkpoint_options,
    add_detection_options,
    add_reference_options,
    add_values_options,
    check_detection_options,
    read_checkpoint_options,
    read_reference_options,
    read_values_options,
)
from porting.cli.process import EXIT_CODES
from porting.hparams import Hparams
from pytorch_model.detection.settings import TTA

EPILOG = f"""
examples:
  python tools/eval_coco.py --weights d0.safetensors --coco coco/ --decoder fast-dct
  # next to AutoML's network in TensorFlow operations, on the first 200 images
  python tools/eval_coco.py --weights d0.safetensors --coco coco/ --reference ops --ckpt d0_ckpt/ --limit 200
  # on 8 GPUs; the figures are the same
  torchrun --nproc-per-node=8 tools/eval_coco.py --weights d7.safetensors --coco coco/
  # your own data set, whose category ids differ from the model's class ids
  python tools/eval_coco.py --weights mine.pth --annotations test.json --images images/ --labels names.txt
  # with mirror images; AutoML combines this fusion with hard suppression
  python tools/eval_coco.py --weights d0.pth --coco coco/ --tta flip --hparams nms_configs.method=hard
  # for COCO's server
  python tools/eval_coco.py --weights d7.pth --annotations image_info_test-dev2017.json --images test2017/ \\
      --test-dev efficientdet-d7

The folder --out receives detections.json and, with --reference, reference_detections.json (COCO results),
metrics.json, which --json prints too, with the speed of this run, and shards/, from which an interrupted run
resumes: start it again with the same options. A reference gets the same decoded and resized images, and its
outputs go through the same postprocessing. An image that cannot be read is skipped and makes the exit status
1. So do detections that differ from the reference's, except those of a quantised TFLite file, which differ by
nature.

{EXIT_CODES}
"""


@dataclass(frozen=True)
class EvalOptions:
    """``source``, ``reference``: None without ``--reference``."""

    weights: Path
    coco: Path | None
    annotations: Path | None
    images: Path | None
    labels: Path | None
    limit: int | None
    source: SourceOptions | None
    reference: ReferenceOptions | None
    values: ValuesOptions
    decoder: str
    nms: str
    hparams: Hparams
    tta: str
    device: str
    engine: str
    precision: str
    threads: int | None
    workers: int | None
    batch_size: int | None
    out: Path
    restart: bool
    per_class: bool
    test_dev: str | None
    json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, required=True, help=WEIGHTS_HELP)
    data = parser.add_argument_group("data set")
    data.add_argument(
        "--coco", type=Path, metavar="DIR", help="folder with annotations/instances_*.json and the images"
    )
    data.add_argument("--annotations", type=Path, metavar="FILE", help="the annotations, in COCO's format")
    data.add_argument("--images", type=Path, metavar="DIR", help="the folder of images")
    data.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    reference = parser.add_argument_group("reference")
    add_reference_options(reference, default=None)
    add_checkpoint_options(reference, required=False)
    add_values_options(reference)
    detection = parser.add_argument_group("detection")
    add_detection_options(detection)
    detection.add_argument(
        "--tta", choices=TTA, default="none", help="flip: fuse with the detections in the mirror image"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the results (default: eval_ and the weights' name)",
    )
    output.add_argument(
        "--restart", action="store_true", help="discard the results of an earlier run in --out"
    )
    output.add_argument("--per-class", action="store_true", help="also the AP of each class")
    output.add_argument("--test-dev", metavar="ALG", help="write detections_test-dev2017_ALG_results.json")
    output.add_argument("--json", action="store_true", help=f"{JSON_HELP}: metrics.json and the speed")


def read_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> EvalOptions:
    check_detection_options(parser, arguments, "limit")
    if not arguments.coco and not arguments.annotations:
        parser.error("give --coco or --annotations")
    if bool(arguments.reference) != bool(arguments.ckpt):
        parser.error("--reference and --ckpt go together")
    return EvalOptions(
        weights=arguments.weights,
        coco=arguments.coco,
        annotations=arguments.annotations,
        images=arguments.images,
        labels=arguments.labels,
        limit=arguments.limit,
        source=read_checkpoint_options(arguments) if arguments.ckpt else None,
        reference=read_reference_options(arguments) if arguments.reference else None,
        values=read_values_options(arguments),
        decoder=arguments.decoder,
        nms=arguments.nms,
        hparams=arguments.hparams,
        tta=arguments.tta,
        device=arguments.device,
        engine=arguments.engine,
        precision=arguments.precision,
        threads=arguments.threads,
        workers=arguments.workers,
        batch_size=arguments.batch_size,
        out=arguments.out or Path(f"eval_{arguments.weights.stem}"),
        restart=arguments.restart,
        per_class=arguments.per_class,
        test_dev=arguments.test_dev,
        json=arguments.json,
    )
