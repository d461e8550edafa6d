"""A release folder: weights and their evidence in one folder, which can be checked on its own, byte for byte.

``NAME-xxxxxxxx.pth``        the state dict only; the digits are of its SHA-256, which torch.hub checks
``model.safetensors``        the same tensors
``config.json``              configuration, and the origin of the weights as far as it is known
``parity.json``, ``.html``   every layer compared with the TensorFlow reference
``coco_metrics.json``        the figures that tools/eval_coco.py measured with these weights; only if given
``README.md``                the model card; every number in it comes from the files above
``SHA256SUMS``               checksums of all the others

Nothing in it depends on time, place or chance: the same checkpoint gives the same bytes, on one kind of
machine with the same PyTorch and TensorFlow, whose rounding shows in parity.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porting import __version__
from porting.audit import audit_parameters
from porting.checkpoint import Checkpoint
from porting.convert import Conversion, metadata
from porting.errors import EfficientDetError, Reason
from porting.parity.report.content import Report, write_json
from porting.parity.report.html import write_html
from porting.publish.model_card import model_card
from porting.sources.google_releases import GoogleRelease
from pytorch_model.evaluation.metrics import MOST_BYTES, Metrics
from pytorch_model.files import read_bounded, sha256_of_file
from pytorch_model.weights import CONFIG_FILE, MODEL_FILE
from pytorch_model.weights.files import config_text, torch_bytes, write_weights

CARD, SUMS = "README.md", "SHA256SUMS"
PARITY, PARITY_PAGE, METRICS = "parity.json", "parity.html", "coco_metrics.json"

#: A release's name.
NAME = re.compile(r"[A-Za-z0-9_]{1,80}")


def check_name(name: str) -> str:
    """Return ``name``. Raises :class:`EfficientDetError` if torch.hub could not find the hash after it."""
    if not NAME.fullmatch(name):
        raise EfficientDetError(f"{name!r} is not a valid name for a release; use only letters, digits and _")
    return name


def origin(
    conversion: Conversion,
    checkpoint: Checkpoint,
    assumed: tuple[str, ...],
    source: str,
    license_id: str,
    release: GoogleRelease | None = None,
) -> dict[str, Any]:
    """The metadata of ``config.json``: where the weights come from; JSON-serialisable.

    ``source``: the name of the checkpoint, not its path on this machine. ``release``: Google's, if it is one.
    """
    counted = audit_parameters(conversion.config)
    return {
        "source": source,
        **metadata(conversion, checkpoint, assumed),
        "parameters": counted.ours,
        "automl_parameters": counted.automl,
        "published_parameters_millions": counted.published,
        "published_ap_val": release.ap_val if release else None,
        "published_ap_test_dev": release.ap_test_dev if release else None,
        "tool": "efficientdet-porting",
        "tool_version": __version__,
        "license": license_id,
    }


def write_release(
    folder: Path,
    name: str,
    conversion: Conversion,
    about: Mapping[str, Any],
    report: Report,
    metrics: bytes | None,
) -> None:
    """Fill ``folder``, which is empty. ``about``: from :func:`origin`; ``metrics``: the content of METRICS.

    Raises :class:`EfficientDetError` if ``metrics`` belong to other weights; ``OSError`` from the disk.
    """
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    write_weights(folder / MODEL_FILE, conversion.arrays, conversion.config, texts)
    (folder / CONFIG_FILE).write_text(config_text(conversion.config, about), encoding="utf-8")
    (folder / "weights").write_bytes(torch_bytes(conversion.state_dict))
    (folder / "weights").rename(folder / f"{name}-{sha256_of_file(folder / 'weights')[:8]}.pth")
    write_json(report, folder / PARITY)
    write_html(report, folder / PARITY_PAGE)
    if metrics is not None:
        (folder / METRICS).write_bytes(metrics)
        problem = metrics_problem(folder)
        if problem:
            raise EfficientDetError(f"the COCO metrics {problem}")
    (folder / CARD).write_text(card_of(folder), encoding="utf-8")
    (folder / SUMS).write_text(sums_of(folder), encoding="ascii")


def sums_of(folder: Path) -> str:
    """The correct content of SUMS, from the files there: ``sha256sum``'s format, sorted by name."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{sha256_of_file(folder / name)}  {name}\n" for name in names)


def card_of(folder: Path) -> str:
    """The correct content of CARD, from the other files there. Raises :class:`Reason` for bad metrics."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in (CARD, SUMS))
    return model_card(
        name=pth_of(folder).name.rpartition("-")[0],
        about=read_json(folder / CONFIG_FILE),
        parity=read_json(folder / PARITY),
        metrics=_metrics_of(folder) if METRICS in names else None,
        files={name: ((folder / name).stat().st_size, sha256_of_file(folder / name)) for name in names},
    )


def metrics_problem(folder: Path) -> str | None:
    """Why METRICS does not belong to the weights there: it states the SHA-256 of the evaluated file."""
    try:
        digest = _metrics_of(folder).weights_sha256
    except Reason as reason:
        return f"are not a metrics.json: {reason}; give the one that tools/eval_coco.py wrote"
    if digest not in (sha256_of_file(folder / MODEL_FILE), sha256_of_file(pth_of(folder))):
        return f"are of another weight file; evaluate this release's {MODEL_FILE}"
    return None


def pth_of(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.suffix == ".pth")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _metrics_of(folder: Path) -> Metrics:
    return Metrics.parse(read_bounded(folder / METRICS, MOST_BYTES))
