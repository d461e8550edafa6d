"""Write PyTorch weights, fine-tuned ones too, in the format of another program."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from porting.cli.arguments.shared import JSON_HELP
from porting.cli.process import EXIT_CODES
from porting.export import TARGETS

TARGET_LINES = "\n".join(f"  {target.name:<16}{target.summary}" for target in TARGETS.values())

EPILOG = f"""
targets:
{TARGET_LINES}

examples:
  # back to TensorFlow: a checkpoint that AutoML restores, trains further and evaluates
  python tools/export.py --weights mine.safetensors --to tf-checkpoint --out mine/
  # for AutoML's Keras model: model.load_weights("mine.h5")
  python tools/export.py --weights mine.pth --to h5 --out mine.h5
  # for effdet, ONNX Runtime, torch.export.load
  python tools/export.py --weights mine.pth --to effdet --out mine-effdet.pth
  python tools/export.py --weights mine.pth --to onnx --out mine.onnx
  python tools/export.py --weights mine.pth --to torch-export --out mine.pt2

{EXIT_CODES}
"""


@dataclass(frozen=True)
class ExportOptions:
    weights: Path
    target: str  # a key of TARGETS
    out: Path
    json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", type=Path, required=True, help="weight file (.safetensors, .pth) or folder"
    )
    parser.add_argument("--to", choices=TARGETS, required=True, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--out", type=Path, required=True, help="what to write, a file or a folder")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def read_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> ExportOptions:
    return ExportOptions(arguments.weights, arguments.to, arguments.out, arguments.json)
