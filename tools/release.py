#!/usr/bin/env python3
"""Port a checkpoint, prove it, and put weights and evidence into one folder that can be checked."""

from __future__ import annotations

import _one_thread  # noqa: F401  before NumPy

# isort: split
import _cli  # first: finds the packages

# isort: split
import argparse
import json
import re
import reprlib
import sys
from pathlib import Path
from typing import Any

import _source
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.checkpoint import Checkpoint
from porting.convert import Conversion, convert
from porting.errors import CheckFailedError, EfficientDetError, Reason
from porting.publish.model_card import FIGURES
from porting.publish.release_folder import (
    REQUIRED_FIGURES,
    Check,
    check_name,
    check_passed,
    holds_raw,
    origin,
    verify_release,
    write_release,
)
from porting.sources import SYNTHETIC
from porting.sources.google_releases import release_named
from pytorch_model.files import check_new_folder, make_folder, new_folder, parse_json, read_bounded

GOOGLES_LICENSE = "apache-2.0"  # of every checkpoint that AutoML released

#: Of a metrics.json, which notes each picture that was passed over.
MOST_METRICS = 1 << 27

EXAMPLES = f"""
examples:
  # release/efficientdet_d4/: weights in two formats, parity report, model card, checksums
  python tools/release.py --ckpt path/to/efficientdet-d4 --out release/
  # once more with what tools/eval_coco.py measured with release/efficientdet_d4/model.safetensors
  python tools/release.py --ckpt path/to/efficientdet-d4 --out final/ --coco-metrics eval/metrics.json
  # is every byte of a folder what it should be? and is it this checkpoint's?
  python tools/release.py --verify-release release/efficientdet_d4
  python tools/release.py --verify-release release/efficientdet_d4 --ckpt path/to/efficientdet-d4

{_cli.EXIT_CODES}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=_cli.HelpFormatter)
    _source.add_checkpoint_options(parser, required=False)
    _source.add_model_options(parser)
    parser.add_argument("--raw", action="store_true", help="release the raw values, not the moving averages")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the folder NAME goes")
    parser.add_argument("--name", help="name of the folder and the .pth (default: the model's or release's)")
    parser.add_argument(
        "--license", help=f"licence of the weights (default: {GOOGLES_LICENSE} for Google's releases)"
    )
    parser.add_argument("--size", default="", help=_cli.SIZE_HELP)
    parser.add_argument(
        "--coco-metrics", type=Path, metavar="FILE", help="metrics.json of tools/eval_coco.py"
    )
    parser.add_argument("--verify-release", type=Path, metavar="DIR", help="check a folder, write nothing")
    parser.add_argument("--json", action="store_true", help="print a machine-readable summary on stdout")
    arguments = parser.parse_args()
    if arguments.verify_release:
        if any((arguments.out, arguments.name, arguments.license, arguments.coco_metrics, arguments.raw)):
            parser.error("--verify-release takes --ckpt and what says which model it is, nothing else")
    elif not (arguments.ckpt and arguments.out):
        parser.error("give --ckpt and --out, or --verify-release")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    console = Console(stderr=arguments.json, highlight=False)
    _source.check_options(arguments)
    return check(arguments, console) if arguments.verify_release else release(arguments, console)


def check(arguments: argparse.Namespace, console: Console) -> int:
    conversion = None
    if arguments.ckpt:
        with _source.open_checkpoint(arguments, console, Path()) as checkpoint:
            config = _source.find_config(arguments, checkpoint).config
            conversion = convert(checkpoint, config, raw=holds_raw(arguments.verify_release))
    return finish(
        arguments, console, arguments.verify_release, draw(console, arguments.verify_release, conversion)
    )


def release(arguments: argparse.Namespace, console: Console) -> int:
    from _verify import picture_size, require_tensorflow, synthetic_input, verify

    from porting.parity.report.content import Report
    from porting.parity.report.thumbnails import Thumbnails

    require_tensorflow()
    metrics = read_metrics(arguments.coco_metrics)
    named = None if arguments.ckpt.startswith(SYNTHETIC) else release_named(arguments.ckpt)
    if arguments.name:
        check_name(arguments.name)
    make_folder(arguments.out)
    with _source.open_checkpoint(arguments, console, arguments.out) as checkpoint:
        inference = _source.find_config(arguments, checkpoint)
        name = arguments.name or check_name(
            (named.name if named else inference.config.name).replace("-", "_")
        )
        target = arguments.out / name
        check_new_folder(target)
        conversion = convert(checkpoint, inference.config, raw=arguments.raw)
        source = named.url if named else source_name(arguments.ckpt, checkpoint)
        license_id = arguments.license or (GOOGLES_LICENSE if named else "unknown")
        about = origin(conversion, checkpoint, inference.assumed, source, license_id, named)
    images = synthetic_input(conversion.config, picture_size(conversion.config, arguments.size))
    thumbnails = Thumbnails()
    outcome = verify(console, conversion, images, observe=thumbnails)
    import tensorflow

    report = Report(
        results=outcome.results,
        config=conversion.config,
        metadata={
            "source": source,
            "values": conversion.values_kind,
            "variables_sha256": conversion.digest,
            "picture": f"{images.shape[1]}×{images.shape[2]}, seeded",
            "torch": torch.__version__,
            "tensorflow": tensorflow.__version__,
        },
        thumbnails=thumbnails,
    )
    check_passed(report)
    with new_folder(target) as folder:
        write_release(folder, name, conversion, about, report, metrics)
        checks = draw(console, folder, conversion)
        if any(found.problem for found in checks):
            raise CheckFailedError(f"{target} was not written: it failed its own check")
    console.print(f"[bold]wrote[/] {escape(str(target))}", soft_wrap=True)
    return finish(arguments, console, target, checks)


def draw(console: Console, folder: Path, conversion: Conversion | None) -> list[Check]:
    """Run the checks, a line each as they are done."""
    checks = []
    console.print()
    for found in verify_release(folder, conversion):
        mark = "[red bold]✗[/]" if found.problem else "[green]✓[/]"
        console.print(f"{mark} {escape(found.what)}", soft_wrap=True)
        if found.problem:
            console.print(f"  [red]{escape(found.problem)}[/]", soft_wrap=True)
        checks.append(found)
    return checks


def finish(arguments: argparse.Namespace, console: Console, folder: Path, checks: list[Check]) -> int:
    """The summary; the exit status."""
    passed = not any(found.problem for found in checks)
    if passed:
        table = Table("file", box=None, padding=(0, 2, 0, 0))
        table.add_column("bytes", justify="right")
        for path in sorted(folder.iterdir()):
            table.add_row(escape(path.name), f"{path.stat().st_size:,}")
        console.print(table)
    else:
        console.print("[red bold]FAILED[/]")
    if arguments.json:
        problems = {found.what: found.problem for found in checks}
        json.dump({"folder": str(folder), "passed": passed, "checks": problems}, sys.stdout, indent=2)
        print()
    return 0 if passed else _cli.EXIT_FAILED


def source_name(spec: str, checkpoint: Checkpoint) -> str:
    """What a checkpoint is called, without most of the way to it, which is a matter of this machine."""
    return spec if spec.startswith(SYNTHETIC) else "/".join(Path(checkpoint.source).resolve().parts[-2:])


def read_metrics(path: Path | None) -> bytes | None:
    """The file's content. Raises :class:`EfficientDetError` unless it is of the form of metrics.json."""
    if path is None:
        return None
    try:
        data = read_bounded(path, MOST_METRICS)
        check_metrics(parse_json(data.decode("utf-8")))  # as it is read for the card
    except (OSError, ValueError) as error:  # a ValueError: no UTF-8, or no name that a file can have
        reason = getattr(error, "strerror", None) or error
        raise EfficientDetError(
            f"cannot read {path}: {reason}; give metrics.json of tools/eval_coco.py"
        ) from None
    except Reason as reason:
        raise EfficientDetError(
            f"{path} is no metrics.json: {reason}; give the one that tools/eval_coco.py wrote"
        ) from None
    return data


def check_metrics(content: Any) -> None:
    """Raises :class:`Reason` where ``content`` lacks what a card shows, or says what cannot be."""
    try:
        figures, pictures = content["ours"], content["pictures"]
        digest = content["settings"]["ours"]["weights"]
        shown = {name: figures[name] for name in FIGURES if name in figures or name in REQUIRED_FIGURES}
    except KeyError as error:
        raise Reason(f"it lacks {error}") from None
    except TypeError:
        raise Reason("its figures, pictures or settings are no objects") from None
    for name, value in shown.items():
        if type(value) is not float or not (0 <= value <= 1 or value == -1):
            raise Reason(f"its {name} is {reprlib.repr(value)}, neither between 0.0 and 1.0 nor -1.0")
    if type(pictures) is not int or not 0 <= pictures < 1 << 53:
        raise Reason(f"its number of pictures is {reprlib.repr(pictures)}")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise Reason(f"the SHA-256 of its weights is {reprlib.repr(digest)}")


if __name__ == "__main__":
    _cli.run(main)
