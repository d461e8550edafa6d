"""The proof of engines on a terminal: a paragraph for each, with its worst output if it failed."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from porting.parity.engines.agreement import Agreement
from porting.parity.engines.proof import ENGINE_TOLERANCE, EngineResult
from porting.parity.measure import FLOAT32_ACCUMULATED_TOLERANCE


def print_engines(console: Console, engines: tuple[EngineResult, ...]) -> None:
    console.print("\n[bold]engines[/]: head outputs, level by level, and the detections in them, same image")
    for engine in engines:
        verdict = "[green bold]passed[/]" if engine.passed else "[red bold]FAILED[/]"
        console.print(f"{verdict} {engine.name}: {_summary(engine)}", soft_wrap=True)
        if engine.outputs:
            _print_details(console, engine)


def _summary(engine: EngineResult) -> str:
    if not engine.outputs:
        return escape(engine.failure or "")
    eager = max(output.eager.relative for output in engine.outputs)
    shown = [output.reference.relative for output in engine.outputs if output.reference]
    text = (
        f"{len(engine.outputs)} head outputs; relative L2 to the eager network ≤ {eager:.1e} "
        f"(allowed {ENGINE_TOLERANCE:.0e})"
    )
    if not shown:
        return f"{text}; the reference shows none of them"
    allowed = f"allowed {FLOAT32_ACCUMULATED_TOLERANCE:.0e}" if engine.outputs[0].judged else "not judged"
    return f"{text}, to the reference ≤ {max(shown):.1e} ({allowed})"


def _print_details(console: Console, engine: EngineResult) -> None:
    worst = engine.worst
    if not worst.passed:
        failed = sum(not output.passed for output in engine.outputs)
        console.print(
            f"  {failed} of {len(engine.outputs)} outputs differ, most {worst.tap}: {_errors(engine)}",
            soft_wrap=True,
        )
    elif worst.is_rounding:
        console.print(f"  rounding, because it is as exact: {worst.tap}: {_errors(engine)}", soft_wrap=True)
    if engine.detections is None:
        console.print("  no detections: an output is not finite, or has another shape")
        return
    console.print(f"  detections: {_agreement(engine.detections)} the eager network's", soft_wrap=True)
    if engine.reference_detections:
        found = engine.reference_detections
        console.print(
            f"  detections: {_agreement(found)} the reference's; measured, not judged", soft_wrap=True
        )


def _errors(engine: EngineResult) -> str:
    worst = engine.worst
    text = f"{worst.eager.relative:.1e} to the eager network"
    if worst.exact and worst.eager_exact:
        text += f"; to float64 {worst.exact.relative:.1e}, the eager network {worst.eager_exact.relative:.1e}"
    return text


def _agreement(found: Agreement) -> str:
    end = f", {found.at_the_end} more at the list's end" if found.at_the_end else ""
    return (
        f"{found.equal} of {found.ours} (scores within {found.score:.1e}, allowed {found.allowed:.0e}; boxes "
        f"within {found.box:.1g} pixels){end} are"
    )
