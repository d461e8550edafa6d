"""Tables of measured speed."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.parity.measure import FLOAT32_ACCUMULATED_TOLERANCE

BUSY = 0.5  # of the cores: a load above it when the measuring began is worth a line


def draw_networks(console: Console, figures: dict[str, Any]) -> None:
    """A table of networks for each model and batch size, with a line about postprocessing below."""
    settings = figures["settings"]
    _draw_machine(console, figures["machine"], settings)
    console.print(
        f"weights: {settings['weights']}; auto is {settings['auto']}; "
        f"best and median of {settings['repeat']} runs, all sides in turn",
        markup=False,
        soft_wrap=True,
    )
    for result in figures["results"]:
        _print_title(console, result, f"batch of {result['batch_size']}, ratio to {result['base']}")
        console.print(_networks_table(result, settings["auto"]))
        for row in result["networks"]:
            if row["state"] != "measured":
                console.print(f"{row['side']}: {row['state']}: {row['reason']}", markup=False, soft_wrap=True)
            elif row["relative_error"] > FLOAT32_ACCUMULATED_TOLERANCE:
                about = f"{row['side']} is off by {row['relative_error']:.0e}: it computes something else"
                console.print(about, style="red", soft_wrap=True)
        for row in result["postprocess"]:
            console.print(_postprocess_line(row, result["fastest"]), markup=False, soft_wrap=True)


def _networks_table(result: dict[str, Any], auto: str) -> Table:
    on_gpu = any(row["device_megabytes"] is not None for row in result["networks"])
    table = Table("side", box=SIMPLE)
    for heading in ("best ms", "median", "ratio", "begin s", "MB", *(["GPU MB"] if on_gpu else []), "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in result["networks"]:
        name = f"{row['side']} (auto)" if row["side"] == auto else row["side"]
        if row["state"] != "measured":
            table.add_row(f"[dim]{name}, {row['state']}[/]")
            continue
        cells = [
            f"{row['best_ms']:.1f}",
            f"{row['median_ms']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['load_seconds'] + row['first_seconds']:.1f}",
            _whole(row["peak_megabytes"]),
            *([_whole(row["device_megabytes"])] if on_gpu else []),
            f"{row['relative_error']:.0e}",
        ]
        table.add_row(name, *cells)
    return table


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _postprocess_line(row: dict[str, Any], fastest: str | None) -> str:
    name = f"postprocessing, {row['side']}"
    if row["state"] != "measured":
        return f"{name}: {row['state']}: {row['reason']}"
    ratio = "" if row["ratio"] is None else f", {row['ratio']:.2f} × the fastest network ({fastest})"
    return f"{name}: best {row['best_ms']:.1f} ms, median {row['median_ms']:.1f} ms{ratio}"


def draw_evaluation(console: Console, figures: dict[str, Any]) -> None:
    """The parts, one after the other, and what the pipeline makes of them."""
    settings = figures["settings"]
    _draw_machine(console, figures["machine"], settings)
    how = f"engine {settings['engine']}, batches of {settings['batch_size']}, {figures['images']} images"
    _print_title(console, settings, how)
    table = Table("part", box=SIMPLE)
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for part, seconds in figures["seconds"].items():
        table.add_row(part, f"{seconds:.2f}", f"{100 * figures['share'][part]:.0f} %")
    console.print(table)
    if figures["unreadable"]:
        console.print(f"{figures['unreadable']} images could not be read", style="yellow")
    console.print(
        f"the pipeline: {figures['wall_seconds']:.2f} s, {figures['images_per_second']:.1f} images/s, "
        f"{figures['wall_over_network']:.2f} × the network alone"
    )


def _print_title(console: Console, what: dict[str, Any], how: str) -> None:
    height, width = what["image_size"]
    console.print(f"\n{what['model']}, {height} × {width}, {how}", style="bold", markup=False, soft_wrap=True)


def _draw_machine(console: Console, machine: dict[str, Any], settings: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = f", on {machine['gpu']}" if machine["gpu"] else ""
    avx512 = "with" if machine["avx512"] else "without"
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {avx512} AVX-512 ({machine['instructions']}), "
        f"threads: {settings['threads']}{where}",
        versions,
    ]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    load = machine["load"]
    if load is not None and load > BUSY * machine["cores"]:
        console.print(
            f"the machine was busy when this began (load {load:.1f}): trust the ratios more than the times",
            style="yellow",
            soft_wrap=True,
        )


def draw_sides(console: Console, figures: dict[str, Any]) -> None:
    """``convert``, ``read``, ``detect`` and ``cold``: a table of sides, and what else there is to say."""
    table = Table("", "median s", "best s", "ratio of medians")
    for name, seconds in figures["seconds"].items():
        table.add_row(
            escape(name),
            f"{seconds['median']:.4f}",
            f"{seconds['best']:.4f}",
            f"{figures['ratio'][name]:.2f}",
        )
    console.print(table)
    if "described" in figures:
        console.print(
            f"{figures['described']}: postprocessing (select and NMS) takes "
            f"{figures['postprocessing_over_network']:.2f} × the network"
        )
    if "megabytes_kept" in figures:
        console.print(
            f"kept {figures['megabytes_kept']:.1f} MB; the peak is {figures['peak_megabytes']:.1f} MB, "
            f"{figures['peak_over_kept']:.2f} × what is kept"
        )
    if "over_import_and_two_reads" in figures:
        console.print(
            f"converting takes {figures['over_import_and_two_reads']:.2f} × (import torch + 2 plain reads)"
        )
    if figures.get("tensorflow_import_seconds"):
        console.print(
            f"importing TensorFlow took {figures['tensorflow_import_seconds']:.1f} s, not counted above"
        )
