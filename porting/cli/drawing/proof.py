"""A proof on a terminal: a line per layer when it is compared, the verdict, the cost of other precisions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from porting.parity.detections import DetectionCheck
from porting.parity.diagnosis.diagnose import Diagnosis
from porting.parity.lockstep import ParityResult, TapResult
from porting.parity.measure import tolerances
from porting.parity.precision import PrecisionCost
from porting.parity.proof import Proof


class ProofLines:
    """A :class:`porting.parity.proof.Listener` that draws a bar for float64 and a line per layer of float32.

    Use it as a context manager around the proof.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._exact: dict[str, TapResult] = {}  # the float64 run, by tap
        self._stage = ExitStack()  # the bar or the status that is drawn now
        self._bar: Progress | None = None

    def started(self, reference: str, image_size: tuple[int, int]) -> None:
        height, width = image_size
        self._console.print(
            f"\n[bold]verifying[/] against {escape(reference)}, same {height}×{width} image", soft_wrap=True
        )

    def run_started(self, dtype: str, activations: int) -> None:
        self._stage.close()
        self._bar = None
        if dtype == "float64":
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[tap]}"))
            bar = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            bar.add_task(dtype, total=activations, tap="")
            self._bar = self._stage.enter_context(bar)
        else:
            self._print_head()

    def compared(self, result: TapResult) -> None:
        if self._bar:
            self._exact[result.pair.tap] = result
            self._bar.update(self._bar.task_ids[0], advance=1, tap=result.pair.module)
        else:
            self._print_row(result)

    def diagnosing(self) -> None:
        self._stage.close()
        self._stage.enter_context(self._console.status("looking for the cause …"))

    def __enter__(self) -> ProofLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stage.close()

    def _is_wide(self) -> bool:
        return self._console.width >= 140

    def _print_head(self) -> None:
        scope = f"{'TensorFlow scope':<44}" if self._is_wide() else ""
        types = ("float64", "float32") if self._exact else ("float32",)
        figures = f"  {'accum.':>8}{'isol.':>8}" * len(types)
        heads = "".join(f"  {dtype:>16}" for dtype in types)
        self._console.print(
            f"[bold]{'PyTorch module':<34}{scope}{'shape':>18}{heads}[/]\n"
            f"[dim]{'':<{len(scope) + 52}}{figures}[/]",
            soft_wrap=True,
        )

    def _print_row(self, result: TapResult) -> None:
        runs = [self._exact[result.pair.tap], result] if self._exact else [result]
        name = result.pair.module if result.pair.output is None else result.pair.tap
        scope = f"{result.pair.tap:<44}" if self._is_wide() else ""
        shape = "×".join(str(n) for n in result.shape)
        figures = "".join(f"  {run.accumulated.relative:>8.0e}{run.isolated.relative:>8.0e}" for run in runs)
        mark = "[green]✓[/]" if all(run.passed for run in runs) else "[red bold]✗[/]"
        self._console.print(f"{name:<34}{scope}{shape:>18}{figures} {mark}", soft_wrap=True)


def print_verdict(console: Console, proof: Proof) -> None:
    """A paragraph per run, and the diagnosis if one diverged."""
    console.print()
    for result in proof.results:
        _print_run(console, result)
    if proof.about_assumed:
        colour = "" if proof.is_original and proof.passed else "yellow"
        console.print(f"  {escape(proof.about_assumed)}", style=colour, soft_wrap=True)
    if proof.detections:
        _print_detections(console, proof.detections)
    elif "float64" not in {result.dtype for result in proof.results}:
        console.print(
            "  detections are not compared: the reference does not turn grey levels into detections, or is "
            "quantised; image size, normalisation and anchors are not proven",
            soft_wrap=True,
        )
    if proof.diagnosis:
        _print_diagnosis(console, proof.diagnosis)
    elif proof.detections and not proof.detections.passed:
        return
    elif proof.passed is False and "float64" not in {result.dtype for result in proof.results}:
        console.print(
            "  the weights agree with --reference ops on a small image: look for the cause in "
            f"{escape(proof.reference)}",
            soft_wrap=True,
        )


def _print_detections(console: Console, check: DetectionCheck) -> None:
    verdict = "[green bold]passed[/]" if check.passed else "[red bold]FAILED[/]"
    console.print(
        f"{verdict} detections: {check.found} of the file's {check.count} are among our predictions "
        "(class, score and box, before suppression)",
        soft_wrap=True,
    )
    if check.cause:
        console.print(f"  {escape(check.cause)}", soft_wrap=True)


def _print_run(console: Console, result: ParityResult) -> None:
    accumulated, isolated = result.worst("accumulated"), result.worst("isolated")
    limits = tolerances(result.dtype)
    verdict = "[green bold]passed[/]" if result.passed else "[red bold]FAILED[/]"
    if not result.judged:
        verdict = "[yellow bold]measured, not judged[/]"
    console.print(
        f"{verdict} {result.dtype}: {len(result.taps)} activations; relative L2 accumulated ≤ "
        f"{accumulated.accumulated.relative:.1e} (allowed {limits[0]:.0e}), isolated ≤ "
        f"{isolated.isolated.relative:.1e} (allowed {limits[1]:.0e})"
    )
    if result.absent:
        console.print(
            f"  {len(result.absent)} of {len(result.taps) + len(result.absent)} activations are not "
            f"compared: the reference does not show them ({result.absent[0]}, …)",
            soft_wrap=True,
        )
    if not result.judged:
        console.print("  the reference is quantised: its own rounding is larger than any tolerance here")
    elif result.divergence:
        console.print(f"  {result.divergence}", soft_wrap=True)


def _print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    console.print(f"  [bold]likely cause:[/] {diagnosis.kind}: {diagnosis.detail}", soft_wrap=True)
    for tensor in diagnosis.weights[:6]:
        ours, expected = (" ".join(f"{x:+.3g}" for x in side) for side in (tensor.ours, tensor.expected))
        console.print(
            f"    {tensor.tensor}: off by {tensor.relative:.1e}; min max mean std {ours}; "
            f"expected {expected}",
            soft_wrap=True,
        )


def print_precisions(console: Console, costs: Iterator[PrecisionCost], proof: Proof) -> Proof:
    """Print each row when it is measured. Returns ``proof`` with all of them."""
    console.print("\n[bold]other ways of running[/]: relative L2 to the same network in float64; not judged")
    console.print(f"[dim]{'':<20}{'classes':>10}{'boxes':>10}{'largest change of a score':>28}[/]")
    measured: list[PrecisionCost] = []
    while True:
        with console.status("running …"):
            cost = next(costs, None)
        if cost is None:
            return dataclasses.replace(proof, precisions=tuple(measured))
        measured.append(cost)
        if cost.classes is None or cost.boxes is None:
            console.print(f"{cost.name:<20}  not run: {escape(cost.skipped or '')}", soft_wrap=True)
        else:
            figures = f"{cost.classes.relative:>10.1e}{cost.boxes.relative:>10.1e}{cost.score:>28.1e}"
            console.print(f"{cost.name:<20}{figures}")
