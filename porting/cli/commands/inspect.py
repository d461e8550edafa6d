"""``inspect``: print what a checkpoint holds: model, averages, optimizer, scopes, anything unexpected."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.checkpoint import Checkpoint
from porting.cli.arguments.inspect import InspectOptions
from porting.cli.commands.source import describe, describe_names, describe_settings, open_checkpoint
from porting.cli.process import EXIT_FAILED, print_json
from porting.inspection import Averages, Inspection, Scope, inspect, scope_tree


def run(options: InspectOptions) -> int:
    console = Console(stderr=options.json, highlight=False)
    with open_checkpoint(options.source, console, Path()) as checkpoint:
        with console.status("reading …"):
            inspection = inspect(checkpoint)
        scopes = scope_tree(inspection.shapes)
        if options.json:
            print_json(_summary(checkpoint, inspection, scopes, options.depth))
        else:
            _print_summary(console, checkpoint, inspection)
            if options.depth:
                _print_scopes(console, scopes, options.depth)
    return EXIT_FAILED if inspection.unexpected else 0


def _print_summary(console: Console, checkpoint: Checkpoint, inspection: Inspection) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("checkpoint", escape(checkpoint.source))
    step = f", step {checkpoint.step:,}" if checkpoint.step is not None else ""
    table.add_row("format", f"{checkpoint.format}, {len(checkpoint):,} entries{step}")
    inferred = inspection.inference
    table.add_row("model", escape(describe(inferred.config)) if inferred else "not one that can be ported")
    if inferred and inferred.assumed:
        table.add_row("assumed", escape("; ".join(inferred.assumed)))
    settings = describe_settings(checkpoint)
    if settings:
        table.add_row("from the file", settings)
    if inferred and inferred.config.class_names:
        table.add_row("class names", escape(describe_names(inferred.config)))
    table.add_row(
        "parameters",
        f"{inspection.trainable:,} trained, {inspection.untrained:,} batch-norm statistics, in "
        f"{len(inspection.shapes):,} variables",
    )
    table.add_row("averages", escape(_describe_averages(inspection)))
    slots = ", ".join(f"{count:,} × {escape(slot)}" for slot, count in sorted(inspection.slots.items()))
    table.add_row("optimizer", slots or "no slots")
    for note in checkpoint.notes:
        table.add_row("note", escape(note))
    for sentence in inspection.unexpected:
        table.add_row("[red]unexpected[/]", escape(sentence))
    if not inspection.unexpected:
        table.add_row("unexpected", "[green]nothing[/]")
    console.print(table)


def _describe_averages(inspection: Inspection) -> str:
    if not inspection.averaged:
        return "no moving averages (EMA)"
    count = f"{inspection.averaged:,} of {len(inspection.shapes):,} variables have a moving average (EMA)"
    averages = inspection.averages
    if not averages:
        return f"{count}; there are no raw values to compare them with"
    if averages.identical == averages.pairs:
        return f"{count}; all equal their raw values exactly"
    return (
        f"{count}; raw and EMA are {_figure(averages.relative)} apart (relative L2), most of all "
        f"{averages.largest}, {_figure(averages.largest_relative)}"
    )


def _figure(relative: float) -> str:
    return f"{relative:.2g}" if math.isfinite(relative) else "infinitely far"


def _print_scopes(console: Console, scopes: tuple[Scope, ...], depth: int) -> None:
    lines = list(_lines(scopes, depth))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("scope", overflow="fold")
    table.add_column("variables", justify="right", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    if any(scope.shape is not None for _, scope in lines):
        table.add_column("shape", no_wrap=True)
    for branch, scope in lines:
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


def _lines(scopes: tuple[Scope, ...], depth: int, indent: str | None = None) -> Iterator[tuple[str, Scope]]:
    """Each scope down to ``depth``, with the branch of the tree that is drawn before it."""
    for scope in scopes:
        last = scope is scopes[-1]
        yield "" if indent is None else indent + ("└─ " if last else "├─ "), scope
        if depth > 1:
            below = "" if indent is None else indent + ("   " if last else "│  ")
            yield from _lines(scope.children, depth - 1, below)


def _summary(
    checkpoint: Checkpoint, inspection: Inspection, scopes: tuple[Scope, ...], depth: int
) -> dict[str, Any]:
    inferred, averages = inspection.inference, inspection.averages
    return {
        "source": checkpoint.source,
        "format": checkpoint.format,
        "step": checkpoint.step,
        "entries": len(checkpoint),
        "model": inferred.config.name if inferred else None,
        "variant": inferred.variant if inferred else None,
        "config": inferred.config.to_dict() if inferred else None,
        "assumed": list(inferred.assumed) if inferred else [],
        "parameters": {"trained": inspection.trainable, "statistics": inspection.untrained},
        "averaged": inspection.averaged,
        "averages": _averages_summary(averages) if averages else None,
        "slots": dict(inspection.slots),
        "notes": list(checkpoint.notes),
        "unexpected": list(inspection.unexpected),
        "variables": {name: list(shape) for name, shape in inspection.shapes.items()},
        "scopes": [_scope_summary(scope, depth) for scope in scopes] if depth else [],
    }


def _averages_summary(averages: Averages) -> dict[str, Any]:
    def number(relative: float) -> float | None:
        return relative if math.isfinite(relative) else None  # JSON has no infinity

    return {
        "pairs": averages.pairs,
        "identical": averages.identical,
        "relative_l2": number(averages.relative),
        "largest": averages.largest,
        "largest_relative_l2": number(averages.largest_relative),
    }


def _scope_summary(scope: Scope, depth: int) -> dict[str, Any]:
    return {
        "scope": scope.label,
        "repeats": scope.repeats,
        "variables": scope.variables,
        "parameters": scope.parameters,
        "shape": None if scope.shape is None else list(scope.shape),
        "scopes": [_scope_summary(child, depth - 1) for child in scope.children] if depth > 1 else [],
    }
