"""The check that every export to TensorFlow must pass before its files are in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from porting.checkpoint import Checkpoint
from porting.convert import convert
from porting.errors import CheckFailedError
from porting.export import Weights
from pytorch_model.weights.tensors import as_array, dtype_name, is_floating


def check_comes_back(checkpoint: Checkpoint, weights: Weights, kinds: Iterable[str]) -> None:
    """Convert the written checkpoint and compare it, bit for bit in float32, with ``weights``.

    ``kinds``: which of its values to compare, ``"raw"`` and ``"EMA"``. Raises :class:`CheckFailedError`
    naming the first tensor that differs.
    """
    for kind in kinds:
        conversion = convert(checkpoint, weights.config, raw=kind == "raw")
        for key, array in conversion.arrays.items():
            given = as_array(weights.state_dict[key]).astype(np.float32)
            if is_floating(array) and not np.array_equal(array, given):
                raise CheckFailedError(
                    f"{key} differs after writing and reading back ({kind}); nothing was written, the disk "
                    "or porting/rules.py is at fault"
                )


def rounding(weights: Weights) -> Iterator[str]:
    """A sentence about weights that float32 cannot hold exactly."""
    rounded = [
        key
        for key, tensor in weights.state_dict.items()
        if dtype_name(tensor) == "float64" and not _holds(as_array(tensor))
    ]
    if rounded:
        yield f"{len(rounded)} float64 tensors were rounded to float32, which is what AutoML keeps"


def _holds(array: np.ndarray) -> bool:
    """Whether float32 holds every value of ``array``, float64, exactly."""
    with np.errstate(over="ignore"):
        return np.array_equal(array, array.astype(np.float32))
