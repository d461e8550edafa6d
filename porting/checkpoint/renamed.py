"""A checkpoint under other names: its arrays, or parts of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from porting.checkpoint.base import Checkpoint
from porting.checkpoint.messages import shortened
from porting.scopes import outer_scope


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


def without_outer_scope(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` without a scope around the whole model, such as ``model/`` in ``model/class_net/…``."""
    scope = outer_scope(checkpoint)
    sources = {name.removeprefix(scope): Source(name) for name in checkpoint}
    if not scope or len(sources) < len(checkpoint):
        return checkpoint
    note = f"the scope {shortened(scope)} before the names of all variables was left out"
    return Renamed(checkpoint, sources, checkpoint.format, [note])
