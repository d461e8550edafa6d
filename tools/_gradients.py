"""Compare gradients and draw it: a line per part of the network, a verdict for each mode of batch norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from _verify import require_tensorflow
from rich.console import Console
from rich.table import Table

from porting.convert import Conversion
from porting.parity.gradients import GRADIENT_TOLERANCE, GradientResult, TensorResult, compare_gradients
from porting.synthetic import synthetic_image
from pytorch_model.config import EfficientDetConfig

PARTS = ("images", "backbone", "resample", "bifpn", "class_net", "box_net")
MODES = {"evaluation": False, "training": True}


def verify_gradients(console: Console, conversion: Conversion) -> dict[str, GradientResult]:
    """Compare every gradient of the port with the TensorFlow reference's, in float64, in both modes.

    On two seeded pictures, small ones: a backward pass keeps every activation. Mode → result, as in
    :data:`MODES`. Raises :class:`EfficientDetError` where TensorFlow is not installed.
    """
    require_tensorflow()
    config = conversion.config
    height, width = picture_size(config)
    pictures = np.stack([synthetic_image(height, width, seed) for seed in range(2)])
    images = (pictures - np.array(config.mean_rgb, np.float32)) / np.array(config.stddev_rgb, np.float32)
    console.print(f"\n[bold]gradients[/] of one scalar, float64, two seeded {height}×{width} pictures")
    results = {}
    for mode, training in MODES.items():
        with console.status(f"both networks, forward and backward, batch norm in {mode} …"):
            results[mode] = compare_gradients(config, conversion.variables, images, training)
    console.print(_table(results))
    for mode, result in results.items():
        _print_verdict(console, mode, result)
    return results


def picture_size(config: EfficientDetConfig) -> tuple[int, int]:
    """Small, but enough for batch norm at the last level: 136×136 leaves 2×2 at P7, 136×272 1×2 at P8."""
    return 136, max(136, 17 << (config.max_level - 4))


def figures(results: dict[str, GradientResult]) -> dict[str, Any]:
    """For ``--json``."""
    return {
        mode: {
            "passed": result.passed,
            "gradients": len(result.gradients),
            "statistics": len(result.statistics),
            "worst": result.worst.error.relative,
            "worst_at": result.worst.name,
        }
        for mode, result in results.items()
    }


def part_of(tensor: TensorResult) -> str:
    """The part of the network; a folded bias has AutoML's name, and PyTorch's part."""
    scope = tensor.name.split("/" if "/" in tensor.name else ".")[0]
    return {"fpn_cells": "bifpn"}.get(scope, "resample" if scope.startswith("resample") else scope)


def _table(results: dict[str, GradientResult]) -> Table:
    table = Table("part", "gradients", "evaluation", "training", "moving statistics", "")
    for part in PARTS:
        columns = [
            [tensor for tensor in tensors if part_of(tensor) == part]
            for tensors in (
                *(result.gradients for result in results.values()),
                results["training"].statistics,
            )
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
