"""``convert``: port a checkpoint, prove it if asked to, write the weights, print the account of variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.audit import audit_parameters
from porting.checkpoint import Checkpoint
from porting.cli.arguments.convert import ConvertOptions
from porting.cli.commands.source import (
    describe,
    describe_names,
    describe_settings,
    find_config,
    open_checkpoint,
    setting_text,
)
from porting.cli.process import EXIT_FAILED, print_json
from porting.convert import Conversion, convert, metadata, write_conversion
from porting.errors import EfficientDetError
from porting.hparams import Hparams
from porting.infer import Inference
from pytorch_model.files import check_writable, make_folder
from pytorch_model.weights import SUFFIXES


def run(options: ConvertOptions) -> int:
    console = Console(stderr=options.json, highlight=False)
    folder, file = _split(options.out)
    if file is not None:
        _check_output(file)
    with open_checkpoint(options.source, console, folder) as checkpoint:
        inference = find_config(options.model, checkpoint)
        if file is None:
            make_folder(folder)
            file = folder / (inference.config.name.replace("-", "_") + ".safetensors")
            _check_output(file)
        conversion = convert(checkpoint, inference.config, raw=options.raw)
        _print_conversion(console, checkpoint, inference, options.model.hparams, conversion)
        summary = _summary(checkpoint, inference, options.model.hparams, conversion, file)
        if options.verify and not _is_proven(options, console, checkpoint, conversion, summary):
            if options.json:
                print_json({**summary, "weights_file": None})
            console.print("[red bold]not written:[/] the port does not match the reference")
            return EXIT_FAILED
    write_conversion(conversion, checkpoint, inference.assumed, file)
    console.print(f"[bold]wrote[/] {escape(str(file))} ({file.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    if options.json:
        print_json(summary)
    return 0


def _split(out: str | None) -> tuple[Path, Path | None]:
    """(folder, file) of ``--out``. The file is None if the folder gets one of the default name."""
    if out is None:
        return Path(), None
    path = Path(out)
    is_folder = out.endswith("/") or os.path.isdir(out)  # Path.is_dir raises on a name that is too long
    return (path, None) if is_folder else (path.parent, path)


def _check_output(file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise EfficientDetError(f"cannot write {file}: use a name that ends in {' or '.join(SUFFIXES)}")
    check_writable(file)


def _is_proven(
    options: ConvertOptions,
    console: Console,
    checkpoint: Checkpoint,
    conversion: Conversion,
    summary: dict[str, Any],
) -> bool:
    """Whether the port matches the reference; the figures go into ``summary``."""
    from porting.cli.drawing.proof import ProofLines, print_verdict
    from porting.parity import prove
    from porting.parity.inputs import seeded_images, verification_size
    from porting.parity.reference.choose import choose_reference

    config = conversion.config
    reference = choose_reference(options.reference.kind, options.reference.graph, checkpoint, conversion)
    images = seeded_images(config, verification_size(config, options.size, reference))
    with ProofLines(console) as lines:
        proof = prove(conversion, images, reference, lines)
    print_verdict(console, proof)
    summary["parity"] = {"size": list(proof.image_size), **proof.figures()}
    return proof.passed is True  # a reference too coarse to judge by proves nothing


def _print_conversion(
    console: Console,
    checkpoint: Checkpoint,
    inference: Inference,
    hparams: Hparams,
    conversion: Conversion,
) -> None:
    config = conversion.config
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    step = f", step {checkpoint.step:,}" if checkpoint.step is not None else ""
    table.add_row("read", f"{escape(checkpoint.source)} ({checkpoint.format}{step})")
    table.add_row("model", escape(describe(config)))
    table.add_row("class names", escape(describe_names(config)))
    if hparams.overrides:
        given = (f"{name} {setting_text(getattr(config, name))}" for name in hparams.overrides)
        table.add_row("given", "; ".join(given))
    settings = describe_settings(checkpoint, hparams.overrides)
    if settings:
        table.add_row("from the file", settings)
    if inference.assumed:
        table.add_row("assumed", "; ".join(inference.assumed))
    without_effect = [*hparams.ignored, *(f"nms_configs.{name}" for name in hparams.nms)]
    if without_effect:
        table.add_row("ignored", f"{escape(', '.join(without_effect))}: no weight depends on these hparams")
    for note in checkpoint.notes:
        table.add_row("note", escape(note))
    is_averaged = conversion.values_kind == "EMA"
    table.add_row("weights", "moving averages (EMA)" if is_averaged else "raw values")
    _add_account(table, conversion)
    console.print(table)


def _add_account(table: Table, conversion: Conversion) -> None:
    coverage, audit = conversion.coverage, audit_parameters(conversion.config)
    table.add_row(
        "coverage",
        f"{coverage.used + coverage.unused_count} TensorFlow variables = {coverage.used} used + "
        f"{coverage.unused_count} deliberately unused; {coverage.written} PyTorch tensors, each written "
        f"once; {coverage.folded} biases folded into batch-norm means",
    )
    for why, names in coverage.unused.items():
        table.add_row("", f"unused: {len(names)} × {why}")
    published = ""
    if audit.published:
        verdict = "agrees" if audit.agrees else "does NOT agree"
        published = f"; paper {audit.published}M, {verdict}"
    table.add_row(
        "parameters",
        f"{audit.ours:,} bias-free + {audit.removed_biases:,} biases removed = "
        f"{audit.automl:,} in AutoML{published}",
    )


def _summary(
    checkpoint: Checkpoint, inference: Inference, hparams: Hparams, conversion: Conversion, file: Path
) -> dict[str, Any]:
    audit, coverage = audit_parameters(conversion.config), conversion.coverage
    return {
        **metadata(conversion, checkpoint, inference.assumed),
        "source": checkpoint.source,
        "notes": list(checkpoint.notes),
        "given": list(hparams.overrides),
        "config": conversion.config.to_dict(),
        "coverage": {
            "used": coverage.used,
            "unused": {why: len(names) for why, names in coverage.unused.items()},
            "written": coverage.written,
            "folded_biases": coverage.folded,
        },
        "parameters": {"ours": audit.ours, "automl": audit.automl, "published_millions": audit.published},
        "weights_file": str(file),
    }
