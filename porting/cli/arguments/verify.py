"""Prove that PyTorch weights are an AutoML checkpoint's function, layer by layer, or show where not."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from porting.cli.arguments.shared import (
    JSON_HELP,
    ModelOptions,
    ReferenceOptions,
    SourceOptions,
    ValuesOptions,
    add_checkpoint_options,
    add_model_options,
    add_reference_options,
    add_size_option,
    add_values_options,
    read_model_options,
    read_reference_options,
    read_values_options,
)
from porting.cli.process import EXIT_CODES
from porting.parity.reference import OPS
from pytorch_model.engines import NAMES

EPILOG = f"""
examples:
  # a weight file and the checkpoint it was made from, with a report to open in a browser
  python tools/verify.py --ckpt path/to/efficientdet-d4 --weights efficientdet_d4.safetensors --report out/
  # compared with the graph that Google's code saved with the checkpoint, or with a model it exported
  python tools/verify.py --ckpt path/to/efficientdet-d4 --reference meta
  python tools/verify.py --ckpt path/to/efficientdet-d4 --reference savedmodel --graph export/
  # the port itself, without a weight file, at the model's own resolution, on a photograph
  python tools/verify.py --ckpt path/to/efficientdet-d4 --size native --image photo.jpg
  # does ONNX Runtime compute the same function, down to the detections?
  python tools/verify.py --ckpt path/to/efficientdet-d4 --engine onnxruntime --image photo.jpg
  # are two weight files the same function? no network is run
  python tools/verify.py --weights a.safetensors --against b.pth

{EXIT_CODES}
"""

QUICK, ALL = "quick", "all"  # which precisions


@dataclass(frozen=True)
class CompareOptions:
    """Compare two sets of weights without running a network. ``against``: a weight file or a checkpoint."""

    weights: Path
    against: SourceOptions
    model: ModelOptions
    json: bool


@dataclass(frozen=True)
class VerifyOptions:
    """Run both networks. ``weights``: None for the port itself. ``precision``: ``QUICK``, ``ALL`` or None.

    ``engines``: names of :data:`pytorch_model.engines.NAMES`.
    """

    source: SourceOptions
    model: ModelOptions
    reference: ReferenceOptions
    weights: Path | None
    values: ValuesOptions
    size: str
    image: Path | None
    device: str
    gradients: bool
    precision: str | None
    engines: tuple[str, ...]
    report: Path | None
    json: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_options(parser, required=False)
    add_model_options(parser)
    add_reference_options(parser)
    parser.add_argument("--weights", type=Path, help="weight file to prove (default: port the checkpoint)")
    parser.add_argument("--against", help="a second weight file, or a checkpoint, to compare --weights with")
    add_values_options(parser)
    add_size_option(parser)
    parser.add_argument("--image", type=Path, help="an image to run on (default: a seeded one)")
    parser.add_argument("--device", default="cpu", help="where PyTorch runs: cpu, cuda (default: cpu)")
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="also compare the gradients of the port, on two small images",
    )
    parser.add_argument(
        "--precision",
        "--variants",
        dest="precision",
        nargs="?",
        const=QUICK,
        choices=(QUICK, ALL),
        help="also run the weights in other ways (half precision, channels_last, fused batch norm, on a GPU) "
        "and print the accuracy that each costs; all: torch.compile too, which takes minutes "
        "(--variants is the former name)",
    )
    parser.add_argument(
        "--engine",
        dest="engines",
        action="append",
        default=[],
        choices=NAMES,
        help="also prove this engine: its head outputs and detections against the eager network's and the "
        "reference's (one name; repeatable; auto: the one that detect.py takes; compile takes minutes)",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.json and report.html there")
    parser.add_argument("--json", action="store_true", help=JSON_HELP)


def read_options(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> VerifyOptions | CompareOptions:
    if not arguments.ckpt and not (arguments.weights and arguments.against):
        parser.error("give --ckpt, or --weights and --against")
    reference = read_reference_options(arguments)
    if arguments.against:
        needs_a_network = {
            "--gradients": arguments.gradients,
            "--reference": reference.kind != OPS or reference.graph,
            "--precision": arguments.precision,
            "--engine": arguments.engines,
        }
        for option, given in needs_a_network.items():
            if given:
                parser.error(f"--against runs no network, so {option} has no effect: leave one out")
        if not arguments.weights:
            parser.error("--against is compared with --weights: give both")
        against = SourceOptions(arguments.against, arguments.step, arguments.cache_dir)
        return CompareOptions(arguments.weights, against, read_model_options(arguments), arguments.json)
    return VerifyOptions(
        source=SourceOptions(arguments.ckpt, arguments.step, arguments.cache_dir),
        model=read_model_options(arguments),
        reference=reference,
        weights=arguments.weights,
        values=read_values_options(arguments),
        size=arguments.size,
        image=arguments.image,
        device=arguments.device,
        gradients=arguments.gradients,
        precision=arguments.precision,
        engines=tuple(arguments.engines),
        report=arguments.report,
        json=arguments.json,
    )
