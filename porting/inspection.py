"""Inspect a checkpoint without converting it: its model, its averages and optimizer, unexpected variables."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from porting.checkpoint import Checkpoint
from porting.errors import ConfigError, ConversionError
from porting.infer import Inference, configure
from porting.scopes import EMA_SUFFIX, SEGMENTATION_SCOPES, SLOT_SUFFIXES, STATISTICS, model_name
from tf_reference.variables import variables

_MOST_NAMED = 3  # names in one finding
_DEEPEST = 32  # scopes in scopes; AutoML's go six deep
_NUMBERED = re.compile(r"(?P<stem>.*?)(?P<first>[0-9]{1,9})(…(?P<last>[0-9]{1,9}))?")


@dataclass(frozen=True)
class Averages:
    """Differences of raw values from moving averages (EMA): relative L2, ‖raw − EMA‖ / ‖EMA‖, in float64.

    ``relative``: over all ``pairs``. ``largest``: the variable that differs most. ``identical``: the number
    of variables whose average equals their raw value in every bit.
    """

    pairs: int
    relative: float
    largest: str
    largest_relative: float
    identical: int


@dataclass(frozen=True)
class Inspection:
    """``shapes``: of the model's variables, without averages and slots. ``slots``: optimizer slot → count."""

    inference: Inference | None  # None: not an EfficientDet, or not one that can be ported
    shapes: Mapping[str, tuple[int, ...]]
    averaged: int  # variables with a moving average
    averages: Averages | None  # None: there are no pairs to compare
    slots: Mapping[str, int]
    trainable: int  # parameters that gradient descent trains, as AutoML counts them
    untrained: int  # batch-norm statistics
    unexpected: tuple[str, ...]  # a sentence each


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Read all of the model's variables, raw and averaged, and report. Optimizer slots are only counted.

    Raises :class:`CheckpointError` if the file is damaged.
    """
    entries = checkpoint.shapes
    model = _model_shapes(entries)
    inference, unexpected = None, []
    try:
        inference = configure(checkpoint)
    except (ConfigError, ConversionError) as error:
        unexpected.append(str(error))
    if inference:
        unexpected += _strangers(inference, model)
    unexpected += _unpaired(entries)
    averages, values = _read_values(checkpoint, model)
    sizes = Counter({True: 0, False: 0})
    for name, shape in model.items():
        sizes[name.endswith(STATISTICS)] += math.prod(shape)
    return Inspection(
        inference=inference,
        shapes=model,
        averaged=sum(name + EMA_SUFFIX in entries for name in model),
        averages=averages,
        slots=Counter(
            entry.rpartition("/")[2]
            for entry in entries
            if entry.endswith(SLOT_SUFFIXES) and entry not in model
        ),
        trainable=sizes[False],
        untrained=sizes[True],
        unexpected=(*unexpected, *values),
    )


def _model_shapes(entries: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The model's variables, with the shapes of their raw values, or else of averages, or else of slots."""
    model: dict[str, tuple[int, ...]] = {}
    for entry, shape in entries.items():
        name = model_name(entry)
        if name is not None:
            own = entries.get(name, entries.get(name + EMA_SUFFIX, shape))
            model.setdefault(name, own)
    return model


