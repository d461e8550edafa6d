"""A name-based TensorFlow V2 checkpoint with moving averages, as AutoML releases and restores it."""

from __future__ import annotations

import json
from pathlib import Path

from porting.checkpoint import open_checkpoint
from porting.checkpoint.v2.writer import write_bundle
from porting.export import Weights, Written
from porting.export.check import check_comes_back, rounding
from porting.reverse import reverse, with_averages
from pytorch_model.files import new_folder

NAME = "model"  # as in Google's releases


def write(weights: Weights, out: Path) -> Written:
    """Write ``model.index``, ``model.data-…`` and ``checkpoint`` into ``out``, a new or empty folder."""
    variables = reverse(weights.state_dict, weights.config)
    step = training_step(weights)
    with new_folder(out) as folder:
        write_bundle(folder / NAME, with_averages(variables, step))
        with open_checkpoint(folder) as checkpoint:
            check_comes_back(checkpoint, weights, ("raw", "EMA"))
        names = sorted(path.name for path in folder.iterdir())
    return Written(
        tuple(out / name for name in names),
        (
            f"{len(variables)} variables, as many moving averages of the same values, global_step {step}",
            "read back and converted again: every tensor is equal to the given one",
            *rounding(weights),
        ),
    )


def training_step(weights: Weights) -> int:
    """The step of the checkpoint from which these weights come; 0 if their file does not say."""
    try:
        step = json.loads(weights.metadata.get("step", "0"))
    except ValueError:
        step = 0
    return step if type(step) is int and step >= 0 else 0
