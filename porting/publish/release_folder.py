"""A release: weights and their evidence in one folder, which can be checked by itself, byte for byte.

``NAME-xxxxxxxx.pth``        state dict alone; the digits are of its SHA-256, as torch.hub checks them
``model.safetensors``        the same tensors
``config.json``              configuration, and what is known of the weights' origin
``parity.json``, ``.html``   every layer against the TensorFlow reference
``coco_metrics.json``        what tools/eval_coco.py measured with these very weights; only if it was given
``README.md``                the model card; every number in it is taken from the files above
``SHA256SUMS``               of all the others

Nothing in it depends on time, place or chance: the same checkpoint gives the same bytes, on one kind of
machine with the same PyTorch and TensorFlow, whose rounding parity.json shows.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from porting import __version__
from porting.audit import audit_parameters
from porting.checkpoint import Checkpoint
from porting.convert import Conversion, metadata
from porting.errors import CheckFailedError, EfficientDetError
from porting.parity.measure import tolerances
from porting.parity.report.content import Report, write_json
from porting.parity.report.html import write_html
from porting.publish.model_card import FIGURES, model_card
from porting.rules import taps
from porting.sources.google_releases import GoogleRelease
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import check_weights
from pytorch_model.files import sha256_of_file
from pytorch_model.weights import CONFIG_FILE, MODEL_FILE
from pytorch_model.weights.files import (
    config_text,
    read_tensors,
    read_weights,
    torch_bytes,
    write_weights,
)

CARD, SUMS = "README.md", "SHA256SUMS"
PARITY, PARITY_PAGE, METRICS = "parity.json", "parity.html", "coco_metrics.json"

#: What a parity report has to hold: the rules in exact arithmetic, the weights as they are used.
RUNS = ("float64", "float32")

#: tools/eval_coco.py's names of COCO's figures that a card shows.
REQUIRED_FIGURES = ("AP", "AP50", "AP75")

#: What JSON of another shape brings about: nested too deep, numbers too large, other keys, other types.
_UNREADABLE = (ArithmeticError, KeyError, RecursionError, TypeError, ValueError)

_NAME = re.compile(r"[A-Za-z0-9_]{1,80}")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; ``problem`` is None where it is as it should be."""

    what: str
    problem: str | None = None


def check_name(name: str) -> str:
    """``name`` itself. Raises :class:`EfficientDetError` unless torch.hub can find the hash behind it."""
    if not _NAME.fullmatch(name):
        raise EfficientDetError(f"{name!r} is no name for a release; use letters, digits and _ alone")
    return name


