"""The networks of ours and of others side by side: time, memory, time to begin, error to float64.

Each side is a process of its own, so that no two pools of threads share one, and so that its peak memory is
its own. All sides of a model are alive at once and run in turn, one at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from porting.bench.machine import describe_machine
from porting.bench.measure import best_and_median, in_turn
from porting.bench.sides import EFFDET, POSTPROCESS, SIDES, TABLES, Side
from porting.bench.sides.process import Job
from porting.bench.sides.worker import Worker
from porting.convert import convert
from porting.export import Weights
from porting.export.network import loaded
from porting.parity.inputs import seeded_images
from porting.sources import SYNTHETIC
from porting.sources.open import open_source
from pytorch_model.config import model_config
from pytorch_model.detection.run import SILENT, Listener
from pytorch_model.devices import choose_device, use_threads
from pytorch_model.engines import AUTO, EAGER
from pytorch_model.engines.choose import chosen_engine
from pytorch_model.weights.files import read_weights, write_weights

WARM_UP = 1  # rounds before those that are kept

#: What a row holds of a side; None where it is not known or the side was not measured.
FIGURES = (
    "best_ms",
    "median_ms",
    "ratio",
    "load_seconds",
    "first_seconds",
    "peak_megabytes",
    "device_megabytes",
    "relative_error",
)


@dataclass(frozen=True)
class InferPlan:
    """What to measure. ``models``: with seeded weights; or ``weights``, a file. ``image_size``: None is the
    model's own. ``sides``: names in :data:`SIDES`. ``threads``: None is PyTorch's choice.
    """

    models: Sequence[str]
    weights: Path | None
    batch_sizes: Sequence[int]
    image_size: tuple[int, int] | None
    sides: Collection[str]
    device: str
    threads: int | None
    repeat: int


class _Progress:
    def __init__(self, listener: Listener, total: int) -> None:
        self._listener, self._done, self._total = listener, 0, total
        listener.progress(0, total)

    def step(self) -> None:
        self._done += 1
        self._listener.progress(self._done, self._total)


@dataclass(frozen=True)
class _Entry:
    """A side in the table :data:`TABLES` of that name. ``worker``: None if it is not installed."""

    table: str
    side: Side
    worker: Worker | None

    def state(self) -> dict[str, str | None]:
        if self.worker is None:
            return {"state": "not installed", "reason": f"pip install {self.side.install}"}
        problem = self.worker.problem
        return {"state": "failed" if problem else "measured", "reason": problem}


def measure_networks(plan: InferPlan, folder: Path, listener: Listener = SILENT) -> dict[str, Any]:
    """The figures of every model and batch size. ``folder`` receives weights and images.

    ``listener`` hears how many steps are done. A side that is not installed or that fails has a row that says
    so. ``passed`` is False if sides failed and none was measured. Raises :class:`EfficientDetError` if the
    weights cannot be read or the device cannot be used.
    """
    device = choose_device(plan.device)
    use_threads(plan.threads)
    machine = describe_machine(device)  # before the machine gets busy
    sources = [plan.weights] if plan.weights else plan.models
    installed = [side for _, side in _chosen(plan.sides) if not side.missing]
    steps = len(installed) * (1 + len(plan.batch_sizes) * (1 + WARM_UP + plan.repeat))
    progress = _Progress(listener, len(sources) * steps)
    results = [result for source in sources for result in _of_model(plan, source, device, folder, progress)]
    return {
        "machine": machine,
        "settings": {
            "device": str(device),
            "threads": torch.get_num_threads(),
            "weights": str(plan.weights) if plan.weights else "seeded",
            "warm_up": WARM_UP,
            "repeat": plan.repeat,
            AUTO: chosen_engine(AUTO, device),
        },
        "passed": any(result["base"] for result in results)
        or not any(row["state"] == "failed" for result in results for row in result["networks"]),
        "results": results,
    }


def _chosen(names: Collection[str]) -> list[tuple[str, Side]]:
    """The sides ``names``, and the postprocessing that belongs to them, each with the name of its table."""
    chosen = [("network", SIDES[name]) for name in names]
    modules = {side.module for _, side in chosen} | {POSTPROCESS["ours"].module}
    return chosen + [("postprocess", side) for side in POSTPROCESS.values() if side.module in modules]


def _of_model(
    plan: InferPlan, source: str | Path, device: torch.device, folder: Path, progress: _Progress
) -> Iterator[dict[str, Any]]:
    """The result of each batch size. They ascend, because a process's peak memory never falls."""
    weights = _weights(source, folder)
    config, sizes = weights.config, sorted(plan.batch_sizes)
    image_size = config.resizer.padded(plan.image_size) if plan.image_size else config.input_size
    files = _write_inputs(weights, image_size, sizes, folder)
    threads = torch.get_num_threads()
    with contextlib.ExitStack() as held:
        entries = []
        for table, side in _chosen(plan.sides):
            worker = None
            if not side.missing:
                worker = Worker(Job(table, side.name, *files, image_size, str(device), threads))
                held.callback(worker.close)
                progress.step()
            entries.append(_Entry(table, side, worker))
        for size in sizes:
            about = {"model": config.name, "image_size": list(image_size), "batch_size": size}
            yield about | _of_batch(entries, size, plan.repeat, progress)


