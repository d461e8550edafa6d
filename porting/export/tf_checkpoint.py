"""A name-based TensorFlow V2 checkpoint with moving averages, as AutoML releases and restores it.

Its settings go beside it, in the YAML file that AutoML's ``--hparams`` takes.
"""

from __future__ import annotations

import json
from pathlib import Path

from porting.checkpoint import open_checkpoint
from porting.checkpoint.v2.writer import write_bundle
from porting.errors import CheckFailedError
from porting.export import Weights, Written
from porting.export.check import check_comes_back, rounding
from porting.hparams import read_hparams
from porting.hparams.written import hparams_yaml
from porting.reverse import reverse, with_averages
from pytorch_model.config import EfficientDetConfig
from pytorch_model.files import new_folder

NAME = "model"  # as in Google's releases
HPARAMS = "config.yaml"  # as AutoML's training calls it


def write(weights: Weights, out: Path) -> Written:
    """Write ``model.index``, ``model.data-…``, ``checkpoint`` and :data:`HPARAMS` into ``out``.

    ``out`` is a new or empty folder.
    """
    variables = reverse(weights.state_dict, weights.config)
    step = training_step(weights)
    with new_folder(out) as folder:
        write_bundle(folder / NAME, with_averages(variables, step))
        with open_checkpoint(folder) as checkpoint:
            check_comes_back(checkpoint, weights, ("raw", "EMA"))
        (folder / HPARAMS).write_text(hparams_yaml(weights.config), encoding="utf-8")
        _check_hparams(folder / HPARAMS, weights.config)
        names = sorted(path.name for path in folder.iterdir())
    return Written(
        tuple(out / name for name in names),
        (
            f"{len(variables)} variables, as many moving averages of the same values, global_step {step}",
            "read back and converted again: every tensor is equal to the given one",
            f"{HPARAMS} holds the settings that the weights do not show, for --hparams here and in AutoML",
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


def _check_hparams(path: Path, config: EfficientDetConfig) -> None:
    """Read the file back. Raises :class:`CheckFailedError` if it says another configuration."""
    overrides = read_hparams(str(path)).overrides
    for name, value in overrides.items():
        if getattr(config, name) != value:
            raise CheckFailedError(
                f"{name} is {value} after writing and reading back {path.name}, not {getattr(config, name)}; "
                "nothing was written, fix porting/hparams"
            )
