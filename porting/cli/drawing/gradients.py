"""Gradients on a terminal: a line per part of the network, a verdict for each mode of batch norm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from porting.parity.gradients import (
    GRADIENT_TOLERANCE,
    PARTS,
    TRAINING,
    GradientResult,
    TensorResult,
    part_of,
)


def print_gradients(console: Console, results: Mapping[str, GradientResult]) -> None:
    """``results``: mode of batch norm → result, see :func:`porting.parity.gradients.prove_gradients`."""
    console.print(_table(results))
    for mode, result in results.items():
        _print_verdict(console, mode, result)


def _table(results: Mapping[str, GradientResult]) -> Table:
    table = Table("part", "gradients", *results, "moving statistics", "")
    for part in PARTS:
        columns = [
            [tensor for tensor in tensors if part_of(tensor) == part]
            for tensors in (*(result.gradients for result in results.values()), results[TRAINING].statistics)
        ]
        if any(columns):
            passed = all(tensor.passed for tensors in columns for tensor in tensors)
            mark = "[green]✓[/]" if passed else "[red bold]✗[/]"
            table.add_row(part, str(len(columns[0])), *map(_worst, columns), mark)
    return table


def _worst(tensors: Iterable[TensorResult]) -> str:
    errors = [tensor.error.relative for tensor in tensors]
    return f"{max(errors):.0e}" if errors else ""


def _print_verdict(console: Console, mode: str, result: GradientResult) -> None:
    worst, count = result.worst, len(result.gradients) + len(result.statistics)
    verdict = "[green bold]passed[/]" if result.passed else "[red bold]FAILED[/]"
    console.print(
        f"{verdict} {mode}: {count} tensors; relative L2 ≤ {worst.error.relative:.1e} "
        f"(allowed {GRADIENT_TOLERANCE:.0e}), at {worst.name}",
        soft_wrap=True,
    )
    last = result.last_failure
    if last:
        scopes = ", ".join(last.sources) or "the input"
        names = f"{last.name} in PyTorch, {scopes} in TensorFlow"
        console.print(f"  nearest to the fault: {names}: {last.error.relative:.1e}", soft_wrap=True)
