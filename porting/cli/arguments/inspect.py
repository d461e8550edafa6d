"""Show what a checkpoint holds without converting it: model, averages, optimizer, anything unexpected."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from porting.cli.arguments.shared import SourceOptions, add_checkpoint_options, read_checkpoint_options

EPILOG = """
examples:
  # a folder, a prefix, an archive or one file; or one of Google's releases by name
  python tools/inspect_checkpoint.py --ckpt path/to/efficientdet-d0
  python tools/inspect_checkpoint.py --ckpt efficientdet-lite0.tgz
  python tools/inspect_checkpoint.py --ckpt efficientdet-d0
  # every variable with its shape
  python tools/inspect_checkpoint.py --ckpt run/model.ckpt-30000 --depth 9
  # for a script
  python tools/inspect_checkpoint.py --ckpt run/ --json | jq .model

exit status: 0 nothing unexpected; 1 something unexpected is in it; 2 it cannot be read; 130 interrupted; 141
pipe closed; 143 ended by SIGTERM
"""


@dataclass(frozen=True)
class InspectOptions:
    """``depth``: levels of scopes to show, 0 for none."""

    source: SourceOptions
    depth: int
    json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_options(parser)
    parser.add_argument("--json", action="store_true", help="print all of it on stdout, machine-readable")
    parser.add_argument(
        "--depth", type=int, default=2, metavar="N", help="levels of scopes to show, 0 for none (default: 2)"
    )


def read_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> InspectOptions:
    if arguments.depth < 0:
        parser.error(f"--depth is {arguments.depth}, must be 0 or more")
    return InspectOptions(read_checkpoint_options(arguments), arguments.depth, arguments.json)
