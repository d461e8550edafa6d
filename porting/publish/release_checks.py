"""Check a release folder: files, checksums, tensors, configuration, parity, figures, model card."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from porting.audit import audit_parameters
from porting.convert import EMA, Conversion
from porting.errors import EfficientDetError, Reason
from porting.parity.measure import tolerances
from porting.publish.release_folder import (
    CARD,
    METRICS,
    NAME,
    PARITY,
    PARITY_PAGE,
    SUMS,
    card_of,
    metrics_problem,
    pth_of,
    read_json,
    sums_of,
)
from porting.rules import taps
from pytorch_model.config import EfficientDetConfig
from pytorch_model.files import sha256_of_file
from pytorch_model.weights import CONFIG_FILE, MODEL_FILE
from pytorch_model.weights.checks import check_weights
from pytorch_model.weights.files import config_text, read_tensors, read_weights

#: The runs that a parity report must hold: the rules in exact arithmetic, the weights as they are used.
RUNS = ("float64", "float32")

#: Errors from JSON of another shape: nested too deep, numbers too large, other keys, other types.
_UNREADABLE = (ArithmeticError, KeyError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True)
class Check:
    """One check of a folder; ``problem`` is None if it passed."""

    what: str
    problem: str | None = None


def verify_release(folder: Path, conversion: Conversion | None = None) -> Iterator[Check]:
    """Check a release from its bytes up, yielding each check as it is done.

    ``conversion``: of the checkpoint that the release claims to come from, if that is available. Raises
    :class:`EfficientDetError` if ``folder`` is not a folder.
    """
    if not folder.is_dir():
        raise EfficientDetError(f"there is no folder {folder}; give one that tools/release.py wrote")
    found = Check("the files are those of a release", _files_problem(folder))
    yield found
    if found.problem:  # the other checks need the files
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
        (f"{METRICS} was measured with these weights", metrics_problem),
        (f"{CARD} is what the other files say", _card_problem),
    ):
        if METRICS in what and not (folder / METRICS).exists():
            continue
        try:
            problem = problem_of(folder)
        except (EfficientDetError, Reason) as error:
            problem = str(error)
        except (*_UNREADABLE, AttributeError, OSError) as error:
            problem = f"cannot be read ({type(error).__name__}: {error})"
        yield Check(what, problem)
    if conversion is not None:
        yield Check("the checkpoint converts to these very tensors", _conversion_problem(folder, conversion))


def released_values(folder: Path) -> str:
    """The kind of values that were released. ``EMA`` if the folder is damaged; then a check fails."""
    with suppress(EfficientDetError):
        return str(read_weights(folder)[2].get("weights", EMA))
    return EMA


def _files_problem(folder: Path) -> str | None:
    required = {MODEL_FILE, CONFIG_FILE, PARITY, PARITY_PAGE, CARD, SUMS}
    names = {path.name for path in folder.iterdir()}
    weights = {name for name in names if re.fullmatch(rf"{NAME.pattern}-[0-9a-f]{{8}}\.pth", name)}
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


def _tensors_problem(folder: Path) -> str | None:
    path = pth_of(folder)
    if sha256_of_file(path)[:8] != path.stem.rpartition("-")[2]:
        return f"{path.name} has a SHA-256 different from the one in its name"
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
        config, read_json(folder / CONFIG_FILE)["metadata"]
    ):
        return "it is not laid out as it was written"
    counted = audit_parameters(config)
    for key, value in (("parameters", counted.ours), ("automl_parameters", counted.automl)):
        if json.loads(about[key]) != value:
            return f"{key} is {about[key]}, the model has {value}"
    return None


def _parity_problem(folder: Path) -> str | None:
    parity, (_, config, about) = read_json(folder / PARITY), read_weights(folder)
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
    """Checks that every layer is within tolerance and that the summary is that of the layers."""
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
    return None if shown == read_json(folder / PARITY) else "it shows something else"


def _card_problem(folder: Path) -> str | None:
    return None if (folder / CARD).read_bytes() == card_of(folder).encode() else "it says something else"


def _conversion_problem(folder: Path, conversion: Conversion) -> str | None:
    state_dict, config, about = read_weights(folder)
    if config != conversion.config:
        return "the checkpoint is of another configuration"
    if about["variables_sha256"] != conversion.digest:
        return "the checkpoint holds other values"
    return _difference(state_dict, conversion.state_dict, MODEL_FILE, "the checkpoint")
