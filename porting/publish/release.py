"""Make a release: convert a checkpoint, prove the port, write the folder, check what was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from porting.checkpoint import Checkpoint
from porting.convert import Conversion, convert
from porting.errors import CheckFailedError
from porting.infer import Inference
from porting.parity import ParityResult
from porting.parity.lockstep import Observer
from porting.parity.report.content import Report
from porting.parity.report.thumbnails import Thumbnails
from porting.publish import GOOGLES_LICENSE
from porting.publish.release_checks import Check, verify_release
from porting.publish.release_folder import check_name, origin, write_release
from porting.sources import SYNTHETIC
from porting.sources.google_releases import GoogleRelease
from pytorch_model.config import EfficientDetConfig
from pytorch_model.files import check_new_folder, new_folder

#: Proves a conversion on images, float32 [N, H, W, 3], normalised; an observer gets every activation.
Prove: TypeAlias = Callable[[Conversion, np.ndarray, Observer], Sequence[ParityResult]]


@dataclass(frozen=True)
class ReleaseRequest:
    """What to release.

    ``out``: where to put the folder ``name`` (default: the name of Google's release, or the model's).
    ``published``: Google's release, if the checkpoint is one. ``spec``: the path or name that was opened;
    of a path only the last two parts are noted. ``license``: of the weights (default: Google's for its
    releases, else "unknown").
    ``metrics``: the content of a metrics.json, see :func:`pytorch_model.evaluation.metrics.read_metrics`.
    Raises :class:`EfficientDetError` for a ``name`` that torch.hub would misread.
    """

    out: Path
    spec: str
    published: GoogleRelease | None = None
    name: str | None = None
    license: str | None = None
    raw: bool = False
    ema_or_raw: bool = False
    metrics: bytes | None = None

    def __post_init__(self) -> None:
        if self.name:
            check_name(self.name)


@dataclass(frozen=True)
class MadeRelease:
    """``folder``: the release. ``checks``: those it passed, without the checkpoint's."""

    folder: Path
    checks: tuple[Check, ...]


def make_release(
    request: ReleaseRequest,
    checkpoint: Checkpoint,
    inference: Inference,
    images_for: Callable[[EfficientDetConfig], np.ndarray],
    prove: Prove,
    listener: Callable[[Check], None] = lambda check: None,
) -> MadeRelease:
    """Convert ``checkpoint``, prove the port and write the release folder; ``listener`` hears each check.

    ``inference``: the checkpoint's configuration. ``images_for``: the input of the proof. Imports TensorFlow.
    Raises :class:`CheckFailedError` if the port or the folder fails a check, and another
    :class:`EfficientDetError` for other problems; then no folder is left.
    """
    published = request.published
    name = request.name or check_name(
        (published.name if published else inference.config.name).replace("-", "_")
    )
    target = request.out / name
    check_new_folder(target)
    conversion = convert(checkpoint, inference.config, raw=request.raw, ema_or_raw=request.ema_or_raw)
    source = published.url if published else _source_name(request.spec, checkpoint)
    license_id = request.license or (GOOGLES_LICENSE if published else "unknown")
    about = origin(conversion, checkpoint, inference.assumed, source, license_id, published)
    report = _proven(conversion, images_for(conversion.config), source, prove)
    with new_folder(target) as folder:
        write_release(folder, name, conversion, about, report, request.metrics)
        checks = []
        for check in verify_release(folder, conversion):
            listener(check)
            checks.append(check)
        if any(check.problem for check in checks):
            raise CheckFailedError(f"{target} was not written: it failed its own check")
    return MadeRelease(target, tuple(checks))


def _proven(conversion: Conversion, images: np.ndarray, source: str, prove: Prove) -> Report:
    """Raises :class:`CheckFailedError` unless every layer passed: only proven weights are released."""
    import tensorflow

    thumbnails = Thumbnails()
    results = prove(conversion, images, thumbnails)
    report = Report(
        results=tuple(results),
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
    if not report.passed:
        raise CheckFailedError("the port does not match the reference; nothing was released")
    return report


def _source_name(spec: str, checkpoint: Checkpoint) -> str:
    """The name of a checkpoint, without most of its path, which only means something on this machine."""
    return spec if spec.startswith(SYNTHETIC) else "/".join(Path(checkpoint.source).resolve().parts[-2:])
