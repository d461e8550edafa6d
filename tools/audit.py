#!/usr/bin/env python3
"""Count parameters and multiply-adds of every variant, and hold them against AutoML and the paper."""

from __future__ import annotations

import _cli  # first: finds the packages

# isort: split
import argparse
import json
import sys

from rich.console import Console
from rich.progress import track
from rich.table import Table

from porting.audit import PARTS, ModelAudit, audit, difference
from porting.publish.zoo import markdown
from pytorch_model.config import MODELS, model_config

EXAMPLES = f"""
examples:
  # all 15 variants
  python tools/audit.py
  # two of them, for a machine
  python tools/audit.py --models efficientdet-d0,efficientdet-d7x --json
  # the README's table of the 26 released checkpoints
  python tools/audit.py --markdown

A parameter count that does not round to the published figure is a failed check. Multiply-adds are shown
beside the paper's but not judged: ours are of convolutions alone, the paper's of every operation.

{_cli.EXIT_CODES}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=_cli.HelpFormatter)
    parser.add_argument("--models", default="all", help="all, or names separated by commas (default: all)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the figures as JSON on stdout")
    form.add_argument("--markdown", action="store_true", help="print the README's table of releases")
    arguments = parser.parse_args()
    if arguments.markdown and arguments.models != "all":
        parser.error("--markdown is the table of all releases; leave out --models")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.markdown:
        print(markdown())
        return 0
    names = MODELS if arguments.models == "all" else arguments.models.split(",")
    models = [model_config(name.strip()).name for name in names]  # refuses an unknown one at once
    progress = Console(stderr=True)
    audits = [audit(m) for m in track(models, "counting", console=progress, transient=True)]
    if arguments.json:
        json.dump([found.to_dict() for found in audits], sys.stdout, indent=2)
        print()
    else:
        console = Console(highlight=False)
        console.print(parameter_table(audits), multiply_add_table(audits), sep="\n")
    return 0 if all(found.parameters.agrees for found in audits) else _cli.EXIT_FAILED


def parameter_table(audits: list[ModelAudit]) -> Table:
    table = Table(title="parameters", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for column in (*PARTS, "bias-free", "biases", "AutoML", "published", "differs", "rounds"):
        table.add_column(column, justify="right", no_wrap=True)
    for found in audits:
        counted = found.parameters
        table.add_row(
            found.config.name.removeprefix("efficientdet-"),
            *(f"{counted.our_parts[part]:,}" for part in PARTS),
            f"{counted.ours:,}",
            f"{counted.removed_biases:,}",
            f"{counted.automl:,}",
            f"{counted.published}M",
            percent(difference(counted.automl, counted.published, 1e6)),
            "[green]yes[/]" if counted.agrees else "[red bold]NO[/]",
        )
    return table


def multiply_add_table(audits: list[ModelAudit]) -> Table:
    table = Table(
        title="\nmultiply-adds of convolutions, one image; the paper counts every operation",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
    )
    table.add_column("model", no_wrap=True)
    for column in ("image", *PARTS, "total", "paper", "differs", "rounds"):
        table.add_column(column, justify="right", no_wrap=True)
    for found in audits:
        height, width = found.config.image_size
        published = found.published_multiply_adds
        rounds = {None: "–", True: "yes", False: "no"}[found.multiply_adds_agree]
        table.add_row(
            found.config.name.removeprefix("efficientdet-"),
            f"{height}×{width}",
            *(f"{found.multiply_add_parts[part] / 1e9:.3f}B" for part in PARTS),
            f"{found.multiply_adds / 1e9:.3f}B",
            f"{published}B" if published else "–",
            percent(difference(found.multiply_adds, published, 1e9)),
            rounds,
        )
    return table


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"


if __name__ == "__main__":
    _cli.run(main)
