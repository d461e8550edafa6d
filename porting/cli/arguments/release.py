"""Port a checkpoint, prove it, and put weights and evidence into one folder that can be checked."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from porting.cli.arguments.shared import (
    JSON_HELP,
    SIZE_HELP,
    ModelOptions,
    SourceOptions,
    ValuesOptions,
    add_checkpoint_options,
    add_labels_to_keep,
    add_model_options,
    add_values_options,
    read_checkpoint_options,
    read_model_options,
    read_values_options,
)
from porting.cli.process import EXIT_CODES
from porting.publish import GOOGLES_LICENSE

EPILOG = f"""
examples:
  # release/efficientdet_d4/: weights in two formats, parity report, model card, checksums
  python tools/release.py --ckpt path/to/efficientdet-d4 --out release/
  # again, with the figures that tools/eval_coco.py measured with release/efficientdet_d4/model.safetensors
  # and --engine eager; the card names any other engine
  python tools/release.py --ckpt path/to/efficientdet-d4 --out final/ --coco-metrics eval/metrics.json
  # is every byte of a folder as it should be? and does it come from this checkpoint?
  python tools/release.py --verify-release release/efficientdet_d4
  python tools/release.py --verify-release release/efficientdet_d4 --ckpt path/to/efficientdet-d4

{EXIT_CODES}
"""


@dataclass(frozen=True)
class ReleaseOptions:
    """Either ``verify_release`` is a folder to check, or ``source`` and ``out`` are given."""

    source: SourceOptions | None
    model: ModelOptions
    values: ValuesOptions
    out: Path | None
    name: str | None
    license: str | None
    size: str
    coco_metrics: Path | None
    verify_release: Path | None
    json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_options(parser, required=False)
    add_model_options(parser)
    add_values_options(parser)
    add_labels_to_keep(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to put the folder NAME")
    parser.add_argument("--name", help="name of the folder and the .pth (default: the model's or release's)")
    parser.add_argument(
        "--license", help=f"licence of the weights (default: {GOOGLES_LICENSE} for Google's releases)"
    )
    parser.add_argument("--size", default="", help=SIZE_HELP)
    parser.add_argument(
        "--coco-metrics", type=Path, metavar="FILE", help="metrics.json of tools/eval_coco.py"
    )
    parser.add_argument(
        "--verify-release", type=Path, metavar="DIR", help="check a release folder, write nothing"
    )
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def read_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> ReleaseOptions:
    if arguments.verify_release:
        values = (arguments.raw, arguments.ema_or_raw, arguments.labels)
        if any((arguments.out, arguments.name, arguments.license, arguments.coco_metrics, *values)):
            parser.error("--verify-release takes --ckpt, --model and --hparams, nothing else")
    elif not (arguments.ckpt and arguments.out):
        parser.error("give --ckpt and --out, or --verify-release")
    return ReleaseOptions(
        read_checkpoint_options(arguments) if arguments.ckpt else None,
        read_model_options(arguments),
        read_values_options(arguments),
        arguments.out,
        arguments.name,
        arguments.license,
        arguments.size,
        arguments.coco_metrics,
        arguments.verify_release,
        arguments.json,
    )
