"""A checkpoint under other names: its arrays, or parts of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from porting.checkpoint.base import Checkpoint
from porting.checkpoint.messages import shortened
from porting.scopes import model_name, outer_scope

#: The second model in one Python process gets numbered layers in its stem: stem_1/conv2d_1, …
_COUNTED_STEM = re.compile(r"^(efficientnet-[^/]+)/stem_\d+/(conv2d|tpu_batch_normalization)(?:_\d+)?/")


class Source(NamedTuple):
    """The source of a variable's values: the array stored as ``key``, or ``take(array)`` of ``shape``."""

    key: str
    take: Callable[[np.ndarray], np.ndarray] | None = None
    shape: tuple[
        int, ...
    ] = ()  # of the array that ``take`` returns; without ``take`` the stored shape is used


class Renamed(Checkpoint):
    """``inner`` under the names of ``sources``. Several names may share a key, and keys may be unused.

    Closing this closes ``inner``.
    """

    def __init__(
        self,
        inner: Checkpoint,
        sources: Mapping[str, Source],
        format: str,
        notes: Iterable[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            source=inner.source,
            format=format,
            shapes={
                name: source.shape if source.take else inner.shapes[source.key]
                for name, source in sources.items()
            },
            dtypes={name: inner.dtypes[source.key] for name, source in sources.items()},
            notes=(*inner.notes, *notes),
            settings={**inner.settings, **(settings or {})},
        )
        self._inner = inner
        self.location = inner.location
        self.made_up_statistics = inner.made_up_statistics
        self._sources = dict(sources)

    def close(self) -> None:
        self._inner.close()

    def _reading_order(self, names: list[str]) -> list[str]:
        keys = dict.fromkeys(self._sources[name].key for name in names)
        place = {key: position for position, key in enumerate(self._inner._reading_order(list(keys)))}
        return sorted(names, key=lambda name: place[self._sources[name].key])

    def _read(self, name: str) -> np.ndarray:
        source = self._sources[name]
        array = self._inner._read(source.key)
        return np.array(source.take(array), order="C") if source.take else array


def without_counts(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` without the numbers that a second model in one process gets in its stem's names.

    A checkpoint that holds a first and a second stem stays as it is, and conversion rejects it.
    """
    names = {name: _COUNTED_STEM.sub(r"\1/stem/\2/", name) for name in checkpoint}
    changed = {model_name(name) for name, plain in names.items() if name != plain}
    if not changed or len(set(names.values())) != len(names):
        return checkpoint
    return Renamed(
        checkpoint,
        {plain: Source(name) for name, plain in names.items()},
        checkpoint.format,
        [f"{len(changed)} variables of the stem were saved by a second model in one process; renamed"],
    )


def without_outer_scope(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` without a scope around the whole model, such as ``model/`` in ``model/class_net/…``."""
    scope = outer_scope(checkpoint)
    sources = {name.removeprefix(scope): Source(name) for name in checkpoint}
    if not scope or len(sources) < len(checkpoint):
        return checkpoint
    note = f"the scope {shortened(scope)} before the names of all variables was left out"
    return Renamed(checkpoint, sources, checkpoint.format, [note])
