"""Run the proof and draw it: one line per layer as it is compared, a verdict at the end."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from porting.checkpoint import Checkpoint
from porting.convert import Conversion, apply_rules
from porting.errors import EfficientDetError
from porting.parity import ParityResult, TapResult, compare, tensorflow_reference, tolerances
from porting.parity.diagnose import Diagnosis, diagnose
from porting.parity.lockstep import Observer
from porting.parity.precision import NAMES, QUICK, Cost, measure_variants
from porting.parity.reference import OPS
from porting.parity.reference.choose import FileReference, open_reference
from porting.parity.report.content import variant_rows
from porting.rules import rules, taps
from porting.synthetic import synthetic_image
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet

DEFAULT_SIZE = 512  # the largest picture a verification takes of itself; a model's own where that is smaller
DIAGNOSIS_SIZE = 256  # a diagnosis keeps every activation and runs often: its picture is small


@dataclass(frozen=True)
class Outcome:
    """``results``: the rules and both networks in float64, unless the reference is a file; then the weights
    as written, in float32. ``reference``: what they were compared with, in words."""

    results: tuple[ParityResult, ...]
    diagnosis: Diagnosis | None
    reference: str
    variants: tuple[Cost, ...] = ()

    @property
    def passed(self) -> bool | None:
        """Whether every judged run passed; None where the reference was too coarse to judge by."""
        judged = [result.passed for result in self.results if result.judged]
        return all(judged) if judged else None

    def figures(self) -> dict[str, Any]:
        figures = {"reference": self.reference, **{result.dtype: _figures(result) for result in self.results}}
        return {**figures, "variants": variant_rows(self.variants)} if self.variants else figures


def chosen_reference(
    arguments: argparse.Namespace, checkpoint: Checkpoint, conversion: Conversion
) -> FileReference | None:
    """What ``--reference`` and ``--graph`` say; None for ``ops``. Raises EfficientDetError."""
    if arguments.reference == OPS:
        if arguments.graph:
            raise EfficientDetError("--graph is for --reference meta, savedmodel or tflite; say which it is")
        return None
    require_tensorflow()
    return open_reference(
        arguments.reference, checkpoint, arguments.graph, conversion.config, conversion.variables
    )


def chosen_size(config: EfficientDetConfig, text: str, reference: FileReference | None) -> tuple[int, int]:
    """``--size``, or without it the size that the reference was built for. Raises EfficientDetError."""
    if not text and reference is not None and reference.size:
        return reference.size
    return picture_size(config, text)


def picture_size(config: EfficientDetConfig, text: str) -> tuple[int, int]:
    """``--size`` as (height, width). Raises EfficientDetError on anything else than N, HxW, native or nothing."""
    if text == "native":
        return config.image_size
    if not text:
        return min(config.image_size[0], DEFAULT_SIZE), min(config.image_size[1], DEFAULT_SIZE)
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise EfficientDetError(f"--size {text} is not a size; say 512, 384x640 (height x width) or native")
    return int(sides[0]), int(sides[-1])


def synthetic_input(config: EfficientDetConfig, size: tuple[int, int]) -> np.ndarray:
    """A seeded picture as the network wants it: float32 [1, H, W, 3], normalised."""
    picture = synthetic_image(*size)[None]
    return (picture - np.array(config.mean_rgb, np.float32)) / np.array(config.stddev_rgb, np.float32)


def verify(
    console: Console,
    conversion: Conversion,
    images: np.ndarray,
    *,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    raw_variables: Mapping[str, np.ndarray] | None = None,
    device: str = "cpu",
    observe: Observer | None = None,
    reference: FileReference | None = None,
) -> Outcome:
    """Compare with the TensorFlow reference in float64, then, line by line on screen, in float32.

    ``images`` float32 [N, H, W, 3]. The float32 run is of ``state_dict``, the conversion's own unless given.
    ``raw_variables`` help a diagnosis. ``reference``: a file to compare with instead, in float32 alone.
    Raises :class:`EfficientDetError` where TensorFlow is not installed or the file cannot be run.
    """
    require_tensorflow()
    config, (height, width) = conversion.config, images.shape[1:3]
    name = f"{reference.source}" if reference else "the TensorFlow reference"
    console.print(
        f"\n[bold]verifying[/] against {escape(name)}, same {height}×{width} picture", soft_wrap=True
    )
    weights = conversion.state_dict if state_dict is None else state_dict
    model = _build(config, weights, device)
    results: tuple[ParityResult, ...]
    if reference is None:
        exact = _run_float64(console, conversion, images, device)
        rows = _Rows(console, {tap.pair.tap: tap for tap in exact.taps})
        ops = tensorflow_reference(conversion.variables, config, images, "float32")
        results = (exact, compare(model, ops, images, rows.add, observe))
    else:
        run = reference.on(images)
        rows = _Rows(console, None)
        result = compare(model, run, images, rows.add, observe, reference.taps)
        results = (dataclasses.replace(result, judged=reference.exact),)
    diagnosis = None
    for result in results:
        if result.judged and result.first_divergence and diagnosis is None:
            with console.status("looking for the cause …"):
                diagnosis = _diagnose(conversion, weights, raw_variables, result)
    _print_verdict(console, *results)
    if diagnosis:
        print_diagnosis(console, diagnosis)
    elif reference and results[0].judged and not results[0].passed:
        console.print(
            f"  the weights agree with --reference ops on a small picture: look for the cause in "
            f"{escape(name)}",
            soft_wrap=True,
        )
    return Outcome(results, diagnosis, name)


def require_tensorflow() -> None:
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        raise EfficientDetError(
            "the reference needs TensorFlow, which is not installed: pip install -e '.[tensorflow]'"
        ) from None


def _build(config: EfficientDetConfig, state_dict: Mapping[str, torch.Tensor], device: str) -> EfficientDet:
    with torch.device("meta"):
        model = EfficientDet(config)
    model.load_state_dict(dict(state_dict), assign=True)
    return model.eval().to(device)


def _run_float64(console: Console, conversion: Conversion, images: np.ndarray, device: str) -> ParityResult:
    config = conversion.config
    model = _build(config, apply_rules(rules(config), conversion.variables, "float64"), device)
    reference = tensorflow_reference(conversion.variables, config, images, "float64")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[tap]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("float64", total=sum(1 for _ in taps(config)), tap="")
        return compare(
            model,
            reference,
            images.astype(np.float64),
            lambda result: progress.update(task, advance=1, tap=result.pair.module),
        )


def _diagnosis_size(config: EfficientDetConfig) -> tuple[int, int]:
    return min(config.image_size[0], DIAGNOSIS_SIZE), min(config.image_size[1], DIAGNOSIS_SIZE)


def _diagnose(
    conversion: Conversion,
    weights: Mapping[str, torch.Tensor],
    raw_variables: Mapping[str, np.ndarray] | None,
    failed: ParityResult,
) -> Diagnosis | None:
    """Look at the first divergence again on a small picture, where that shows it too."""
    config, dtype = conversion.config, failed.dtype
    if dtype == "float64":
        weights = apply_rules(rules(config), conversion.variables, "float64")
    model = _build(config, weights, "cpu")
    images = synthetic_input(config, _diagnosis_size(config)).astype(dtype)
    reference = tensorflow_reference(conversion.variables, config, images, dtype)
    first = compare(model, reference, images).first_divergence
    return diagnose(model, conversion.variables, raw_variables, reference, images, first) if first else None


class _Rows:
    """Prints a line per tap: both errors, in both float types, and a mark."""

    def __init__(self, console: Console, exact: dict[str, TapResult] | None) -> None:
        """``exact``: the float64 run by tap, None where there was none."""
        self.console = console
        self.exact = exact
        self.wide = console.width >= 140
        scope = f"{'TensorFlow scope':<44}" if self.wide else ""
        types = ("float64", "float32") if exact else ("float32",)
        figures = f"  {'accum.':>8}{'isol.':>8}" * len(types)
        heads = "".join(f"  {dtype:>16}" for dtype in types)
        console.print(
            f"[bold]{'PyTorch module':<34}{scope}{'shape':>18}{heads}[/]\n"
            f"[dim]{'':<{len(scope) + 52}}{figures}[/]",
            soft_wrap=True,
        )

    def add(self, result: TapResult) -> None:
        both = [self.exact[result.pair.tap], result] if self.exact else [result]
        name = result.pair.module if result.pair.output is None else result.pair.tap
        scope = f"{result.pair.tap:<44}" if self.wide else ""
        shape = "×".join(str(n) for n in result.shape)
        figures = "".join(f"  {_figure(one)}" for one in both)
        mark = "[green]✓[/]" if all(one.passed for one in both) else "[red bold]✗[/]"
        self.console.print(f"{name:<34}{scope}{shape:>18}{figures} {mark}", soft_wrap=True)


def _figure(result: TapResult) -> str:
    return f"{result.accumulated.relative:>8.0e}{result.isolated.relative:>8.0e}"


def _print_verdict(console: Console, *results: ParityResult) -> None:
    console.print()
    for result in results:
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
            continue
        if result.divergence:
            console.print(f"  {result.divergence}", soft_wrap=True)


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    console.print(f"  [bold]likely cause:[/] {diagnosis.kind}: {diagnosis.detail}", soft_wrap=True)
    for tensor in diagnosis.weights[:6]:
        ours, expected = (" ".join(f"{x:+.3g}" for x in side) for side in (tensor.ours, tensor.expected))
        console.print(
            f"    {tensor.tensor}: off by {tensor.relative:.1e}; min max mean std {ours}; "
            f"expected {expected}",
            soft_wrap=True,
        )


def _figures(result: ParityResult) -> dict[str, Any]:
    first = result.first_divergence
    return {
        "passed": result.passed if result.judged else None,
        "activations": len(result.taps),
        "absent": len(result.absent),
        "worst_accumulated": result.worst("accumulated").accumulated.relative,
        "worst_isolated": result.worst("isolated").isolated.relative,
        "first_divergence": first.pair.tap if first else None,
    }


def print_variants(
    console: Console,
    config: EfficientDetConfig,
    state_dict: Mapping[str, torch.Tensor],
    images: np.ndarray,
    device: str,
    which: str,
) -> tuple[Cost, ...]:
    """Measure the rows of ``--variants`` and print each as it is done."""
    console.print("\n[bold]other ways of running[/]: relative L2 to the same network in float64; not judged")
    console.print(f"[dim]{'':<20}{'classes':>10}{'boxes':>10}{'largest change of a score':>28}[/]")
    costs: list[Cost] = []
    rows = measure_variants(config, state_dict, images, device, NAMES if which == "all" else QUICK)
    while True:
        with console.status("running …"):
            cost = next(rows, None)
        if cost is None:
            return tuple(costs)
        costs.append(cost)
        if cost.classes is None or cost.boxes is None:
            console.print(f"{cost.name:<20}  not run: {escape(cost.skipped or '')}", soft_wrap=True)
        else:
            figures = f"{cost.classes.relative:>10.1e}{cost.boxes.relative:>10.1e}{cost.score:>28.1e}"
            console.print(f"{cost.name:<20}{figures}")
