"""The first answer of a command, from the start of Python, against ``import torch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from porting.bench.detect import photographs
from porting.bench.measure import IMPORT_TORCH, command, in_turn, python, summarise
from pytorch_model import create_model
from pytorch_model.weights.files import write_weights


def measure_first_answer(folder: Path, model: str, repeat: int) -> dict[str, Any]:
    """Whole processes. The cache of files is warm: a first run of each side is not counted."""
    network, weights = create_model(model), folder / "w.safetensors"
    write_weights(weights, network.state_dict(), network.config, {})
    (photograph,) = photographs(folder, 1)
    detect = command("detect", "--weights", weights, "--images", photograph, "--out", folder / "found")
    sides = {
        IMPORT_TORCH: python("-c", "import torch"),
        "convert --help": python(*command("convert", "--help")),
        f"detect in one image, {model}": python(*detect),
    }
    return summarise(in_turn(sides, repeat, warm_up=1), IMPORT_TORCH)
