"""Tables and notes of an evaluation: figures side by side, detection parity, classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pytorch_model.detection.pipeline import Speed
from pytorch_model.evaluation.detection_parity import DetectionParity
from pytorch_model.evaluation.figures import FIGURES, Evaluation

_MEANING = {
    "AP": "IoU 0.50:0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small objects",
    "APm": "medium",
    "APl": "large",
    "ARmax1": "1 detection an image",
    "ARmax10": "10 detections",
    "ARmax100": "100 detections",
    "ARs": "small objects",
    "ARm": "medium",
    "ARl": "large",
}


def figures_table(ours: Evaluation, reference: Evaluation | None, kind: str) -> Table:
    """The twelve figures: ours, and with a reference also its figures and the difference."""
    table = Table()
    table.add_column("figure")
    table.add_column("")
    for heading in ("ours", *((f"reference ({kind})", "difference") if reference else ())):
        table.add_column(heading, justify="right")
    for name in FIGURES:
        cells = _cells(ours.figures[name], reference.figures[name] if reference else None)
        table.add_row(name, f"[dim]{_MEANING[name]}[/]", *cells)
    return table


def per_class_table(ours: Evaluation, reference: Evaluation | None, names: Mapping[int, str]) -> Table:
    table = Table("class", title="AP by class", title_justify="left")
    for heading in ("ours", *(("reference", "difference") if reference else ())):
        table.add_column(heading, justify="right")
    for category, value in ours.per_class.items():
        cells = _cells(value, reference.per_class[category] if reference else None)
        table.add_row(escape(f"{category} {names[category]}"), *cells)
    return table


def parity_table(parity: DetectionParity) -> Table:
    table = Table(title="detections compared with the reference's", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("AP of ours, with the reference's as ground truth", f"{parity.ap:.4f}")
    table.add_row("detections: ours, reference's", f"{parity.ours:,}, {parity.reference:,}")
    table.add_row("pairs", f"{parity.pairs:,}")
    table.add_row("unmatched: ours, reference's", f"{parity.unmatched_ours}, {parity.unmatched_reference}")
    table.add_row("pairs with different labels", str(parity.label_flips))
    table.add_row("score difference: largest, mean", f"{parity.score_largest:.1e}, {parity.score_mean:.1e}")
    table.add_row(
        "box difference in pixels: largest, mean", f"{parity.box_largest:.1e}, {parity.box_mean:.1e}"
    )
    if parity.saturated:
        table.add_row("reference's scores that round to 1, in random order", str(parity.saturated))
    return table


def print_notes(
    console: Console, notes: tuple[str, ...], unreadable: Mapping[Any, str], resized: int
) -> None:
    for note in notes:
        console.print(note, style="yellow", markup=False, soft_wrap=True)
    if resized:
        console.print(
            f"{resized} images differ in size from the annotations: their boxes may be off",
            style="yellow",
            soft_wrap=True,
        )
    for reason in list(unreadable.values())[:10]:
        console.print(f"skipped {reason}", style="yellow", markup=False, soft_wrap=True)
    if unreadable:
        console.print(
            f"{len(unreadable)} images skipped: no figure counts them; --restart tries again",
            style="yellow",
        )


def speed_note(speed: Speed) -> str:
    """How fast this run was; nothing if it only resumed a complete one."""
    return f", {speed.images_per_second:.1f} images/s" if speed.images else ""


def _cells(ours: float, reference: float | None) -> list[str]:
    """Our figure; with a reference also its figure and the difference. COCO's -1: nothing is annotated."""
    if ours < 0:
        return ["none annotated"]
    if reference is None:
        return [f"{ours:.4f}"]
    difference = f"{ours - reference:+.4f}" if ours != reference else "0"
    return [f"{ours:.4f}", f"{reference:.4f}", difference]


def print_parity(console: Console, parity: DetectionParity, exact: bool) -> None:
    """The comparison with the reference, and the verdict if the reference is ``exact``."""
    console.print(parity_table(parity))
    if not exact:
        console.print("no verdict: the reference is quantised, and its rounding is part of its results")
        return
    if not parity.reference:
        console.print("[red bold]FAILED[/] detection parity: the reference found nothing to compare with")
        return
    verdict = "[green bold]passed[/]" if parity.passed else "[red bold]FAILED[/]"
    console.print(f"{verdict} detection parity: AP {parity.ap:.4f}, must be 1.000", soft_wrap=True)
    if parity.saturated and not parity.passed:
        console.print(
            f"{parity.saturated} of the reference's scores round to 1, so their order is random: these "
            "weights were not made for such images, and detections cannot prove them; verify.py can",
            style="yellow",
            soft_wrap=True,
        )
