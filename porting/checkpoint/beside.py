"""What lies beside a checkpoint and says how it was trained: AutoML's ``config.yaml``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from porting.checkpoint.base import Checkpoint
from porting.hparams import RUN_CONFIG


def add_run_config(checkpoint: Checkpoint) -> None:
    """Add the settings of the ``config.yaml`` that belongs to ``checkpoint``, if there is one.

    What the checkpoint states itself, it knows better: only what it leaves open is added. Raises
    :class:`~porting.errors.CheckpointError` if the file describes a network that this project does not build.
    """
    path = next((folder / RUN_CONFIG for folder in _folders(checkpoint) if _holds_one(folder)), None)
    if path is None:
        return
    from porting.hparams.run_config import read_run_config  # PyYAML is loaded only if there is such a file

    run = read_run_config(path)
    own = {field for field, value in run.fields.items() if checkpoint.settings.get(field, value) != value}
    notes = list(run.notes)
    if own:
        notes.append(f"{', '.join(sorted(own))}: {path} says something else; the checkpoint itself counts")
    stated = dict(run.fields) | ({"model": run.model} if run.model else {})
    checkpoint.add_settings(stated, str(path), notes)


def _folders(checkpoint: Checkpoint) -> Iterator[Path]:
    """The checkpoint's own folder; also the one above, for AutoML's copies of its best checkpoints."""
    location = Path(checkpoint.location)
    folder = location if location.is_dir() else location.parent
    if os.path.abspath(folder).endswith(f"{os.sep}variables"):  # of a SavedModel
        folder = folder.parent
    yield folder
    if os.path.abspath(folder).endswith(f"{os.sep}archive"):  # AutoML utils.py archive_ckpt
        yield Path(os.path.abspath(folder)).parent


def _holds_one(folder: Path) -> bool:
    return os.path.isfile(folder / RUN_CONFIG)
