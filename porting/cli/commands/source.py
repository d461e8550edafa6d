"""Open what ``--ckpt`` names, with a progress bar for downloads; describe configurations in one line."""

from __future__ import annotations

import dataclasses
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
from porting.cli.arguments.shared import ModelOptions, SourceOptions
from porting.hparams import given_names
from porting.infer import Inference, infer_config, named_config
from porting.sources import SYNTHETIC
from porting.sources.open import open_source
from pytorch_model.config import BackboneConfig, EfficientDetConfig
from pytorch_model.detection.labels import find_names, read_names

_MOST_NAMES = 12


def open_checkpoint(options: SourceOptions, console: Console, folder: Path) -> Checkpoint:
    """Open what ``--ckpt`` names; a synthetic checkpoint is written into ``folder``.

    Raises :class:`EfficientDetError`.
    """
    if options.ckpt.startswith(SYNTHETIC):
        console.print(f"writing a seeded checkpoint to {folder / 'synthetic'} …", markup=False)
    with DownloadBar(console, options.ckpt) as bar:
        return open_source(options.ckpt, folder, options.step, options.cache_dir, bar)


def find_config(options: ModelOptions, checkpoint: Checkpoint) -> Inference:
    """The configuration of ``checkpoint``, with ``--model``, ``--hparams`` and ``--labels``.

    Raises :class:`EfficientDetError`.
    """
    hparams = options.hparams
    model = options.model or hparams.model
    if model:
        found = named_config(
            model, checkpoint.shapes, hparams.overrides, checkpoint.source, checkpoint.settings
        )
    else:
        found = infer_config(checkpoint.shapes, checkpoint.source, hparams.overrides, checkpoint.settings)
    count = found.config.num_classes
    names = read_names(options.labels, count) if options.labels else given_names(hparams, count)
    if names is None:
        return found
    return dataclasses.replace(found, config=found.config.replace(class_names=names))


def describe(config: EfficientDetConfig) -> str:
    return (
        f"{config.name}: {config.num_classes} classes, P{config.min_level}–P{config.max_level}, "
        f"{config.backbone.name}, BiFPN {config.fpn_cell_repeats}×{config.fpn_num_filters} "
        f"({config.fpn_weight_method}), heads ×{config.box_class_repeats}"
    )


def describe_settings(checkpoint: Checkpoint, overrides: Collection[str] = ()) -> str:
    """Settings that the file has in addition to its weights, without those that the user overrides."""
    return "; ".join(
        f"{name} {setting_text(value)}"
        for name, value in checkpoint.settings.items()
        if name not in overrides and name != "class_names"
    )


def describe_names(config: EfficientDetConfig) -> str:
    """The names of the classes, or what takes their place; the first ones if there are many."""
    if config.class_names is None:
        return find_names(None, config.num_classes).source
    names = [name for name in config.class_names if name]
    shown = ", ".join(names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown}, … ({len(names)} names)"


def setting_text(value: Any) -> str:
    """A setting's value in a few characters: ``640×480``, ``1/2/0.5``, a backbone's name."""
    if isinstance(value, tuple):
        return ("×" if len(value) == 2 else "/").join(setting_text(item) for item in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.5g}"
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
