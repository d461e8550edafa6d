"""Run the proof and draw it: one line per layer as it is compared, a verdict at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from porting.convert import Conversion, apply_rules
from porting.errors import PortingError
from porting.parity import ParityResult, TapResult, compare, tensorflow_reference, tolerances
from porting.parity.diagnose import Diagnosis, diagnose
from porting.parity.lockstep import Observer
from porting.rules import rules, taps
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet
from tf_reference.synthetic import synthetic_image

DEFAULT_SIZE = 512  # the largest picture a verification takes of itself; a model's own where that is smaller
DIAGNOSIS_SIZE = 256  # a diagnosis keeps every activation and runs often: its picture is small


@dataclass(frozen=True)
class Outcome:
    """``exact``: the rules and both networks, in float64. ``rounded``: the weights as written, in float32."""

    exact: ParityResult
    rounded: ParityResult
    diagnosis: Diagnosis | None

    @property
    def passed(self) -> bool:
        return self.exact.passed and self.rounded.passed

    def figures(self) -> dict[str, Any]:
        return {result.dtype: _figures(result) for result in (self.exact, self.rounded)}


def picture_size(config: EfficientDetConfig, text: str) -> tuple[int, int]:
    """``--size`` as (height, width). Raises PortingError on anything else than N, HxW, native or nothing."""
    if text == "native":
        return config.image_size
    if not text:
        return min(config.image_size[0], DEFAULT_SIZE), min(config.image_size[1], DEFAULT_SIZE)
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise PortingError(f"--size {text} is not a size; say 512, 384x640 (height x width) or native")
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
) -> Outcome:
    """Compare with the TensorFlow reference in float64, then, line by line on screen, in float32.

    ``images`` float32 [N, H, W, 3]. The float32 run is of ``state_dict``, the conversion's own unless given.
    ``raw_variables`` help a diagnosis. Raises :class:`PortingError` where TensorFlow is not installed.
    """
    require_tensorflow()
    height, width = images.shape[1:3]
    console.print(f"\n[bold]verifying[/] against the TensorFlow reference, same {height}×{width} picture")
    exact = _run_float64(console, conversion, images, device)
    rows = _Rows(console, {tap.pair.tap: tap for tap in exact.taps})
    weights = conversion.state_dict if state_dict is None else state_dict
    reference = tensorflow_reference(conversion.variables, conversion.config, images, "float32")
    rounded = compare(_build(conversion.config, weights, device), reference, images, rows.add, observe)
    diagnosis = None
    for result in (exact, rounded):
        if result.first_divergence and diagnosis is None:
            with console.status("looking for the cause …"):
                diagnosis = _diagnose(conversion, weights, raw_variables, result)
    _print_verdict(console, exact, rounded)
    if diagnosis:
        print_diagnosis(console, diagnosis)
    return Outcome(exact, rounded, diagnosis)


def require_tensorflow() -> None:
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        raise PortingError(
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

    def __init__(self, console: Console, exact: dict[str, TapResult]) -> None:
        self.console = console
        self.exact = exact
        self.wide = console.width >= 140
        scope = f"{'TensorFlow scope':<44}" if self.wide else ""
        figures = f"  {'accum.':>8}{'isol.':>8}" * 2
        console.print(
            f"[bold]{'PyTorch module':<34}{scope}{'shape':>18}  {'float64':>16}  {'float32':>16}[/]\n"
            f"[dim]{'':<{len(scope) + 52}}{figures}[/]",
            soft_wrap=True,
        )

    def add(self, result: TapResult) -> None:
        exact = self.exact[result.pair.tap]
        name = result.pair.module if result.pair.output is None else result.pair.tap
        scope = f"{result.pair.tap:<44}" if self.wide else ""
        shape = "×".join(str(n) for n in result.shape)
        figures = f"  {_figure(exact)}  {_figure(result)}"
        mark = "[green]✓[/]" if exact.passed and result.passed else "[red bold]✗[/]"
        self.console.print(f"{name:<34}{scope}{shape:>18}{figures} {mark}", soft_wrap=True)


def _figure(result: TapResult) -> str:
    return f"{result.accumulated.relative:>8.0e}{result.isolated.relative:>8.0e}"


def _print_verdict(console: Console, *results: ParityResult) -> None:
    console.print()
    for result in results:
        accumulated, isolated = result.worst("accumulated"), result.worst("isolated")
        limits = tolerances(result.dtype)
        verdict = "[green bold]passed[/]" if result.passed else "[red bold]FAILED[/]"
        console.print(
            f"{verdict} {result.dtype}: {len(result.taps)} activations; relative L2 accumulated ≤ "
            f"{accumulated.accumulated.relative:.1e} (allowed {limits[0]:.0e}), isolated ≤ "
            f"{isolated.isolated.relative:.1e} (allowed {limits[1]:.0e})"
        )
        first = result.first_divergence
        if first:
            console.print(
                f"  first divergence: {first.pair.module} in PyTorch, {first.pair.tap} in TensorFlow: "
                f"isolated {first.isolated.relative:.1e}, accumulated {first.accumulated.relative:.1e}",
                soft_wrap=True,
            )


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
        "passed": result.passed,
        "activations": len(result.taps),
        "worst_accumulated": result.worst("accumulated").accumulated.relative,
        "worst_isolated": result.worst("isolated").isolated.relative,
        "first_divergence": first.pair.tap if first else None,
    }
