"""Converting a checkpoint, against ``import torch``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from porting.bench.measure import PACKAGES, in_turn, python, summarise
from porting.sources.open import write_synthetic


def measure_conversion(folder: Path, model: str, repeat: int) -> dict[str, Any]:
    """Whole processes, in which TensorFlow cannot be imported, as on a machine without it."""
    prefix = write_synthetic(model, folder) / "model"
    convert = (
        "import sys; sys.modules['tensorflow'] = None; "
        f"sys.argv = ['convert.py', '--ckpt', {str(prefix)!r}, '--out', {str(folder / 'w.safetensors')!r}]; "
        f"sys.path.insert(0, {str(PACKAGES)!r}); "
        "from porting.cli.main import run_command; run_command('convert')"
    )
    sides = {
        "import torch": python("-c", "import torch"),
        f"convert {model}, no TensorFlow": python("-c", convert),
    }
    return summarise(in_turn(sides, repeat), "import torch")
