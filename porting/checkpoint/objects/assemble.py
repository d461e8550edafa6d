"""From the variables of an object tree to a checkpoint with AutoML's names, including averages and slots."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from porting.checkpoint.base import STEP_VARIABLE, Checkpoint
from porting.checkpoint.objects.graph import SLOT, VALUE, ObjectTree, Variable
from porting.checkpoint.renamed import Renamed, Source
from porting.checkpoint.v2.bundle import TensorBundle
from porting.errors import CheckpointError
from porting.scopes import EMA_SUFFIX, STATISTICS

_AVERAGE = "average"  # tfa MovingAverage's slot

#: The name of a slot in TensorFlow 2 → its suffix in a name-based checkpoint.
_SLOT_SUFFIXES = {"momentum": "/Momentum", "m": "/Adam", "v": "/Adam_1", "rms": "/RMSProp"}

#: Attributes of a model, or of the checkpoint around it, that hold the state of training.
_TRAINING = frozenset(
    {"optimizer", "_optimizer", "save_counter", "step", "epoch", "global_step", "keras_api", "metrics"}
)
_STEP_KEY = re.compile(r"(.*/)?\w*optimizer/(iter|_iterations)|step|global_step")


class Piece(NamedTuple):
    """The source of an AutoML variable: the variable at ``path``, or ``take(array)`` of ``shape``."""

    path: str
    take: Callable[[np.ndarray], np.ndarray] | None = None
    shape: tuple[int, ...] = ()


def assemble(
    tree: ObjectTree,
    variables: Mapping[str, Variable],
    pieces: Mapping[str, Piece],
    format: str,
    notes: Iterable[str] = (),
    stale_statistics: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """The checkpoint with the variables ``pieces`` (AutoML name → its source) and their averages and slots.

    ``settings``: as in :class:`Checkpoint`. ``stale_statistics``: the averages of batch-norm statistics are
    never updated and must not be used. Slots get AutoML's suffixes. A variable that belongs to the model but
    is not in ``pieces`` keeps its path as its name, so that conversion rejects it. Variables of the training
    loop are left out and counted in the notes.
    """
    bundle = tree.bundle
    slots, unknown_slots = _slots(bundle, variables.values())
    sources: dict[str, Source] = {}
    for name, piece in pieces.items():
        variable = variables[piece.path]
        sources[name] = Source(variable.key + VALUE, piece.take, piece.shape)
        for slot, key in slots[variable.key].items():
            if slot != _AVERAGE:
                sources[name + _SLOT_SUFFIXES[slot]] = Source(key, piece.take, piece.shape)
    averages, about_averages = _averages(variables, pieces, slots, stale_statistics)
    sources.update(averages)
    used = {variables[piece.path].key for piece in pieces.values()}
    for path, variable in variables.items():
        if variable.key not in used and path.split("/")[0] not in _TRAINING:
            sources[path] = Source(variable.key + VALUE)
            used.add(variable.key)
    left = [key for key in bundle if key.endswith(VALUE) and SLOT not in key]
    left = [key for key in left if key.removesuffix(VALUE) not in used]
    step = next((key for key in left if _is_step(bundle, key)), None)
    if step:
        sources[STEP_VARIABLE] = Source(step)
        left.remove(step)
    about = [*notes, *about_averages, *_about_left_out(left, unknown_slots)]
    return Renamed(bundle, sources, format, about, settings)


def _slots(
    bundle: TensorBundle, variables: Iterable[Variable]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Key of a variable → slot → key of the slot variable; and the keys of slots of unknown kinds.

    Raises CheckpointError if a known slot does not have the shape of its variable.
    """
    shapes = {variable.key: variable.shape for variable in variables}
    slots: dict[str, dict[str, str]] = defaultdict(dict)
    unknown = []
    for key in bundle:
        if SLOT not in key or not key.endswith(VALUE):
            continue
        variable, _, slot = key.removesuffix(VALUE).partition(SLOT)
        slot = slot.rsplit("/", 1)[-1]
        if slot not in _SLOT_SUFFIXES and slot != _AVERAGE:
            unknown.append(key)
        elif bundle.shapes[key] != shapes.get(variable, bundle.shapes[key]):
            raise CheckpointError(
                f"{bundle.source} holds {variable} of shape {list(shapes[variable])}, but its {slot} of "
                f"shape {list(bundle.shapes[key])}; this checkpoint mixes two models"
            )
        else:
            slots[variable][slot] = key
    return slots, unknown


def _averages(
    variables: Mapping[str, Variable],
    pieces: Mapping[str, Piece],
    slots: Mapping[str, Mapping[str, str]],
    stale_statistics: bool,
) -> tuple[dict[str, Source], list[str]]:
    """The moving averages, and notes about them.

    An averaging optimizer averages only the variables that it updates. AutoML's ``emackpt`` combines these
    averages with the raw batch-norm statistics and frozen weights. So those are used as their own averages.
    """
    sources: dict[str, Source] = {}
    if not any(_AVERAGE in slots.get(variable.key, {}) for variable in variables.values()):
        return sources, []
    own = {"batch-norm statistics": 0, "weights that the optimizer never touched": 0}
    stale = 0
    for name, (path, take, shape) in pieces.items():
        key, its_slots = variables[path].key, slots.get(variables[path].key, {})
        is_statistic = name.endswith(STATISTICS)
        if _AVERAGE in its_slots and not (is_statistic and stale_statistics):
            sources[name + EMA_SUFFIX] = Source(its_slots[_AVERAGE], take, shape)
            continue
        if is_statistic:
            own["batch-norm statistics"] += 1
            stale += _AVERAGE in its_slots
        elif not its_slots:
            own["weights that the optimizer never touched"] += 1
        else:
            continue  # trained but not averaged: conversion reports it
        sources[name + EMA_SUFFIX] = Source(key + VALUE, take, shape)
    kinds = " and ".join(f"{count} {what}" for what, count in own.items() if count)
    notes = []
    if kinds:
        notes.append(f"the optimizer does not average {kinds}: their raw values are used as averages")
    if stale:
        notes.append(
            f"{stale} averages of batch-norm statistics were left out: training does not update them"
        )
    return sources, notes


def _is_step(bundle: TensorBundle, key: str) -> bool:
    return bool(
        _STEP_KEY.fullmatch(key.removesuffix(VALUE))
        and bundle.shapes[key] == ()
        and np.issubdtype(bundle.dtypes[key], np.integer)
    )


def _about_left_out(left: list[str], unknown_slots: list[str]) -> Iterator[str]:
    """Notes about the variables that were left out."""
    training = [key for key in left if _TRAINING & set(key.split("/"))]
    others = [key for key in left if key not in set(training)]
    for keys, what in (
        (training, "of the training loop"),
        (unknown_slots, "of the optimizer, of an unknown kind,"),
        (others, "outside the detector"),
    ):
        if keys:
            names = ", ".join(key.removesuffix(VALUE) for key in keys[:3]) + ("…" if len(keys) > 3 else "")
            yield f"left out {len(keys)} variable{'s' if len(keys) > 1 else ''} {what} ({names})"
