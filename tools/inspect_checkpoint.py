#!/usr/bin/env python3
"""Say what a checkpoint is without converting it: model, step, averages, optimizer, what is odd about it."""

from __future__ import annotations

import _cli  # first: finds the packages

# isort: split
import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _source
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.checkpoint import Checkpoint
from porting.inspection import Averages, Inspection, Scope, inspect, scope_tree

EXAMPLES = """
examples:
  # a folder, a prefix, an archive or one file; or a release of Google's by name
  python tools/inspect_checkpoint.py --ckpt path/to/efficientdet-d0
  python tools/inspect_checkpoint.py --ckpt efficientdet-lite0.tgz
  python tools/inspect_checkpoint.py --ckpt efficientdet-d0
  # every variable with its shape
  python tools/inspect_checkpoint.py --ckpt run/model.ckpt-30000 --depth 9
  # for a script
  python tools/inspect_checkpoint.py --ckpt run/ --json | jq .model

exit status: 0 nothing odd; 1 something unexpected is in it; 2 it cannot be read; 130 interrupted; 141 pipe
closed; 143 ended by SIGTERM
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=_cli.HelpFormatter)
    _source.add_checkpoint_options(parser)
    parser.add_argument("--json", action="store_true", help="print all of it on stdout, machine-readable")
    parser.add_argument(
        "--depth", type=int, default=2, metavar="N", help="levels of scopes to show, 0 for none (default: 2)"
    )
    arguments = parser.parse_args()
    if arguments.depth < 0:
        parser.error(f"--depth is {arguments.depth}, must be 0 or more")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    console = Console(stderr=arguments.json, highlight=False)
    with _source.open_checkpoint(arguments, console, Path()) as checkpoint:
        with console.status("reading …"):
            inspection = inspect(checkpoint)
        scopes = scope_tree(inspection.shapes)
        if arguments.json:
            json.dump(summarise(checkpoint, inspection, scopes, arguments.depth), sys.stdout, indent=2)
            print()
        else:
            print_summary(console, checkpoint, inspection)
            if arguments.depth:
                print_scopes(console, scopes, arguments.depth)
    return _cli.EXIT_FAILED if inspection.unexpected else 0


def print_summary(console: Console, checkpoint: Checkpoint, inspection: Inspection) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("checkpoint", escape(checkpoint.source))
    step = f", step {checkpoint.step:,}" if checkpoint.step is not None else ""
    table.add_row("format", f"{checkpoint.format}, {len(checkpoint):,} entries{step}")
    found = inspection.inference
    table.add_row("model", escape(_source.describe(found.config)) if found else "not one that can be ported")
    if found and found.assumed:
        table.add_row("assumed", escape("; ".join(found.assumed)))
    told = _source.describe_settings(checkpoint)
    if told:
        table.add_row("told", told)
    table.add_row(
        "parameters",
        f"{inspection.trainable:,} trained, {inspection.untrained:,} batch-norm statistics, in "
        f"{len(inspection.shapes):,} variables",
    )
    table.add_row("averages", escape(describe_averages(inspection)))
    slots = ", ".join(f"{count:,} × {escape(slot)}" for slot, count in sorted(inspection.slots.items()))
    table.add_row("optimizer", slots or "no slots")
    for note in checkpoint.notes:
        table.add_row("note", escape(note))
    for sentence in inspection.unexpected:
        table.add_row("[red]unexpected[/]", escape(sentence))
    if not inspection.unexpected:
        table.add_row("unexpected", "[green]nothing[/]")
    console.print(table)


def describe_averages(inspection: Inspection) -> str:
    if not inspection.averaged:
        return "no moving averages (EMA)"
    held = f"{inspection.averaged:,} of {len(inspection.shapes):,} variables have a moving average (EMA)"
    apart = inspection.averages
    if not apart:
        return f"{held}; there are no raw values to compare them with"
    if apart.identical == apart.pairs:
        return f"{held}; all equal their raw values exactly"
    return (
        f"{held}; raw and EMA are {figure(apart.relative)} apart (relative L2), most of all "
        f"{apart.largest}, {figure(apart.largest_relative)}"
    )


def figure(relative: float) -> str:
    return f"{relative:.2g}" if math.isfinite(relative) else "infinitely far"


def print_scopes(console: Console, scopes: tuple[Scope, ...], depth: int) -> None:
    shown = list(lines(scopes, depth))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("scope", overflow="fold")
    table.add_column("variables", justify="right", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    if any(scope.shape is not None for _, scope in shown):
        table.add_column("shape", no_wrap=True)
    for branch, scope in shown:
        label = f"[dim]{branch}[/]{escape(scope.label)}"
        if scope.repeats > 1:
            label += f" [dim]×{scope.repeats}[/]"
        row = [label, f"{scope.variables:,}", f"{scope.parameters:,}"]
        if scope.shape is not None:
            row[1] = row[1] if scope.children else ""
            row.append("×".join(map(str, scope.shape)) or "scalar")
        table.add_row(*row, style=None if branch else "bold")
    console.print()
    console.print(table)


def lines(scopes: tuple[Scope, ...], depth: int, indent: str | None = None) -> Iterator[tuple[str, Scope]]:
    """Each scope down to ``depth``, with what is drawn before it."""
    for scope in scopes:
        last = scope is scopes[-1]
        yield "" if indent is None else indent + ("└─ " if last else "├─ "), scope
        if depth > 1:
            below = "" if indent is None else indent + ("   " if last else "│  ")
            yield from lines(scope.children, depth - 1, below)


def summarise(
    checkpoint: Checkpoint, inspection: Inspection, scopes: tuple[Scope, ...], depth: int
) -> dict[str, Any]:
    found, apart = inspection.inference, inspection.averages
    return {
        "source": checkpoint.source,
        "format": checkpoint.format,
        "step": checkpoint.step,
        "entries": len(checkpoint),
        "model": found.config.name if found else None,
        "variant": found.variant if found else None,
        "config": found.config.to_dict() if found else None,
        "assumed": list(found.assumed) if found else [],
        "parameters": {"trained": inspection.trainable, "statistics": inspection.untrained},
        "averaged": inspection.averaged,
        "averages": summarise_averages(apart) if apart else None,
        "slots": dict(inspection.slots),
        "notes": list(checkpoint.notes),
        "unexpected": list(inspection.unexpected),
        "variables": {name: list(shape) for name, shape in inspection.shapes.items()},
        "scopes": [summarise_scope(scope, depth) for scope in scopes] if depth else [],
    }


def summarise_averages(apart: Averages) -> dict[str, Any]:
    def number(relative: float) -> float | None:
        return relative if math.isfinite(relative) else None  # JSON has no infinity

    return {
        "pairs": apart.pairs,
        "identical": apart.identical,
        "relative_l2": number(apart.relative),
        "largest": apart.largest,
        "largest_relative_l2": number(apart.largest_relative),
    }


def summarise_scope(scope: Scope, depth: int) -> dict[str, Any]:
    return {
        "scope": scope.label,
        "repeats": scope.repeats,
        "variables": scope.variables,
        "parameters": scope.parameters,
        "shape": None if scope.shape is None else list(scope.shape),
        "scopes": [summarise_scope(child, depth - 1) for child in scope.children] if depth > 1 else [],
    }


if __name__ == "__main__":
    _cli.run(main)
