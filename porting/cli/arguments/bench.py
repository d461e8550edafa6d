"""Measure speed as ratios, side by side in one run.

Conversion against `import torch`; reading against a plain read and TensorFlow's reader; the parts of
detection, and the pipeline that runs them at once, against the network.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from porting.cli.process import EXIT_CODES

EPILOG = f"""
examples:
  python tools/bench.py convert                       # converting D0 against `import torch`
  python tools/bench.py read --model efficientdet-d7x # our reader, a plain read, TensorFlow's reader
  python tools/bench.py detect --batch-size 8         # decode, resize, network, select, NMS
  python tools/bench.py eval --model efficientdet-lite0  # 100 images through the pipeline, the network alone

{EXIT_CODES}
"""

CONVERT, READ, DETECT, EVAL = "convert", "read", "detect", "eval"
WHAT = (CONVERT, READ, DETECT, EVAL)


@dataclass(frozen=True)
class BenchOptions:
    """``what``: one of :data:`WHAT`; only ``DETECT`` and ``EVAL`` use ``batch_size`` and ``device``."""

    what: str
    model: str
    repeat: int
    batch_size: int
    device: str
    json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT, metavar="|".join(WHAT))
    parser.add_argument("--model", default="efficientdet-d0", help="default: efficientdet-d0")
    parser.add_argument("--repeat", type=int, default=5, help="runs of each side, interleaved (default: 5)")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="images per batch, for detect and eval (default: 8)"
    )
    parser.add_argument("--device", default="cpu", help="for detect and eval: cpu, cuda, auto (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON on stdout")


def read_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> BenchOptions:
    return BenchOptions(
        arguments.what,
        arguments.model,
        arguments.repeat,
        arguments.batch_size,
        arguments.device,
        arguments.json,
    )
