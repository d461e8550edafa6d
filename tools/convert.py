#!/usr/bin/env python3
"""Port an AutoML EfficientDet checkpoint to bias-free PyTorch weights."""

from __future__ import annotations

import _cli  # first: finds the packages

# isort: split
import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _source
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.audit import audit_parameters
from porting.convert import Conversion, convert, metadata
from porting.errors import EfficientDetError
from porting.hparams import Hparams
from porting.infer import Inference
from porting.parity.reference import OPS
from pytorch_model.files import check_writable, replacing
from pytorch_model.weights import SUFFIXES
from pytorch_model.weights.files import write_weights

if TYPE_CHECKING:
    from porting.checkpoint import Checkpoint

EXAMPLES = f"""
examples:
  # a folder holding model.index, model.data-… and checkpoint
  python tools/convert.py --ckpt path/to/efficientdet-d0
  # one of Google's releases, downloaded once
  python tools/convert.py --ckpt efficientdet-d0
  # a model of one's own, with what its weights do not tell
  python tools/convert.py --ckpt run/ --hparams "image_size=640x480,aspect_ratios=[1.0,3.0,0.33]"
  # no checkpoint at hand: write a seeded one in AutoML's format, port it, prove it
  python tools/convert.py --ckpt synthetic:efficientdet-d4 --verify
  # proven against the graph that Google's code saved beside the checkpoint
  python tools/convert.py --ckpt path/to/efficientdet-d0 --verify --reference meta
  # the last raw values instead of their moving averages
  python tools/convert.py --ckpt run/model.ckpt-30000 --raw --out mine.safetensors

{_cli.EXIT_CODES}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=_cli.HelpFormatter)
    _source.add_checkpoint_options(parser)
    _source.add_model_options(parser)
    parser.add_argument("--raw", action="store_true", help="port the raw values, not the moving averages")
    parser.add_argument(
        "--out", type=Path, help=f"weight file, {' or '.join(SUFFIXES)} (default: MODEL.safetensors here)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare every layer with TensorFlow; write only if it passes"
    )
    parser.add_argument("--size", default="", help=_cli.SIZE_HELP)
    _source.add_reference_options(parser)
    parser.add_argument("--json", action="store_true", help="print a machine-readable summary on stdout")
    arguments = parser.parse_args()
    if not arguments.verify and (arguments.reference != OPS or arguments.graph):
        parser.error("--reference and --graph say what --verify compares with: add --verify")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    console = Console(stderr=arguments.json, highlight=False)
    _source.check_options(arguments)
    if arguments.size and not arguments.verify:
        raise EfficientDetError(
            "--size is the picture that --verify compares on; add --verify, or leave it out"
        )
    out: Path = arguments.out or Path()
    if arguments.out:
        check_output(out)
    folder = out.parent if arguments.out else Path()
    with _source.open_checkpoint(arguments, console, folder) as checkpoint:
        inference = _source.find_config(arguments, checkpoint)
        if not arguments.out:
            out = Path(inference.config.name.replace("-", "_") + ".safetensors")
            check_output(out)
        conversion = convert(checkpoint, inference.config, raw=arguments.raw)
        print_conversion(console, checkpoint, inference, arguments.hparams, conversion)
        summary = summarise(checkpoint, inference, arguments.hparams, conversion, out)
        if arguments.verify and not is_proven(arguments, console, checkpoint, conversion, summary):
            print_json(arguments, {**summary, "weights_file": None})
            console.print("[red bold]not written:[/] the port does not match the reference")
            return _cli.EXIT_FAILED
    with replacing(out) as temporary:
        about = {
            key: json.dumps(value)
            for key, value in metadata(conversion, checkpoint, inference.assumed).items()
        }
        write_weights(temporary, conversion.state_dict, conversion.config, about)
    console.print(f"[bold]wrote[/] {escape(str(out))} ({out.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    print_json(arguments, summary)
    return 0


def is_proven(
    arguments: argparse.Namespace,
    console: Console,
    checkpoint: Checkpoint,
    conversion: Conversion,
    summary: dict[str, Any],
) -> bool:
    """Whether the port matches the reference; the figures go into ``summary``."""
    from _verify import chosen_reference, chosen_size, synthetic_input, verify

    reference = chosen_reference(arguments, checkpoint, conversion)
    images = synthetic_input(conversion.config, chosen_size(conversion.config, arguments.size, reference))
    outcome = verify(console, conversion, images, reference=reference)
    summary["parity"] = {"size": list(images.shape[1:3]), **outcome.figures()}
    return outcome.passed is True  # nothing is proven by a reference too coarse to judge by


def check_output(out: Path) -> None:
    if out.suffix not in SUFFIXES:
        raise EfficientDetError(f"cannot write {out}: use a name that ends in {' or '.join(SUFFIXES)}")
    check_writable(out)


def print_conversion(
    console: Console,
    checkpoint: Checkpoint,
    inference: Inference,
    hparams: Hparams,
    conversion: Conversion,
) -> None:
    config, coverage = conversion.config, conversion.coverage
    audit = audit_parameters(config)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    step = f", step {checkpoint.step:,}" if checkpoint.step is not None else ""
    table.add_row("read", f"{escape(checkpoint.source)} ({checkpoint.format}{step})")
    table.add_row("model", escape(_source.describe(config)))
    if hparams.overrides:
        table.add_row(
            "given", "; ".join(f"{name} {_source.shown(getattr(config, name))}" for name in hparams.overrides)
        )
    told = _source.describe_settings(checkpoint, hparams.overrides)
    if told:
        table.add_row("told", told)
    if inference.assumed:
        table.add_row("assumed", "; ".join(inference.assumed))
    without_effect = [*hparams.ignored, *(f"nms_configs.{name}" for name in hparams.nms)]
    if without_effect:
        table.add_row("ignored", f"{', '.join(without_effect)}: no weight depends on these hparams")
    for note in checkpoint.notes:
        table.add_row("note", escape(note))
    kind = "moving averages (EMA)" if conversion.weights == "EMA" else "raw values"
    table.add_row("weights", kind)
    table.add_row(
        "coverage",
        f"{coverage.used + coverage.unused_count} TensorFlow variables = {coverage.used} used + "
        f"{coverage.unused_count} deliberately unused; {coverage.written} PyTorch tensors, each written "
        f"once; {coverage.folded} biases folded into batch-norm means",
    )
    for why, names in coverage.unused.items():
        table.add_row("", f"unused: {len(names)} × {why}")
    published = ""
    if audit.published:
        verdict = "agrees" if audit.agrees else "does NOT agree"
        published = f"; paper {audit.published}M, {verdict}"
    table.add_row(
        "parameters",
        f"{audit.ours:,} bias-free + {audit.removed_biases:,} biases removed = "
        f"{audit.automl:,} in AutoML{published}",
    )
    console.print(table)


def summarise(
    checkpoint: Checkpoint, inference: Inference, hparams: Hparams, conversion: Conversion, out: Path
) -> dict[str, Any]:
    audit, coverage = audit_parameters(conversion.config), conversion.coverage
    return {
        **metadata(conversion, checkpoint, inference.assumed),
        "source": checkpoint.source,
        "notes": list(checkpoint.notes),
        "given": list(hparams.overrides),
        "config": conversion.config.to_dict(),
        "coverage": {
            "used": coverage.used,
            "unused": {why: len(names) for why, names in coverage.unused.items()},
            "written": coverage.written,
            "folded_biases": coverage.folded,
        },
        "parameters": {"ours": audit.ours, "automl": audit.automl, "published_millions": audit.published},
        "weights_file": str(out),
    }


def print_json(arguments: argparse.Namespace, summary: dict[str, Any]) -> None:
    if arguments.json:
        json.dump(summary, sys.stdout, indent=2)
        print()


if __name__ == "__main__":
    _cli.run(main)
