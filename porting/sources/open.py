"""Open any source that ``--ckpt`` accepts."""

from __future__ import annotations

from pathlib import Path

from porting.checkpoint import Checkpoint, open_checkpoint
from porting.errors import EfficientDetError
from porting.hparams import UNSEEN
from porting.sources import SYNTHETIC
from porting.sources.download import Listener
from porting.sources.foreign import check_foreign
from porting.sources.google_releases import fetch, google_release_named
from pytorch_model.config import model_config


def open_source(
    spec: str,
    folder: Path,
    step: int | None = None,
    cache: Path | None = None,
    listener: Listener | None = None,
) -> Checkpoint:
    """Open ``spec``: a path, a Google release by name or address, or ``synthetic:MODEL``.

    A synthetic checkpoint is first written into ``folder`` in AutoML's format, then opened like any other. A
    release is first downloaded into ``cache`` unless it is already there; ``listener`` gets the progress.
    ``step`` selects one of several checkpoints in a folder. Raises :class:`EfficientDetError`, which says
    what to do.
    """
    if spec.startswith(SYNTHETIC):
        if step is not None:
            raise EfficientDetError(f"{spec} has one step; leave out --step, which selects one of several")
        written = open_checkpoint(write_synthetic(spec.removeprefix(SYNTHETIC), folder))
        return _known(written, spec.removeprefix(SYNTHETIC), spec)
    release = google_release_named(spec, cache)
    if release:
        fetched = open_checkpoint(fetch(release, cache, listener), step)
        return _known(fetched, release.model, f"the release {release.name}")
    check_foreign(spec)
    return open_checkpoint(spec, step)


def _known(checkpoint: Checkpoint, model: str, name: str) -> Checkpoint:
    """``name`` says what its weights do not show: the network computes as AutoML's ``model`` by default."""
    config = model_config(model)
    checkpoint.add_settings({field: getattr(config, field) for field in UNSEEN}, name)
    return checkpoint


def write_synthetic(model: str, folder: Path, seed: int = 0) -> Path:
    """Write a seeded checkpoint of ``model`` to ``folder/synthetic/MODEL/`` and return that folder.

    Raises :class:`ConfigError` on an unknown model, :class:`OutputError` if it cannot be written.
    """
    from porting.checkpoint.v2.writer import write_bundle
    from porting.synthetic import synthetic_checkpoint

    config = model_config(model)
    target = folder / "synthetic" / config.name
    write_bundle(target / "model", synthetic_checkpoint(config, seed))
    return target
