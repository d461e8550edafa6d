"""The process of one side: it makes the side, then runs it as often as it is told.

One line of JSON asks, one answers. The first says what to make (:class:`Job`). Then come ``{"batch": N}``,
take the first N images and run once; ``{"run": true}``, run once more; ``{"memory": true}``. An answer with
``problem`` is a sentence that says why the side cannot go on.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from porting.bench.sides import TABLES, Runner, Setup
from porting.export import Weights
from porting.parity.measure import difference
from pytorch_model.devices import use_threads
from pytorch_model.errors import Reason, first_line, one_line
from pytorch_model.weights.files import read_weights

#: A run shorter than this many seconds follows one that is not timed: other sides have used the caches.
SHORT = 0.5


@dataclass(frozen=True)
class Job:
    """``table``: one of :data:`TABLES`. ``images``: a .npy file, float32 [N, 3, H, W]. ``exact``: a .npz
    file with the float64 head outputs of some of them, ``IMAGE_OUTPUT`` → [C, h, w].
    """

    table: str
    side: str
    weights: str
    images: str
    exact: str
    image_size: tuple[int, int]
    device: str
    threads: int


class SideProcess:
    """The side in this process. The methods answer what they are named after."""

    def __init__(self, job: Job) -> None:
        self._job = job
        side = TABLES[job.table][job.side]
        use_threads(job.threads)
        self._device = torch.device(job.device)
        self._free = self._free_device_memory()
        module = importlib.import_module(f"{__package__}.{side.module}")
        for package in side.packages:
            importlib.import_module(package)
        state_dict, config, _ = read_weights(job.weights)
        floats = {key: x.float() if x.is_floating_point() else x for key, x in state_dict.items()}
        setup = Setup(Weights(floats, config), job.image_size, self._device, job.threads, side.variant)
        start = time.perf_counter()
        self._runner: Runner = module.make(setup)
        self.load_seconds = time.perf_counter() - start
        self._input: Any = None
        self._seconds = math.inf

    def batch(self, count: int) -> dict[str, Any]:
        images = np.array(np.load(self._job.images, mmap_mode="r")[:count])
        self._input = None
        gc.collect()
        self._input = self._runner.prepare(images)
        first_seconds, found = self._timed()
        error = None
        if self._runner.outputs is not None:
            error = self._relative_error(self._runner.outputs(found), count)
        return {"first_seconds": first_seconds, "relative_error": error}

    def run(self) -> dict[str, Any]:
        if self._seconds < SHORT:
            self._timed()
        return {"seconds": self._timed()[0]}

    def memory(self) -> dict[str, Any]:
        free = self._free_device_memory()
        used = None if free is None or self._free is None else (self._free - free) / 1e6
        return {"peak_megabytes": _peak_megabytes(), "device_megabytes": used}

    def _timed(self) -> tuple[float, Any]:
        if self._device.type != "cuda":
            start = time.perf_counter()
            found = self._runner.run(self._input)
            self._seconds = time.perf_counter() - start
            return self._seconds, found
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(self._device)
        begin.record()
        found = self._runner.run(self._input)
        end.record()
        torch.cuda.synchronize(self._device)
        self._seconds = begin.elapsed_time(end) / 1e3
        return self._seconds, found

    def _relative_error(self, found: list[np.ndarray], count: int) -> float:
        """The largest relative L2 of any head output to the float64 network."""
        if not all(np.isfinite(array).all() for array in found):
            raise Reason("its outputs are not finite (NaN or infinity)")
        with np.load(self._job.exact) as exact:
            chosen = sorted({int(key.split("_")[0]) for key in exact if int(key.split("_")[0]) < count})
            return max(
                difference(array[image], exact[f"{image}_{index}"]).relative
                for image in chosen
                for index, array in enumerate(found)
            )

    def _free_device_memory(self) -> int | None:
        return torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else None


def _peak_megabytes() -> float | None:
    """The most memory that this process has had, libraries included; None where that is not known.

    Linux's ``ru_maxrss`` would count the process that started this one too.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes on macOS


def main() -> None:
    """Answer until standard input ends. Ctrl-C is for the process that asks: it ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    side: SideProcess | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if side is None:
                side = SideProcess(Job(**{**asked, "image_size": tuple(asked["image_size"])}))
                content: dict[str, Any] = {"load_seconds": side.load_seconds}
            elif "batch" in asked:
                content = side.batch(asked["batch"])
            else:
                content = side.run() if "run" in asked else side.memory()
        except MemoryError:
            content = {"problem": "out of memory"}
        except Exception as error:  # PyTorch, TensorFlow and compilers raise many types
            content = {"problem": one_line(first_line(error))}
        print(json.dumps(content), file=answers, flush=True)
