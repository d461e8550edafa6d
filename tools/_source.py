"""The options that say which checkpoint and which model, and what they lead to; with a bar for downloads."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from porting.checkpoint import Checkpoint
from porting.errors import ConfigError
from porting.hparams import Hparams, read_hparams
from porting.infer import Inference, infer_config, named_config
from porting.parity.reference import KINDS, OPS
from porting.sources import SYNTHETIC
from porting.sources.open import open_source
from pytorch_model.config import MODELS, BackboneConfig, EfficientDetConfig

HPARAMS_HELP = "AutoML's hyper-parameters, as it takes them: NAME=VALUE,… or a .yaml file"


def add_checkpoint_options(parser: argparse._ActionsContainer, required: bool = True) -> None:
    """``--ckpt``, ``--step``, ``--cache-dir``."""
    parser.add_argument(
        "--ckpt",
        required=required,
        help="checkpoint folder, prefix, file or archive; a release of Google's, such as efficientdet-d0; "
        f"or {SYNTHETIC}MODEL",
    )
    parser.add_argument("--step", type=int, help="which of several steps in the folder (default: the newest)")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="where releases are kept (default: ~/.cache/efficientdet-porting)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``--model``, ``--hparams``."""
    parser.add_argument(
        "--model",
        type=lambda name: name.lower().replace("_", "-"),
        choices=MODELS,
        metavar="MODEL",
        help="variant (default: found out)",
    )
    parser.add_argument(
        "--hparams",
        type=read_hparams,  # refused before anything is downloaded
        default=read_hparams(""),
        metavar="TEXT",
        help=HPARAMS_HELP,
    )


def add_reference_options(parser: argparse._ActionsContainer, default: str | None = OPS) -> None:
    """``--reference``, ``--graph``."""
    parser.add_argument(
        "--reference",
        choices=KINDS,
        default=default,
        help=f"what to compare with (default: {default or 'nothing'}): AutoML's network rebuilt in plain "
        "operations (ops); the graph saved with the checkpoint (meta); an exported model (savedmodel); a "
        "Lite file (tflite)",
    )
    parser.add_argument(
        "--graph",
        type=Path,
        metavar="PATH",
        help="the file of that reference: .meta, SavedModel folder or .tflite (default: the "
        "checkpoint's own)",
    )


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, before anything is downloaded. Raises ConfigError."""
    named = arguments.hparams.model
    if arguments.model and named not in (None, arguments.model):
        raise ConfigError(f"--model says {arguments.model}, the name in --hparams {named}; leave one out")


def open_checkpoint(arguments: argparse.Namespace, console: Console, folder: Path) -> Checkpoint:
    """Open what ``--ckpt`` says; a synthetic checkpoint is written into ``folder``. Raises EfficientDetError."""
    if arguments.ckpt.startswith(SYNTHETIC):
        console.print(f"writing a seeded checkpoint to {folder / 'synthetic'} …", markup=False)
    with DownloadBar(console, arguments.ckpt) as bar:
        return open_source(arguments.ckpt, folder, arguments.step, arguments.cache_dir, bar)


def find_config(arguments: argparse.Namespace, checkpoint: Checkpoint) -> Inference:
    """The configuration of ``checkpoint``, with ``--model`` and ``--hparams``. Raises EfficientDetError."""
    hparams: Hparams = arguments.hparams
    model = arguments.model or hparams.model
    if model:
        return named_config(
            model, checkpoint.shapes, hparams.overrides, checkpoint.source, checkpoint.settings
        )
    return infer_config(checkpoint.shapes, checkpoint.source, hparams.overrides, checkpoint.settings)


def describe(config: EfficientDetConfig) -> str:
    return (
        f"{config.name}: {config.num_classes} classes, P{config.min_level}–P{config.max_level}, "
        f"{config.backbone.name}, BiFPN {config.fpn_cell_repeats}×{config.fpn_num_filters} "
        f"({config.fpn_weight_method}), heads ×{config.box_class_repeats}"
    )


def describe_settings(checkpoint: Checkpoint, overrides: Collection[str] = ()) -> str:
    """What the file says beside its weights, where the user does not say otherwise; often nothing."""
    return "; ".join(
        f"{name} {shown(value)}" for name, value in checkpoint.settings.items() if name not in overrides
    )


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ("×" if len(value) == 2 else "/").join(f"{number:.5g}" for number in value)
    return value.name if isinstance(value, BackboneConfig) else str(value)


class DownloadBar:
    """A :class:`porting.sources.download.Listener` that draws a bar from the first byte on."""

    def __init__(self, console: Console, description: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        rates = (TransferSpeedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, *rates, console=console)
        self._task = self._progress.add_task(f"fetching {description}", total=None)
        self._console = console

    def progress(self, done: int, total: int | None) -> None:
        self._progress.update(self._task, completed=done, total=total)
        self._progress.start()

    def note(self, text: str) -> None:
        self._console.print(text, style="yellow", markup=False, soft_wrap=True)

    def __enter__(self) -> DownloadBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress.live.is_started:
            self._progress.stop()
