"""``config.yaml``: the hyper-parameters of a training run, which AutoML leaves in its ``model_dir``.

Source: AutoML ``main.py`` and ``tf2/train.py``, which write all of a run's hyper-parameters as YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from porting.errors import CheckpointError, ConfigError, Reason
from porting.hparams.history import HPARAMS, RUNNING, SUPPRESSION, TRAINING, with_effect
from porting.hparams.label_map import LABEL_MAP_NAMES, read_label_map
from porting.hparams.meaning import interpret
from porting.hparams.text import in_message
from porting.hparams.yaml_file import read_yaml
from pytorch_model.config import MODELS
from pytorch_model.labels.classes import names_of_ids

#: Names that concern weights. How detections are chosen afterwards does not.
_TAKEN = HPARAMS.keys() - with_effect(RUNNING, SUPPRESSION, TRAINING)


@dataclass(frozen=True)
class RunConfig:
    """What the file states.

    ``model``: the variant that the run began with, or None. ``fields``: fields of ``EfficientDetConfig``.
    ``notes``: sentences for the user; if the file is not AutoML's, that it is not used.
    """

    model: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_run_config(path: Path) -> RunConfig:
    """Read the file at ``path``, which exists.

    One that is not YAML, or that another program wrote, states nothing. Names that AutoML never had are left
    out: a changed AutoML writes them. Raises :class:`CheckpointError` for a network that this project does
    not build.
    """
    try:
        values = read_yaml(path, str(path))
    except ConfigError as error:
        return RunConfig(notes=(f"not used: {error}",))
    others = [name for name in values if name not in HPARAMS]
    if 2 * len(others) >= len(values):
        return RunConfig(notes=(f"{path} is not used: it does not hold AutoML's hyper-parameters",))
    known = {name: value for name, value in values.items() if name in _TAKEN}
    label_maps = {name: known.pop(name) for name in LABEL_MAP_NAMES if name in known}
    notes = []
    if "name" in known and known["name"] not in MODELS:
        notes = [
            f"{path} names the model {in_message(known.pop('name'))}, which AutoML does not know; not used"
        ]
    try:
        read = interpret(known)
    except ConfigError as error:
        raise CheckpointError(
            f"{path}, which lies with the checkpoint, says {error} (if it is not this checkpoint's, move it "
            "away and give --hparams)"
        ) from None
    if others:
        listed = ", ".join(map(in_message, others[:3])) + (", …" if len(others) > 3 else "")
        notes.append(f"{path} also has {listed}, which AutoML does not know; not used")
    names, about_names = _class_names(label_maps, path, read.overrides.get("num_classes"))
    fields = {**read.overrides, **({"class_names": names} if names else {})}
    return RunConfig(read.model, fields, (*notes, *about_names))


def _class_names(
    label_maps: Mapping[str, Any], path: Path, num_classes: int | None
) -> tuple[tuple[str, ...] | None, list[str]]:
    """(the names of the classes or None, notes). Weights can do without names: nothing is raised."""
    notes: list[str] = []
    for name, value in label_maps.items():
        try:
            found = read_label_map(value, (path.parent,))
            if found and num_classes:
                return names_of_ids(found, num_classes), notes
        except Reason as reason:
            notes.append(f"the {name} in {path} is not used: {reason}")
    return None, notes
