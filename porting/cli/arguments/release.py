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
    add_checkpoint_options,
    add_labels_to_keep,
    add_model_options,
    read_checkpoint_options,
    read_model_options,
)
from porting.cli.process import EXIT_CODES
from porting.publish import GOOGLES_LICENSE

EPILOG = f"""
examples:
  # release/efficientdet_d4/: weights in two formats, parity report, model card, checksums
  python tools/release.py --ckpt path/to/efficientdet-d4 --out release/
  # again, with the figures that tools/eval_coco.py measured with release/efficientdet_d4/model.safetensors
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
    raw: bool
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
    add_labels_to_keep(parser)
    parser.add_argument("--raw", action="store_true", help="release the raw values, not the moving averages")
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
        if any(
            (
                arguments.out,
                arguments.name,
                arguments.license,
                arguments.coco_metrics,
                arguments.raw,
                arguments.labels,
            )
        ):
            parser.error("--verify-release takes --ckpt, --model and --hparams, nothing else")
    elif not (arguments.ckpt and arguments.out):
        parser.error("give --ckpt and --out, or --verify-release")
    return ReleaseOptions(
        read_checkpoint_options(arguments) if arguments.ckpt else None,
        read_model_options(arguments),
        arguments.raw,
        arguments.out,
        arguments.name,
        arguments.license,
        arguments.size,
        arguments.coco_metrics,
        arguments.verify_release,
        arguments.json,
    )