def origin(
    conversion: Conversion,
    checkpoint: Checkpoint,
    assumed: tuple[str, ...],
    source: str,
    license_id: str,
    release: GoogleRelease | None = None,
) -> dict[str, Any]:
    """What ``config.json`` says beside the configuration; JSON-serialisable.

    ``source``: what the checkpoint is called, no path of this machine. ``release``: Google's, if it is one.
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
    """Fill ``folder``, which is empty. ``about``: :func:`origin`; ``metrics``: the contents of METRICS.

    Raises :class:`EfficientDetError` where ``metrics`` are not of these weights; ``OSError`` from the disk.
    """
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    write_weights(folder / MODEL_FILE, conversion.state_dict, conversion.config, texts)
    (folder / CONFIG_FILE).write_text(config_text(conversion.config, about), encoding="utf-8")
    (folder / "weights").write_bytes(torch_bytes(dict(conversion.state_dict)))
    (folder / "weights").rename(folder / f"{name}-{sha256_of_file(folder / 'weights')[:8]}.pth")
    write_json(report, folder / PARITY)
    write_html(report, folder / PARITY_PAGE)
    if metrics is not None:
        (folder / METRICS).write_bytes(metrics)
        problem = _metrics_problem(folder)
        if problem:
            raise EfficientDetError(f"the COCO metrics {problem}")
    (folder / CARD).write_text(card_of(folder), encoding="utf-8")
    (folder / SUMS).write_text(sums_of(folder), encoding="ascii")


def sums_of(folder: Path) -> str:
    """What SUMS has to be, from the files there: ``sha256sum``'s format, sorted by name."""
    names = sorted(path.name for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{sha256_of_file(folder / name)}  {name}\n" for name in names)


def card_of(folder: Path) -> str:
    """What CARD has to be, from the other files there."""
    names = sorted(path.name for path in folder.iterdir() if path.name not in (CARD, SUMS))
    return model_card(
        name=_pth(folder).name.rpartition("-")[0],
        about=_json(folder / CONFIG_FILE),
        parity=_json(folder / PARITY),
        metrics=_json(folder / METRICS) if METRICS in names else None,
        files={name: ((folder / name).stat().st_size, sha256_of_file(folder / name)) for name in names},
    )


# --- checking -----------------------------------------------------------------------------------------


def verify_release(folder: Path, conversion: Conversion | None = None) -> Iterator[Check]:
    """Check a release from its bytes up, yielding each check as it is done.

    ``conversion``: what the checkpoint it claims to come from converts to, if that is at hand. Raises
    :class:`EfficientDetError` where ``folder`` is no folder.
    """
    if not folder.is_dir():
        raise EfficientDetError(f"there is no folder {folder}; give one that tools/release.py wrote")
    found = Check("the files are those of a release", _files_problem(folder))
    yield found
    if found.problem:  # the rest would stumble over what is missing
        return
    yield Check(f"{SUMS} is that of the files, byte for byte", _sums_problem(folder))
    for what, problem_of in (
        (
            "the .pth has the name torch.hub checks, and holds the tensors of model.safetensors",
            _tensors_problem,
        ),
        (f"{CONFIG_FILE} agrees with the weights", _config_problem),
        (f"{PARITY}: every layer within tolerance, of this configuration and these values", _parity_problem),
        (f"{PARITY_PAGE} shows {PARITY}", _page_problem),
        (f"{METRICS} was measured with these weights", _metrics_problem),
        (f"{CARD} is what the other files say", _card_problem),
    ):
        if METRICS in what and not (folder / METRICS).exists():
            continue
        try:
            problem = problem_of(folder)
        except EfficientDetError as error:
            problem = str(error)
        except (*_UNREADABLE, AttributeError, OSError) as error:
            problem = f"cannot be read ({type(error).__name__}: {error})"
        yield Check(what, problem)
    if conversion is not None:
        yield Check("the checkpoint converts to these very tensors", _conversion_problem(folder, conversion))


def holds_raw(folder: Path) -> bool:
    """Were the raw values released? Where the folder cannot tell: False, and a check fails."""
    with suppress(EfficientDetError):
        return read_weights(folder)[2].get("weights") == "raw"
    return False


def _files_problem(folder: Path) -> str | None:
    required = {MODEL_FILE, CONFIG_FILE, PARITY, PARITY_PAGE, CARD, SUMS}
    names = {path.name for path in folder.iterdir()}
    weights = {name for name in names if re.fullmatch(rf"{_NAME.pattern}-[0-9a-f]{{8}}\.pth", name)}
    for name in sorted(required - names):
        return f"{name} is missing"
    if len(weights) != 1:
        return f"there are {len(weights)} files called NAME-xxxxxxxx.pth instead of one"
    for name in sorted(names - required - weights - {METRICS}):
        return f"{name} does not belong there"
    for name in sorted(names):
        if (folder / name).is_symlink() or not (folder / name).is_file():
            return f"{name} is not a plain file"
    return None


def _sums_problem(folder: Path) -> str | None:
    expected, found = sums_of(folder), (folder / SUMS).read_bytes()
    if found == expected.encode():
        return None
    listed = set(found.decode("ascii", "replace").splitlines())
    wrong = [line.split("  ")[1] for line in expected.splitlines() if line not in listed]
    return f"differs at {', '.join(wrong)}" if wrong else f"{SUMS} itself was changed"


def _pth(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.suffix == ".pth")


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _tensors_problem(folder: Path) -> str | None:
    path = _pth(folder)
    if sha256_of_file(path)[:8] != path.stem.rpartition("-")[2]:
        return f"{path.name} has another SHA-256 than its name says"
    state_dict, config, _ = read_weights(folder)
    check_weights(state_dict, config, MODEL_FILE)
    return _difference(state_dict, read_tensors(path)[0], MODEL_FILE, path.name)


def _difference(
    a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], a_name: str, b_name: str
) -> str | None:
    for key in sorted(a.keys() ^ b.keys()):
        return f"only one of {a_name} and {b_name} has {key}"
    for key, tensor in a.items():
        if tensor.dtype != b[key].dtype or not torch.equal(tensor, b[key]):
            return f"{key} differs between {a_name} and {b_name}"
    return None


