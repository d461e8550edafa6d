#!/usr/bin/env python3
"""Prove that PyTorch weights are an AutoML checkpoint's function, layer by layer, and say where not."""

from __future__ import annotations

import _cli  # first: finds the packages

# isort: split
import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import _source
import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.checkpoint import Checkpoint
from porting.convert import Conversion, choose_variables, convert
from porting.errors import EfficientDetError
from porting.parity.reference import OPS
from porting.parity.weight_comparison import (
    CheckpointComparison,
    WeightComparison,
    Weights,
    compare_weights,
    compare_with_checkpoint,
    network_settings_that_differ,
    read_weight_file,
)
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import check_weights
from pytorch_model.files import make_folder
from pytorch_model.weights import SUFFIXES
from pytorch_model.weights.files import read_weights

if TYPE_CHECKING:
    from _verify import Outcome

    from porting.parity.report.thumbnails import Thumbnails

EXAMPLES = f"""
examples:
  # a weight file against the checkpoint it was made of, with a report to open in a browser
  python tools/verify.py --ckpt path/to/efficientdet-d4 --weights efficientdet_d4.safetensors --report out/
  # against the graph that Google's code saved beside the checkpoint, or a model it exported
  python tools/verify.py --ckpt path/to/efficientdet-d4 --reference meta
  python tools/verify.py --ckpt path/to/efficientdet-d4 --reference savedmodel --graph export/
  # the port itself, without a weight file, at the model's own resolution, on a photograph
  python tools/verify.py --ckpt path/to/efficientdet-d4 --size native --image photo.jpg
  # are two weight files the same function? no network is run
  python tools/verify.py --weights a.safetensors --against b.pth

{_cli.EXIT_CODES}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=_cli.HelpFormatter)
    _source.add_checkpoint_options(parser, required=False)
    _source.add_model_options(parser)
    _source.add_reference_options(parser)
    parser.add_argument("--weights", type=Path, help="weight file to prove (default: port the checkpoint)")
    parser.add_argument("--against", help="a second weight file, or a checkpoint, to compare --weights with")
    parser.add_argument("--raw", action="store_true", help="the raw values, not the moving averages")
    parser.add_argument("--size", default="", help=_cli.SIZE_HELP)
    parser.add_argument("--image", type=Path, help="run on this picture instead of a seeded one")
    parser.add_argument("--device", default="cpu", help="where PyTorch runs: cpu, cuda (default: cpu)")
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="then compare the gradients of the port, on two small pictures",
    )
    parser.add_argument(
        "--variants",
        nargs="?",
        const="quick",
        choices=("quick", "all"),
        help="then run the weights in other ways (half precision, channels_last, fused batch norm, on a GPU) "
        "and say what each costs in accuracy; all: also torch.compile, which takes minutes",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.json and report.html there")
    parser.add_argument("--json", action="store_true", help="print a machine-readable summary on stdout")
    arguments = parser.parse_args()
    if not arguments.ckpt and not (arguments.weights and arguments.against):
        parser.error("give --ckpt, or --weights and --against")
    if arguments.against and arguments.gradients:
        parser.error("--against runs no network, so there are no --gradients: leave one out")
    if arguments.against and (arguments.reference != OPS or arguments.graph):
        parser.error("--against runs no network, so there is no --reference: leave one out")
    if arguments.against and arguments.variants:
        parser.error("--against runs no network, so there are no --variants: leave one out")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    console = Console(stderr=arguments.json, highlight=False)
    if arguments.against:
        return compare_files(arguments, console)
    _source.check_options(arguments)
    check_device(arguments.device)
    if arguments.report:
        make_folder(arguments.report)
    with _source.open_checkpoint(arguments, console, Path()) as checkpoint:
        config = expected = _source.find_config(arguments, checkpoint).config
        state_dict, same = None, None
        if arguments.weights:
            state_dict, stored, _ = read_weights(arguments.weights)
            check_settings(str(arguments.weights), stored, checkpoint.source, config)
            config = stored
        conversion = convert(checkpoint, config, raw=arguments.raw)
        raw_variables = read_raw(checkpoint, conversion)
        if state_dict is not None:
            check_weights(state_dict, config, str(arguments.weights))
            weights = Weights(str(arguments.weights), state_dict, config)
            port = Weights(f"{checkpoint.source} ({conversion.weights})", conversion.state_dict, expected)
            same = compare_weights(weights, port)
        outcome = run(arguments, console, checkpoint, conversion, state_dict, raw_variables, same)
    passed, figures = outcome.passed, outcome.figures()
    if same is not None:
        print_comparison(console, same)
        passed = passed if same.same_function else False
        figures["weights"] = {"verdict": same.verdict.value, "notes": same.notes}
    if arguments.gradients:
        import _gradients

        results = _gradients.verify_gradients(console, conversion)
        passed = passed is not False and all(result.passed for result in results.values())
        figures["gradients"] = _gradients.figures(results)
    if arguments.json:
        json.dump({"passed": passed, **figures}, sys.stdout, indent=2)
        print()
    return _cli.EXIT_FAILED if passed is False else 0


def run(
    arguments: argparse.Namespace,
    console: Console,
    checkpoint: Checkpoint,
    conversion: Conversion,
    state_dict: dict[str, torch.Tensor] | None,
    raw_variables: dict[str, np.ndarray] | None,
    same: WeightComparison | None,
) -> Outcome:
    from _verify import chosen_reference, chosen_size, print_variants, verify

    from porting.parity.report.thumbnails import Thumbnails

    config = conversion.config
    reference = chosen_reference(arguments, checkpoint, conversion)
    images = network_input(config, chosen_size(config, arguments.size, reference), arguments.image)
    thumbnails = Thumbnails() if arguments.report else None
    outcome = verify(
        console,
        conversion,
        images,
        state_dict=state_dict,
        raw_variables=raw_variables,
        device=arguments.device,
        observe=thumbnails,
        reference=reference,
    )
    if arguments.variants:
        weights = conversion.state_dict if state_dict is None else state_dict
        costs = print_variants(console, config, weights, images, arguments.device, arguments.variants)
        outcome = dataclasses.replace(outcome, variants=costs)
    if arguments.report:
        report(arguments, console, conversion, images.shape, outcome, same, thumbnails)
    return outcome


def report(
    arguments: argparse.Namespace,
    console: Console,
    conversion: Conversion,
    shape: tuple[int, ...],
    outcome: Outcome,
    same: WeightComparison | None,
    thumbnails: Thumbnails | None,
) -> None:
    from porting.parity.report.content import Report, write_json
    from porting.parity.report.html import write_html

    found, diagnosis = outcome.diagnosis, None
    not_the_port = same is not None and not same.same_function
    if found:
        diagnosis = f"{found.module} ({found.tap}): {found.kind}: {found.detail}"
    elif same and not_the_port:
        diagnosis = same.explanation
    content = Report(
        results=outcome.results,
        config=conversion.config,
        metadata={
            "checkpoint": arguments.ckpt,
            "weights": str(arguments.weights) if arguments.weights else "ported in memory",
            "reference": outcome.reference,
            "values": conversion.weights,
            "variables_sha256": conversion.digest,
            "picture": f"{shape[1]}×{shape[2]}, {arguments.image or 'seeded'}",
            "device": arguments.device,
            "torch": torch.__version__,
        },
        diagnosis=diagnosis,
        thumbnails=thumbnails,
        variants=outcome.variants,
        not_the_port=not_the_port,
    )
    write_json(content, arguments.report / "report.json")
    write_html(content, arguments.report / "report.html")
    console.print(f"[bold]wrote[/] {escape(str(arguments.report / 'report.html'))}", soft_wrap=True)


def check_settings(weights: str, stored: EfficientDetConfig, source: str, config: EfficientDetConfig) -> None:
    """A reference built by a wrong setting of the weight file would agree with it. Raises EfficientDetError."""
    differing = network_settings_that_differ(Weights(weights, {}, stored), Weights(source, {}, config))
    if differing:
        raise EfficientDetError(
            f"{differing[0]}; convert again, or say with --hparams what the checkpoint was trained with"
        )


def print_comparison(console: Console, comparison: WeightComparison) -> None:
    """What the tolerances of activations pass over: a number a little off, settings around the network."""
    if not comparison.same_function:
        console.print(
            f"[red bold]FAILED[/] {escape(comparison.explanation)} They are not the port of this checkpoint.",
            soft_wrap=True,
        )
    for note in comparison.notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True)


def check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise EfficientDetError(f"cannot run on device {device!r}: {reason}; try --device cpu") from None


def read_raw(checkpoint: Checkpoint, conversion: Conversion) -> dict[str, np.ndarray] | None:
    """The values before averaging, which help to recognise a mistake; None where there are none apart."""
    if conversion.weights == "raw" or not all(name in checkpoint.shapes for name in conversion.variables):
        return None
    chosen, _, _ = choose_variables(checkpoint, conversion.config, raw=True)
    return dict(checkpoint.read_many(chosen.values()))


def network_input(config: EfficientDetConfig, size: tuple[int, int], image: Path | None) -> np.ndarray:
    from _verify import synthetic_input

    if image is None:
        return synthetic_input(config, size)
    from pytorch_model.detection.preprocess import preprocess

    images = preprocess([image], config, size).images
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def compare_files(arguments: argparse.Namespace, console: Console) -> int:
    """Are two files the same function? Runs no network."""
    weights = read_weight_file(arguments.weights)
    comparison: WeightComparison | CheckpointComparison
    if Path(arguments.against).suffix in (*SUFFIXES, ".pt"):
        comparison = compare_weights(weights, read_weight_file(arguments.against))
        shown = comparison
    else:
        arguments.ckpt = arguments.against
        with _source.open_checkpoint(arguments, console, Path()) as checkpoint:
            config = _source.find_config(arguments, checkpoint).config
            comparison = compare_with_checkpoint(weights, checkpoint, config)
        shown = comparison.nearest
    same = comparison.passed if isinstance(comparison, CheckpointComparison) else comparison.same_function
    mark = "[green bold]same function[/]" if same else "[red bold]DIFFERENT[/]"
    console.print(f"{mark} {escape(comparison.explanation)}", soft_wrap=True)
    changed = [row for row in shown.differing if not row.same_function]
    if not same and changed:
        table = Table("tensor", "shape", "relative L2", "largest", "the part it works in")
        for row in changed[:20]:
            shape = "×".join(map(str, row.shape))
            figures = f"{row.difference.relative:.1e}", f"{row.difference.maximum:.1e}"
            table.add_row(row.key, shape, *figures, f"{row.part}: {row.part_difference.relative:.1e}")
        console.print(table)
        if others := len(shown.differing) - len(changed):
            console.print(
                f"{others} more are stored differently, which changes no part by more than rounding"
            )
    for note in shown.notes:
        console.print(escape(note), soft_wrap=True)
    if arguments.json:
        summary = {
            "same_function": same,
            "explanation": comparison.explanation,
            "differing": [row.key for row in changed],
            "stored_differently": [row.key for row in shown.differing if row.same_function],
        }
        json.dump(summary, sys.stdout, indent=2)
        print()
    return 0 if same else _cli.EXIT_FAILED


if __name__ == "__main__":
    _cli.run(main)
