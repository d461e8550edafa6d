"""``bench``: measure, and print the figures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from porting.cli.arguments.bench import (
    COLD,
    CONVERT,
    DETECT,
    BenchOptions,
    EvalBenchOptions,
    InferOptions,
)
from porting.cli.drawing.bench import draw_evaluation, draw_networks, draw_sides
from porting.cli.drawing.progress import ImageBar
from porting.cli.process import EXIT_FAILED, print_json


def run(options: BenchOptions | InferOptions | EvalBenchOptions) -> int:
    console = Console(stderr=options.json, highlight=False)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        if isinstance(options, InferOptions):
            figures, draw = _infer(options, folder, console), draw_networks
        elif isinstance(options, EvalBenchOptions):
            figures, draw = _evaluate(options, folder, console), draw_evaluation
        else:
            figures, draw = _parts(options, folder), draw_sides
    if options.json:
        print_json(figures)
    else:
        draw(console, figures)
    return 0 if figures.get("passed", True) else EXIT_FAILED


def _infer(options: InferOptions, folder: Path, console: Console) -> dict[str, Any]:
    from porting.bench.infer import InferPlan, measure_networks

    size = options.image_size
    plan = InferPlan(
        options.models,
        options.weights,
        options.batch_sizes,
        None if size is None else (size, size),
        options.sides,
        options.device,
        options.threads,
        options.repeat,
    )
    with ImageBar(console, "measuring") as bar:
        return measure_networks(plan, folder, bar)


def _evaluate(options: EvalBenchOptions, folder: Path, console: Console) -> dict[str, Any]:
    from porting.bench.evaluate import EvalPlan, measure_evaluation

    plan = EvalPlan(
        options.weights,
        options.data,
        options.limit,
        options.batch_size,
        options.device,
        options.engine,
        options.threads,
    )
    with ImageBar(console, "detecting, twice") as bar:
        return measure_evaluation(plan, folder, bar)


def _parts(options: BenchOptions, folder: Path) -> dict[str, Any]:
    """Each is imported when it is asked for: what it imports would slow the others."""
    if options.what == CONVERT:
        from porting.bench.convert import measure_conversion

        return measure_conversion(folder, options.model, options.repeat)
    if options.what == COLD:
        from porting.bench.cold import measure_first_answer

        return measure_first_answer(folder, options.model, options.repeat)
    if options.what == DETECT:
        from porting.bench.detect import measure_detection

        return measure_detection(folder, options.model, options.repeat, options.batch_size, options.device)
    from porting.bench.read import measure_reading

    return measure_reading(folder, options.model, options.repeat)
