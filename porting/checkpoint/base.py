"""The common interface of all sources of weights, and the bounds that they share."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from pytorch_model.files import check_regular

STEP_VARIABLE = "global_step"

#: A bound on the memory for a list of variables (about 400 bytes each, however small the file is). D4 has
#: 2,709 with its averages.
MOST_VARIABLES = 1 << 16


#: Bytes: a tar header, the longest of the beginnings by which formats are recognised.
HEAD_SIZE = 512


def read_head(path: str | os.PathLike[str]) -> bytes:
    """The first 512 bytes of a file; empty for a folder and for a file that cannot be read."""
    try:
        check_regular(path)  # reading a pipe might wait for ever
        with open(path, "rb") as file:
            return file.read(HEAD_SIZE)
    except (OSError, ValueError):  # also nothing at ``path``, or an impossible name
        return b""


class Checkpoint(Mapping[str, np.ndarray], ABC):
    """A read-only mapping from variable name to array, for any file format.

    A value is read when the variable is looked up. Each lookup reads it again and returns an array that owns
    its memory. Names iterate in the order of ``shapes``. Not safe for two threads at once.

    An unknown name raises :class:`KeyError`; a variable that is damaged or of a kind that cannot be read
    raises :class:`~porting.errors.CheckpointError`.

    A subclass passes names, shapes and dtypes to ``__init__`` without reading values, and implements
    :meth:`_read`.
    """

    def __init__(
        self,
        source: str,
        format: str,
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype],
        notes: Iterable[str] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """``dtypes`` are those of the arrays that reading returns; ``object`` if it cannot be read."""
        self.source = source  # the path, in a form that the user recognises
        self.location = source  # where the file is while this is open; differs for an unpacked archive
        self.format = format  # "TensorFlow V2 checkpoint"
        self.shapes = MappingProxyType(dict(shapes))
        self.dtypes = MappingProxyType(dict(dtypes))
        self.notes = tuple(notes)  # sentences for the user about the variables
        #: Whether gamma and the moving statistics mean nothing, because batch norms were folded. The function
        #: in evaluation mode is right all the same.
        self.made_up_statistics = False
        #: Fields of ``EfficientDetConfig`` that the source holds in addition to the variables, ``endpoints``
        #: of its backbone, and ``model``, the variant that it names.
        self.settings: Mapping[str, Any] = MappingProxyType(dict(settings or {}))
        #: Field of ``settings`` → who states it, if not the file of the variables.
        self.stated_by: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def _read(self, name: str) -> np.ndarray:
        """The variable ``name``, one of ``shapes``, as a new array of its shape and dtype."""

    def add_settings(self, settings: Mapping[str, Any], witness: str, notes: Iterable[str] = ()) -> None:
        """Add what ``witness``, a file or a name, states. What was stated before stays."""
        new = {field: value for field, value in settings.items() if field not in self.settings}
        self.settings = MappingProxyType({**self.settings, **new})
        self.stated_by = MappingProxyType({**self.stated_by, **dict.fromkeys(new, witness)})
        self.notes = (*self.notes, *notes)

    def close(self) -> None:
        """Close the open files, if any. Reading afterwards raises CheckpointError."""
        return

    def read_many(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, array) for each of ``names``, in the order in which the file is read fastest."""
        wanted = list(names)
        for name in wanted:
            if name not in self.shapes:
                raise KeyError(name)
        for name in self._reading_order(wanted):
            yield name, self._read(name)

    def _reading_order(self, names: list[str]) -> list[str]:
        return names

    @cached_property
    def step(self) -> int | None:
        """The training step (variable ``global_step``); None if the checkpoint does not hold one."""
        if STEP_VARIABLE not in self or self.shapes[STEP_VARIABLE] != ():
            return None
        if not np.issubdtype(self.dtypes[STEP_VARIABLE], np.integer):
            return None
        return int(self[STEP_VARIABLE])

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own method would read the data

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.source!r}: {self.format}, {len(self)} variables>"
