"""Reading a checkpoint: our reader, a plain read of the same bytes, TensorFlow's reader."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from porting.bench.measure import PACKAGES, in_turn, summarise, timed
from porting.checkpoint import open_checkpoint
from porting.checkpoint.v2.index import read_index
from porting.checkpoint.v2.writer import write_bundle
from porting.scopes import EMA_SUFFIX
from porting.synthetic import synthetic_checkpoint
from pytorch_model.config import model_config

PLAIN = "plain read of the same bytes"


def plain_read(prefix: Path, suffix: str) -> Callable[[], None]:
    """Read the bytes of the variables whose names end in ``suffix``, and do nothing with them."""
    entries = read_index(f"{prefix}.index").entries
    wanted = sorted((e for name, e in entries.items() if name.endswith(suffix)), key=lambda e: e.offset)

    def read() -> None:
        with open(f"{prefix}.data-00000-of-00001", "rb", buffering=0) as file:
            for entry in wanted:
                file.seek(entry.offset)
                buffer = bytearray(entry.size)
                assert file.readinto(buffer) == entry.size

    return read


def measure_reading(folder: Path, model: str, repeat: int) -> dict[str, Any]:
    """The variables a port needs (the moving averages) out of a training checkpoint, file cache warm."""
    prefix = folder / model / "model"
    write_bundle(prefix, synthetic_checkpoint(model_config(model), momentum=True))
    entries = read_index(f"{prefix}.index").entries
    wanted = {name: entry for name, entry in entries.items() if name.endswith(EMA_SUFFIX)}

    def ours() -> int:
        with open_checkpoint(prefix) as checkpoint:
            return len(dict(checkpoint.read_many(wanted)))

    sides = {PLAIN: timed(plain_read(prefix, EMA_SUFFIX)), "ours, checksums verified": timed(ours)}
    import_seconds = None
    try:
        start = time.perf_counter()
        import tensorflow as tf

        import_seconds = time.perf_counter() - start
    except ImportError:
        pass
    else:

        def theirs() -> int:
            reader = tf.train.load_checkpoint(str(prefix))
            return len([reader.get_tensor(name) for name in wanted])

        sides["tf.train.load_checkpoint"] = timed(theirs)
    figures = summarise(in_turn(sides, repeat), PLAIN)
    size = sum(entry.size for entry in wanted.values())
    peak = _peak_memory(prefix)
    return figures | {
        "megabytes_kept": size / 1e6,
        "peak_megabytes": peak / 1e6,
        "peak_over_kept": peak / size,
        "tensorflow_import_seconds": import_seconds,
    }


def _peak_memory(prefix: Path) -> float:
    """Bytes that reading the moving averages allocates at its peak in a new process, NumPy's included."""
    code = (
        f"import sys, tracemalloc; sys.path.insert(0, {str(PACKAGES)!r})\n"
        "from porting.checkpoint import open_checkpoint\n"
        "import porting.checkpoint.v2.bundle, porting.checkpoint.v2.locate\n"
        "tracemalloc.start()\n"
        f"with open_checkpoint({str(prefix)!r}) as c:\n"
        "    kept = dict(c.read_many(n for n in c if n.endswith('/ExponentialMovingAverage')))\n"
        "print(tracemalloc.get_traced_memory()[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)
