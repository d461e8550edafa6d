"""The check that every export to TensorFlow must pass before its files are in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from porting.checkpoint import Checkpoint
from porting.convert import convert
from porting.errors import CheckFailedError
from porting.export import Weights


def check_comes_back(checkpoint: Checkpoint, weights: Weights, kinds: Iterable[str]) -> None:
    """Convert the written checkpoint and compare it, bit for bit in float32, with ``weights``.

    ``kinds``: which of its values to compare, ``"raw"`` and ``"EMA"``. Raises :class:`CheckFailedError`
    naming the first tensor that differs.
    """
    for kind in kinds:
        conversion = convert(checkpoint, weights.config, raw=kind == "raw")
        for key, tensor in conversion.state_dict.items():
            if tensor.is_floating_point() and not torch.equal(tensor, weights.state_dict[key].cpu().float()):
                raise CheckFailedError(
                    f"{key} differs after writing and reading back ({kind}); nothing was written, the disk "
                    "or porting/rules.py is at fault"
                )


def rounding(weights: Weights) -> Iterator[str]:
    """A sentence about weights that float32 cannot hold exactly."""
    rounded = [
        key
        for key, tensor in weights.state_dict.items()
        if tensor.dtype == torch.float64 and not torch.equal(tensor, tensor.float().double())
    ]
    if rounded:
        yield f"{len(rounded)} float64 tensors were rounded to float32, which is what AutoML keeps"
