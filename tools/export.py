#!/usr/bin/env python3
"""Write PyTorch weights, fine-tuned ones too, in the format of another program."""

from __future__ import annotations

import _cli  # first: finds the packages

# isort: split
import argparse
import json
import os
import sys
from pathlib import Path

import _source
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.errors import OutputError
from porting.export import TARGETS, Weights
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.weights.files import check_state_dict, read_weights, weight_file

TARGET_LINES = "\n".join(f"  {target.name:<16}{target.summary}" for target in TARGETS.values())

EXAMPLES = f"""
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

{_cli.EXIT_CODES}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=_cli.HelpFormatter)
    parser.add_argument(
        "--weights", type=Path, required=True, help="weight file (.safetensors, .pth) or folder"
    )
    parser.add_argument("--to", choices=TARGETS, required=True, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--out", type=Path, required=True, help="what to write, a file or a folder")
    parser.add_argument("--json", action="store_true", help="print a machine-readable summary on stdout")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    console = Console(stderr=arguments.json, highlight=False)
    state_dict, config, metadata = read_weights(arguments.weights)
    if os.path.exists(arguments.out) and os.path.samefile(arguments.out, weight_file(arguments.weights)):
        raise OutputError(f"--out {arguments.out} is the file that --weights reads; choose another name")
    with torch.device("meta"):
        check_state_dict(EfficientDet(config), state_dict, str(arguments.weights))
    with console.status(f"writing {arguments.to} …"):
        written = TARGETS[arguments.to].write(Weights(state_dict, config, metadata), arguments.out)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("read", escape(str(arguments.weights)))
    table.add_row("model", escape(_source.describe(config)))
    for fact in written.facts:
        table.add_row("", escape(fact))
    for path in written.files:
        table.add_row("wrote", f"{escape(str(path))} ({path.stat().st_size / 1e6:.1f} MB)")
    console.print(table)
    if arguments.json:
        files = [str(path) for path in written.files]
        summary = {"target": arguments.to, "model": config.name, "files": files, "facts": written.facts}
        json.dump(summary, sys.stdout, indent=2)
        print()
    return 0


if __name__ == "__main__":
    _cli.run(main)