def _strangers(inference: Inference, model: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    config = inference.config
    expected = {variable.name: variable.shape for variable in variables(config)}
    others = [n for n in model if n not in expected and not n.startswith(SEGMENTATION_SCOPES)]
    yield from _finding(others, f"that {config.name} does not have")
    yield from _finding(
        [n for n in expected if n not in model], f"that {config.name} has and this checkpoint does not"
    )
    misshapen = [name for name, shape in model.items() if expected.get(name, shape) != shape]
    yield from _finding(misshapen, f"with another shape than in {config.name}")


def _unpaired(entries: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Variables without an average although others have one, and averages without their variable."""
    named = {name for entry in entries if (name := model_name(entry)) is not None}
    averaged = {name for name in named if name + EMA_SUFFIX in entries}
    if averaged:
        yield from _finding(sorted(named - averaged), "without a moving average, although others have one")
    if any(name in entries for name in named):
        without = sorted(name for name in named if name not in entries)
        yield from _finding(without, "with a moving average or a slot, but without a raw value")
    other = [name for name in averaged if entries.get(name) not in (None, entries[name + EMA_SUFFIX])]
    yield from _finding(sorted(other), "whose moving average has another shape")


def _finding(names: list[str], what: str) -> Iterator[str]:
    if names:
        shown = ", ".join(names[:_MOST_NAMED]) + (", …" if len(names) > _MOST_NAMED else "")
        yield f"{len(names)} variable{'s' if len(names) > 1 else ''} {what}: {shown}"


def _read_values(
    checkpoint: Checkpoint, model: Mapping[str, tuple[int, ...]]
) -> tuple[Averages | None, list[str]]:
    """Read raw values and averages one by one. Returns their comparison and findings about the values."""
    wanted = [entry for name in model for entry in (name, name + EMA_SUFFIX) if entry in checkpoint.shapes]
    readable = [entry for entry in wanted if np.issubdtype(checkpoint.dtypes[entry], np.floating)]
    findings = _Findings()
    comparison = _Comparison()
    pending: dict[str, np.ndarray] = {}
    pairs = {n for n in readable if n + EMA_SUFFIX in checkpoint.shapes}
    for entry, value in checkpoint.read_many(readable):
        findings.look_at(entry, value)
        name = entry.removesuffix(EMA_SUFFIX)
        if name not in pairs or checkpoint.shapes[name] != checkpoint.shapes.get(name + EMA_SUFFIX):
            continue
        twin = pending.pop(name, None)
        if twin is None:
            pending[name] = value
        else:
            comparison.add(name, *((twin, value) if entry != name else (value, twin)))
    unread = sorted(set(wanted) - set(readable))
    return comparison.result(), [
        *_finding(unread, "whose type is not floating point"),
        *findings.listed(),
    ]


class _Findings:
    """Collects variables whose values no trained network has."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = defaultdict(list)

    def look_at(self, name: str, value: np.ndarray) -> None:
        if not np.isfinite(value).all():
            self._names["holding NaN or infinity"].append(name)
        elif "/moving_variance" in name and value.size and value.min() < 0:
            self._names["holding a negative variance"].append(name)

    def listed(self) -> Iterator[str]:
        for what, names in self._names.items():
            yield from _finding(sorted(names), what)


class _Comparison:
    """Sums up the differences between raw values and averages."""

    def __init__(self) -> None:
        self._difference = self._norm = 0.0  # sums of squares
        self._largest, self._largest_name = -1.0, ""
        self._pairs = self._identical = 0

    def add(self, name: str, raw: np.ndarray, average: np.ndarray) -> None:
        with np.errstate(all="ignore"):  # NaN and infinity are reported separately
            wide = average.astype(np.float64)
            difference = float(np.sum(np.square(raw.astype(np.float64) - wide)))
            norm = float(np.sum(np.square(wide)))
        self._pairs += 1
        self._identical += raw.tobytes() == average.tobytes()
        if not math.isfinite(difference + norm):
            return
        self._difference += difference
        self._norm += norm
        relative = _ratio(difference, norm)
        if relative > self._largest:
            self._largest, self._largest_name = relative, name

    def result(self) -> Averages | None:
        if not self._largest_name:
            return None
        overall = _ratio(self._difference, self._norm)
        return Averages(self._pairs, overall, self._largest_name, self._largest, self._identical)


def _ratio(difference: float, norm: float) -> float:
    """Relative L2 of two sums of squares; infinite if only the norm is zero."""
    return math.sqrt(difference / norm) if norm else (math.inf if difference else 0.0)


# The tree of scopes


@dataclass(frozen=True)
class Scope:
    """A scope, a run of ``repeats`` equal neighbouring scopes, or a variable (with a ``shape``)."""

    label: str  # stem, blocks_3, blocks_5…8, kernel
    repeats: int
    variables: int  # of all repeats
    parameters: int  # of all repeats
    shape: tuple[int, ...] | None
    children: tuple[Scope, ...]  # of one repeat

    def is_like(self, other: Scope) -> bool:
        """Whether both have variables of the same names and shapes."""
        return (
            self.shape == other.shape
            and len(self.children) == len(other.children)
            and all(
                ours.label == theirs.label and ours.is_like(theirs)
                for ours, theirs in zip(self.children, other.children, strict=True)
            )
        )


def scope_tree(shapes: Mapping[str, tuple[int, ...]], deepest: int = _DEEPEST) -> tuple[Scope, ...]:
    """The scopes of variables' names, split at ``/``, in natural order; equal numbered ones are joined.

    Names are split into at most ``deepest`` labels; the rest of a name is the last label.
    """
    below: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    own: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        label, slash, rest = name.partition("/") if deepest > 1 else (name, "", "")
        if slash:
            below[label][rest] = shape
        else:
            own[label] = shape
    scopes: list[Scope] = []
    for label in sorted({*own, *below}, key=_natural):
        children = scope_tree(below[label], deepest - 1) if label in below else ()
        sizes = [math.prod(shape) for shape in below.get(label, {}).values()]
        if label in own:
            sizes.append(math.prod(own[label]))
        scope = Scope(label, 1, len(sizes), sum(sizes), own.get(label), children)
        joined = _joined(scopes[-1], scope) if scopes else None
        scopes[len(scopes) - bool(joined) :] = [joined or scope]
    return tuple(scopes)


def _natural(label: str) -> list[tuple[int, str]]:
    """A sort key that puts blocks_2 before blocks_10."""
    return [
        (int(part), "") if part.isdecimal() and part.isascii() else (-1, part)
        for part in re.split(r"([0-9]{1,9})", label)
    ]


def _joined(run: Scope, scope: Scope) -> Scope | None:
    """Both as one scope if they are equal and the number of ``scope`` follows that of ``run``, else None."""
    ours, theirs = _NUMBERED.fullmatch(run.label), _NUMBERED.fullmatch(scope.label)
    if not ours or not theirs or not scope.children or not run.is_like(scope):
        return None
    if ours["stem"] != theirs["stem"] or int(ours["last"] or ours["first"]) + 1 != int(theirs["first"]):
        return None
    return Scope(
        f"{ours['stem']}{ours['first']}…{theirs['first']}",
        run.repeats + 1,
        run.variables + scope.variables,
        run.parameters + scope.parameters,
        None,
        run.children,
    )
