"""Helpers that several readers share: TensorFlow's shape message, and parts of error messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from porting.errors import CheckpointError
from pytorch_model.formats import wire
from pytorch_model.formats.wire import Data, Malformed

_MOST_DIMENSIONS = 32  # NumPy 1's limit
_LONGEST_SHOWN = 200  # characters of a name. AutoML's reach about 100; those of damaged files have no limit


def parse_shape(message: Data) -> tuple[int, ...]:
    """A ``TensorShapeProto``. Raises :class:`Malformed`, also if a dimension or the rank is unknown."""
    shape: list[int] = []
    for number, _, value in wire.read_fields(message):
        if number == 2:
            length = 0
            for inner, _, dimension in wire.read_fields(wire.expect_bytes(number, value)):
                if inner == 1:
                    length = wire.expect_int(inner, dimension)
            if length < 0:
                raise Malformed(f"dimension {len(shape)} is {length}")
            shape.append(length)
            if len(shape) > _MOST_DIMENSIONS:
                raise Malformed(f"it has more than {_MOST_DIMENSIONS} dimensions")
        elif number == 3 and value:
            raise Malformed("its rank is unknown")
    return tuple(shape)


def shortened(text: str) -> str:
    """``text`` for an error message: its first 200 characters."""
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


#: Type → the largest relative error of rounding a weight to it (half a step of its last bit).
_ROUNDING = {"bfloat16": "2^-8 (0.4 %)", "float16": "2^-11 (0.05 %)"}


def rounding_notes(dtypes: Iterable[str]) -> list[str]:
    """A note for each short floating-point type among the stored types of variables."""
    counts = Counter(dtypes)
    return [
        f"values stored as {dtype}: {counts[dtype]} variables, rounded by up to {error} of each value when "
        "the file was written"
        for dtype, error in _ROUNDING.items()
        if counts[dtype]
    ]


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The error for a file that cannot be read."""
    return CheckpointError(
        f"{path} cannot be read: {error.strerror or error}; check the path and permissions"
    )
