"""Open what ``--ckpt`` names, with a progress bar for downloads; describe configurations in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from porting.checkpoint import Checkpoint
from porting.cli.arguments.shared import ModelOptions, SourceOptions
from porting.hparams import RUN_CONFIG, given_names
from porting.infer import Inference, configure
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
    by = "--model" if options.model else "the name in --hparams"
    found = configure(checkpoint, hparams.overrides, options.model or hparams.model, by)
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


def add_settings(table: Table, checkpoint: Checkpoint, overrides: Collection[str] = ()) -> None:
    """A row for each witness of settings that are not in the weights: the file itself, another file, a name.

    Without those settings that the user overrides.
    """
    stated: dict[str | None, list[str]] = {}
    for name, value in checkpoint.settings.items():
        if name not in overrides and name != "class_names":
            stated.setdefault(checkpoint.stated_by.get(name), []).append(f"{name} {setting_text(value)}")
    for witness, settings in stated.items():
        who = f"{witness}: " if witness else ""
        table.add_row("stated by" if witness else "from the file", escape(f"{who}{'; '.join(settings)}"))


def describe_names(config: EfficientDetConfig) -> str:
    """The names of the classes, or what takes their place; the first ones if there are many."""
    if config.class_names is None:
        return find_names(None, config.num_classes).source
    names = [name for name in config.class_names if name]
    shown = ", ".join(names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown}, … ({len(names)} names)"


def print_run_config(console: Console, checkpoint: Checkpoint) -> None:
    """A line if the ``config.yaml`` of the training run states settings of ``checkpoint``."""
    for witness in dict.fromkeys(checkpoint.stated_by.values()):
        if witness.endswith(RUN_CONFIG):
            fields = ", ".join(name for name, who in checkpoint.stated_by.items() if who == witness)
            console.print(f"read {witness}: {fields}", markup=False, soft_wrap=True)


def setting_text(value: Any) -> str:
    """A setting's value in a few characters: ``640×480``, ``1/2/0.5``, ``1.4×0.7/…``, a backbone's name."""
    if isinstance(value, tuple) and all(isinstance(item, str) for item in value):
        return f"{len(value)} names"
    if isinstance(value, tuple):
        return "/".join(map(setting_text, value)) if _is_list(value) else "×".join(map(setting_text, value))
    if isinstance(value, BackboneConfig):
        return value.name
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.5g}"
    return "none" if value is None else str(value)


def _is_list(value: tuple[Any, ...]) -> bool:
    """Whether ``value`` lists things of one kind; if not, it is a height and a width."""
    return len(value) != 2 or any(isinstance(item, tuple) for item in value)


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
