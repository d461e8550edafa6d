"""Run the proof and draw it: one line per layer as it is compared, a verdict at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from porting.convert import Conversion, apply_rules
from porting.errors import PortingError
from porting.parity import ParityResult, TapResult, compare, tensorflow_reference, tolerances
from porting.rules import rules, taps
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet
from tf_reference.synthetic import synthetic_image

DEFAULT_SIZE = 512  # the largest picture --verify takes of itself; a model's own size where that is smaller


def verify(console: Console, conversion: Conversion, size: int | None) -> tuple[bool, dict[str, Any]]:
    """Compare the port with the TensorFlow reference in float64, then, layer by layer on screen, in float32.

    Returns (passed, figures). Raises :class:`PortingError` where TensorFlow is not installed.
    """
    require_tensorflow()
    config = conversion.config
    height, width = (size, size) if size else tuple(min(side, DEFAULT_SIZE) for side in config.image_size)
    picture = synthetic_image(height, width)[None]
    images = (picture - np.array(config.mean_rgb, np.float32)) / np.array(config.stddev_rgb, np.float32)
    console.print(f"\n[bold]verifying[/] against the TensorFlow reference, same {height}×{width} picture")
    exact = run_float64(console, conversion, images)
    by_tap = {tap.pair.tap: tap for tap in exact.taps}
    rows = Rows(console, by_tap)
    model = build(config, conversion.state_dict)
    reference = tensorflow_reference(conversion.variables, config, images, "float32")
    rounded = compare(model, reference, images, rows.add)
    print_verdict(console, exact, rounded)
    figures = {result.dtype: summarise(result) for result in (exact, rounded)}
    return exact.passed and rounded.passed, {"size": [height, width], **figures}


def require_tensorflow() -> None:
    try:
        import tensorflow  # noqa: F401
    except ImportError:
        raise PortingError(
            "the reference needs TensorFlow, which is not installed: pip install -e '.[tensorflow]'"
        ) from None


def build(config: EfficientDetConfig, state_dict: dict[str, torch.Tensor]) -> EfficientDet:
    with torch.device("meta"):
        model = EfficientDet(config)
    model.load_state_dict(state_dict, assign=True)
    return model.eval()


def run_float64(console: Console, conversion: Conversion, images: np.ndarray) -> ParityResult:
    config = conversion.config
    model = build(config, apply_rules(rules(config), conversion.variables, "float64"))
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


class Rows:
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
        figures = f"  {figure(exact)}  {figure(result)}"
        mark = "[green]✓[/]" if exact.passed and result.passed else "[red bold]✗[/]"
        self.console.print(f"{name:<34}{scope}{shape:>18}{figures} {mark}", soft_wrap=True)


def figure(result: TapResult) -> str:
    return f"{result.accumulated.relative:>8.0e}{result.isolated.relative:>8.0e}"


def print_verdict(console: Console, *results: ParityResult) -> None:
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


def summarise(result: ParityResult) -> dict[str, Any]:
    first = result.first_divergence
    return {
        "passed": result.passed,
        "activations": len(result.taps),
        "worst_accumulated": result.worst("accumulated").accumulated.relative,
        "worst_isolated": result.worst("isolated").isolated.relative,
        "first_divergence": first.pair.tap if first else None,
    }