def _weights(source: str | Path, folder: Path) -> Weights:
    """The weights in the file ``source``, or seeded ones of the model ``source``."""
    if isinstance(source, Path):
        state_dict, config, metadata = read_weights(source)
        return Weights(state_dict, config, metadata)
    with open_source(f"{SYNTHETIC}{source}", folder) as checkpoint:
        conversion = convert(checkpoint, model_config(source))
    return Weights(conversion.state_dict, conversion.config)


def _write_inputs(
    weights: Weights, image_size: tuple[int, int], sizes: Sequence[int], folder: Path
) -> tuple[str, str, str]:
    """Write the files of a :class:`Job`; the exact outputs are of the first and last image of each batch."""
    files = [str(folder / name) for name in ("bench.safetensors", "images.npy", "exact.npz")]
    model = loaded(weights)
    write_weights(Path(files[0]), model.state_dict(), weights.config, {})
    images = seeded_images(weights.config, image_size, max(sizes)).transpose(0, 3, 1, 2)
    np.save(files[1], np.ascontiguousarray(images))
    exact = {}
    double = model.double()
    for number in sorted({0, *(size - 1 for size in sizes)}):
        with torch.no_grad():
            class_outputs, box_outputs = double(torch.from_numpy(images[number : number + 1]).double())
        for index, output in enumerate((*class_outputs, *box_outputs)):
            exact[f"{number}_{index}"] = output[0].numpy()
    np.savez(files[2], **exact)
    return files[0], files[1], files[2]


def _of_batch(entries: Sequence[_Entry], size: int, repeat: int, progress: _Progress) -> dict[str, Any]:
    """``base``: the side of ratio 1. ``fastest``: the network that postprocessing is compared with."""
    begun: dict[int, dict[str, Any]] = {}
    runs: dict[int, Callable[[], float]] = {}
    for number, entry in enumerate(entries):
        if entry.worker is not None:
            begun[number] = entry.worker.batch(size)
            runs[number] = entry.worker.run
            progress.step()
    seconds = in_turn(runs, repeat, WARM_UP, progress.step)
    rows: dict[str, dict[str, dict[str, Any]]] = {table: {} for table in TABLES}
    for number, entry in enumerate(entries):
        row = {"side": entry.side.name, **dict.fromkeys(FIGURES), **entry.state()}
        if entry.worker is not None and row["state"] == "measured":
            times = best_and_median(seconds[number])
            row |= {f"{name}_ms": value * 1e3 for name, value in times.items()}
            row |= {"load_seconds": entry.worker.load_seconds} | begun[number] | entry.worker.memory()
        rows[entry.table][entry.side.name] = row
    networks, postprocess = rows["network"], rows["postprocess"]
    median = {name: row["median_ms"] for name, row in networks.items() if row["state"] == "measured"}
    base = next((name for name in (EFFDET, EAGER, *median) if name in median), None)
    fastest = min(median, key=median.__getitem__, default=None)
    for table, against in ((networks, base), (postprocess, fastest)):
        for row in table.values():
            if against is not None and row["state"] == "measured":
                row["ratio"] = row["median_ms"] / median[against]
    return {
        "base": base,
        "fastest": fastest,
        "networks": [*networks.values()],
        "postprocess": [*postprocess.values()],
    }