def _config_problem(folder: Path) -> str | None:
    stored = read_tensors(folder / MODEL_FILE)[1]
    _, config, about = read_weights(folder)
    stored.pop("config")
    stored.pop("format", None)
    if stored != about:
        return f"{MODEL_FILE} says something else of the weights' origin"
    if (folder / CONFIG_FILE).read_text(encoding="utf-8") != config_text(
        config, _json(folder / CONFIG_FILE)["metadata"]
    ):
        return "it is not laid out as it was written"
    counted = audit_parameters(config)
    for key, value in (("parameters", counted.ours), ("automl_parameters", counted.automl)):
        if json.loads(about[key]) != value:
            return f"{key} is {about[key]}, the model has {value}"
    return None


def _parity_problem(folder: Path) -> str | None:
    parity, (_, config, about) = _json(folder / PARITY), read_weights(folder)
    model = dict(parity["model"])
    model.pop("levels")
    if EfficientDetConfig.from_dict(model) != config:
        return "it is of another configuration"
    if parity["metadata"]["variables_sha256"] != about["variables_sha256"]:
        return "it is of other values"
    if {run["dtype"] for run in parity["runs"]} != set(RUNS) or any(
        layer["runs"].keys() != set(RUNS) for layer in parity["layers"]
    ):
        return f"it lacks a run of {' or '.join(RUNS)}"
    compared = [(layer["module"], layer["tap"], layer["output"]) for layer in parity["layers"]]
    if sorted(compared, key=str) != sorted(map(tuple, taps(config)), key=str):
        return "its layers are not those of the network"
    for run in parity["runs"]:
        problem = _run_problem(run, parity["layers"])
        if problem:
            return problem
    claims = [parity["passed"], *(run["passed"] for run in parity["runs"])]
    return None if all(claim is True for claim in claims) else "it says that it did not pass"


def _run_problem(run: Mapping[str, Any], layers: list[Mapping[str, Any]]) -> str | None:
    """Is every layer within tolerance, and the summary that of the layers?"""
    dtype = run["dtype"]
    for kind, limit in zip(("accumulated", "isolated"), tolerances(dtype), strict=True):
        figures = [float(layer["runs"][dtype][kind]["relative"]) for layer in layers]
        for layer, figure in zip(layers, figures, strict=True):
            if not figure <= limit:
                return f"{layer['module']} is {figure} off in {dtype}, allowed {limit:g}"
        if run["worst"][kind]["relative"] != max(figures) or run["tolerances"][kind] != limit:
            return f"its summary of {dtype} is not that of its layers"
    return None if run["activations"] == len(layers) else f"its summary of {dtype} counts other layers"


def _page_problem(folder: Path) -> str | None:
    page = (folder / PARITY_PAGE).read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)
    shown = json.loads(data[1]) if data else {}
    shown.pop("thumbnails", None)
    return None if shown == _json(folder / PARITY) else "it shows something else"


def _metrics_problem(folder: Path) -> str | None:
    """tools/eval_coco.py notes the SHA-256 of the weight file it ran."""
    digest = None
    with suppress(*_UNREADABLE):
        metrics = _json(folder / METRICS)
        figures = metrics["ours"]
        if not all(name in figures for name in REQUIRED_FIGURES) or not all(
            isinstance(figures[name], float) and math.isfinite(figures[name])
            for name in FIGURES
            if name in figures
        ):
            return f"lack a figure of {', '.join(REQUIRED_FIGURES)}; give metrics.json of tools/eval_coco.py"
        int(metrics["pictures"])
        digest = metrics["settings"]["ours"]["weights"]
    if digest is None:
        return "are not what tools/eval_coco.py writes as metrics.json"
    if digest not in (sha256_of_file(folder / MODEL_FILE), sha256_of_file(_pth(folder))):
        return f"are of another weight file; evaluate this release's {MODEL_FILE}"
    return None


def _card_problem(folder: Path) -> str | None:
    return None if (folder / CARD).read_bytes() == card_of(folder).encode() else "it says something else"


def _conversion_problem(folder: Path, conversion: Conversion) -> str | None:
    state_dict, config, about = read_weights(folder)
    if config != conversion.config:
        return "the checkpoint is of another configuration"
    if about["variables_sha256"] != conversion.digest:
        return "the checkpoint holds other values"
    return _difference(state_dict, conversion.state_dict, MODEL_FILE, "the checkpoint")


def check_passed(report: Report) -> None:
    """Raises :class:`CheckFailedError` unless every layer passed: only proven weights are released."""
    if not report.passed:
        raise CheckFailedError("the port does not match the reference; nothing was released")
