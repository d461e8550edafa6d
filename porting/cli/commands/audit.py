"""``audit``: print each model's counts next to AutoML's and the paper's."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.progress import track
from rich.table import Table

from porting.audit import PARTS, ModelAudit, audit, difference
from porting.cli.arguments.audit import AuditOptions
from porting.cli.process import EXIT_FAILED, print_json
from porting.publish.zoo import markdown


def run(options: AuditOptions) -> int:
    if options.markdown:
        print(markdown())
        return 0
    progress = Console(stderr=True)
    audits = [audit(model) for model in track(options.models, "counting", console=progress, transient=True)]
    if options.json:
        print_json([found.to_dict() for found in audits])
    else:
        console = Console(highlight=False)
        tables = _parameter_table(audits), _multiply_add_table(audits)
        unlimited = console.options.update(max_width=1000)
        # A line that the terminal wraps still has every digit; Rich would cut each number.
        console.width = max(
            console.width, *(console.measure(each, options=unlimited).maximum for each in tables)
        )
        console.print(*tables, sep="\n")
    return 0 if all(found.parameters.agrees for found in audits) else EXIT_FAILED


def _parameter_table(audits: Sequence[ModelAudit]) -> Table:
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
            _percent(difference(counted.automl, counted.published, 1e6)),
            "[green]yes[/]" if counted.agrees else "[red bold]NO[/]",
        )
    return table


def _multiply_add_table(audits: Sequence[ModelAudit]) -> Table:
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
            _percent(difference(found.multiply_adds, published, 1e9)),
            rounds,
        )
    return table


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1%}"
