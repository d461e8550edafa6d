"""``release``: make a release folder, or check one, and print each check."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.cli.arguments.release import ReleaseOptions
from porting.cli.arguments.shared import SourceOptions
from porting.cli.commands.source import find_config, open_checkpoint, print_run_config
from porting.cli.drawing.proof import ProofLines, print_verdict
from porting.cli.process import EXIT_FAILED, print_json
from porting.convert import Conversion, convert, how_converted
from porting.infer import Inference, setting_lines
from porting.parity import ParityResult, prove
from porting.parity.inputs import seeded_images, verification_size
from porting.parity.lockstep import Observer
from porting.parity.reference.choose import require_tensorflow
from porting.publish.release import ReleaseRequest, make_release
from porting.publish.release_checks import Check, released_values, verify_release
from porting.sources import SYNTHETIC
from porting.sources.google_releases import google_release_named
from pytorch_model.evaluation.metrics import read_metrics
from pytorch_model.files import make_folder


def run(options: ReleaseOptions) -> int:
    console = Console(stderr=options.json, highlight=False)
    if options.verify_release is not None:
        folder = options.verify_release
        checks = _check(options, console, folder)
    else:
        assert options.source is not None  # read_options saw to it
        assert options.out is not None
        folder, checks = _make(options, console, options.source, options.out)
    return _conclude(options, console, folder, checks)


def _check(options: ReleaseOptions, console: Console, folder: Path) -> Sequence[Check]:
    conversion = None
    if options.source:
        with open_checkpoint(options.source, console, Path()) as checkpoint:
            config = find_config(options.model, checkpoint).config
            conversion = convert(checkpoint, config, **how_converted(released_values(folder)))
    console.print()
    checks = []
    for check in verify_release(folder, conversion):
        _print_check(console, check)
        checks.append(check)
    return checks


def _make(
    options: ReleaseOptions, console: Console, source: SourceOptions, out: Path
) -> tuple[Path, Sequence[Check]]:
    def prove_and_print(
        inference: Inference, conversion: Conversion, images: np.ndarray, observe: Observer
    ) -> Sequence[ParityResult]:
        unseen = setting_lines(conversion.config, inference.unseen)
        with ProofLines(console) as lines:
            proof = prove(conversion, images, None, lines, observe=observe, assumed=unseen)
        print_verdict(console, proof)
        console.print()
        return proof.results

    require_tensorflow()
    request = ReleaseRequest(
        out=out,
        spec=source.ckpt,
        published=None if source.ckpt.startswith(SYNTHETIC) else google_release_named(source.ckpt),
        name=options.name,
        license=options.license,
        raw=options.values.raw,
        ema_or_raw=options.values.ema_or_raw,
        metrics=read_metrics(options.coco_metrics) if options.coco_metrics else None,
    )
    make_folder(out)
    with open_checkpoint(source, console, out) as checkpoint:
        print_run_config(console, checkpoint)
        inference = find_config(options.model, checkpoint)
        made = make_release(
            request,
            checkpoint,
            inference,
            lambda config: seeded_images(config, verification_size(config, options.size)),
            partial(prove_and_print, inference),
            lambda check: _print_check(console, check),
        )
    console.print(f"[bold]wrote[/] {escape(str(made.folder))}", soft_wrap=True)
    return made.folder, made.checks


def _print_check(console: Console, check: Check) -> None:
    mark = "[red bold]✗[/]" if check.problem else "[green]✓[/]"
    console.print(f"{mark} {escape(check.what)}", soft_wrap=True)
    if check.problem:
        console.print(f"  [red]{escape(check.problem)}[/]", soft_wrap=True)


def _conclude(options: ReleaseOptions, console: Console, folder: Path, checks: Sequence[Check]) -> int:
    """Print the summary; the exit status."""
    passed = not any(check.problem for check in checks)
    if passed:
        table = Table("file", box=None, padding=(0, 2, 0, 0))
        table.add_column("bytes", justify="right")
        for path in sorted(folder.iterdir()):
            table.add_row(escape(path.name), f"{path.stat().st_size:,}")
        console.print(table)
    else:
        console.print("[red bold]FAILED[/]")
    if options.json:
        problems = {check.what: check.problem for check in checks}
        print_json({"folder": str(folder), "passed": passed, "checks": problems})
    return 0 if passed else EXIT_FAILED
