"""Converting a checkpoint, against ``import torch`` and plain reads; the memory of the whole process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from porting.bench.measure import IMPORT_TORCH, command, in_turn, python, summarise, timed
from porting.bench.read import PLAIN, plain_read
from porting.scopes import EMA_SUFFIX
from porting.sources.open import write_synthetic


def measure_conversion(folder: Path, model: str, repeat: int) -> dict[str, Any]:
    """Whole processes, in which no framework can be imported; the peak is of the whole process too."""
    prefix, out = write_synthetic(model, folder) / "model", folder / "w.safetensors"
    converting = command("convert", "--ckpt", prefix, "--out", out, absent=("torch", "tensorflow"))
    convert = f"convert {model}, no framework"
    sides = {
        IMPORT_TORCH: python("-c", "import torch"),
        convert: python(*converting),
        PLAIN: timed(plain_read(prefix, EMA_SUFFIX)),
    }
    figures = summarise(in_turn(sides, repeat), IMPORT_TORCH)
    kept, peak = out.stat().st_size, _peak_of_process(converting)
    ratio = figures["ratio"]
    return figures | {
        "over_import_and_two_reads": ratio[convert] / (1 + 2 * ratio[PLAIN]),
        "megabytes_kept": kept / 1e6,
        "peak_megabytes": peak / 1e6,
        "peak_over_kept": peak / kept,
    }


def _peak_of_process(arguments: Sequence[str]) -> int:
    """The most memory that a process of Python held, in bytes.

    Between it and this process stands a small one, because Linux counts the parent's memory too.
    """
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    run = [sys.executable, "-c", code, sys.executable, *arguments]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)
