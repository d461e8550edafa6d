"""Port an AutoML EfficientDet checkpoint to bias-free PyTorch weights."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from porting.cli.arguments.shared import (
    JSON_HELP,
    ModelOptions,
    ReferenceOptions,
    SourceOptions,
    add_checkpoint_options,
    add_labels_to_keep,
    add_model_options,
    add_reference_options,
    add_size_option,
    read_checkpoint_options,
    read_model_options,
    read_reference_options,
)
from porting.cli.process import EXIT_CODES
from porting.errors import EfficientDetError
from porting.parity.reference import OPS
from pytorch_model.weights import SUFFIXES

EPILOG = f"""
examples:
  # a folder that holds model.index, model.data-… and checkpoint
  python tools/convert.py --ckpt path/to/efficientdet-d0
  # one of Google's releases, downloaded once
  python tools/convert.py --ckpt efficientdet-d0
  # your own model, with the settings that its weights do not show
  python tools/convert.py --ckpt run/ --hparams "image_size=640x480,aspect_ratios=[1.0,3.0,0.33]"
  # without a checkpoint: write a seeded one in AutoML's format, port it, prove it
  python tools/convert.py --ckpt synthetic:efficientdet-d4 --verify
  # compared with the graph that Google's code saved with the checkpoint
  python tools/convert.py --ckpt path/to/efficientdet-d0 --verify --reference meta
  # the last raw values instead of their moving averages
  python tools/convert.py --ckpt run/model.ckpt-30000 --raw --out mine.safetensors

{EXIT_CODES}
"""


@dataclass(frozen=True)
class ConvertOptions:
    """``out``: a file, or a folder if it exists or ends in ``/``. ``size``: for ``verify`` only."""

    source: SourceOptions
    model: ModelOptions
    raw: bool
    out: str | None
    verify: bool
    size: str
    reference: ReferenceOptions
    json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_options(parser)
    add_model_options(parser)
    add_labels_to_keep(parser)
    parser.add_argument("--raw", action="store_true", help="port the raw values, not the moving averages")
    parser.add_argument(
        "--out",
        help=f"weight file, {' or '.join(SUFFIXES)}, or a folder for it, which exists or ends in / "
        "(default: MODEL.safetensors here)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare every layer with TensorFlow; write only if it passes"
    )
    add_size_option(parser)
    add_reference_options(parser)
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def read_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> ConvertOptions:
    reference = read_reference_options(arguments)
    if not arguments.verify and (reference.kind != OPS or reference.graph):
        parser.error("--reference and --graph say what --verify compares with: add --verify")
    model = read_model_options(arguments)
    if arguments.size and not arguments.verify:
        raise EfficientDetError(
            "--size is the image size at which --verify compares; add --verify, or leave out --size"
        )
    return ConvertOptions(
        source=read_checkpoint_options(arguments),
        model=model,
        raw=arguments.raw,
        out=arguments.out,
        verify=arguments.verify,
        size=arguments.size,
        reference=reference,
        json=arguments.json,
    )
