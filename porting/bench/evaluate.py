"""An evaluation: what its parts take one after the other, and what the whole pipeline takes."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from porting.bench.machine import describe_machine
from porting.errors import EfficientDetError
from pytorch_model import load_model
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.preprocess import DecodedImage, ImageError
from pytorch_model.detection.results import Result, to_results
from pytorch_model.detection.run import SILENT, SUFFIXES, Listener
from pytorch_model.devices import choose_device, use_threads
from pytorch_model.engines.choose import EngineOf
from pytorch_model.evaluation.classes import class_to_category
from pytorch_model.evaluation.dataset import Dataset, DatasetImage, read_dataset
from pytorch_model.evaluation.figures import evaluate
from pytorch_model.evaluation.run import EvaluationOptions, evaluate_dataset
from pytorch_model.files import save_json

PARTS = ("decode", "preprocess", "network", "postprocess", "scoring")

T = TypeVar("T")


@dataclass(frozen=True)
class EvalPlan:
    """``data``: a folder with COCO annotations and images, or with images only, which are not scored."""

    weights: Path
    data: Path
    limit: int | None
    batch_size: int
    device: str
    engine: str
    threads: int | None


def measure_evaluation(plan: EvalPlan, folder: Path, listener: Listener = SILENT) -> dict[str, Any]:
    """The seconds of each part, one after the other in this process, then those of the pipeline.

    ``listener`` hears how many images are done, each of them twice. ``folder`` receives the pipeline's results.
    Raises :class:`EfficientDetError` if weights, data or device cannot be used.
    """
    device = choose_device(plan.device)
    use_threads(plan.threads)
    machine = describe_machine(device)
    detector = Detector(load_model(plan.weights).to(device), engine=plan.engine)
    config = detector.model.config
    dataset = _dataset(plan.data, config.num_classes, plan.limit, folder)
    categories = class_to_category(dataset, config.num_classes, None, config.class_names)
    total = 2 * len(dataset.images)
    parts = _Parts(detector, categories)
    parts.warm_up(dataset.images[: plan.batch_size])
    for batch in _batches(dataset.images, plan.batch_size):
        parts.detect(batch)
        listener.progress(parts.images + parts.unreadable, total)
    if dataset.has_ground_truth:
        parts.timed("scoring", lambda: evaluate(dataset.content, parts.rows, parts.ids))
    options = EvaluationOptions(plan.weights, folder / "evaluation", plan.batch_size)
    start = time.perf_counter()
    evaluate_dataset(detector, dataset, categories, options, listener=_After(listener, total))
    wall = time.perf_counter() - start
    seconds = {name: parts.seconds[name] for name in PARTS}
    return {
        "machine": machine,
        "settings": {
            "model": config.name,
            "weights": str(plan.weights),
            "image_size": list(detector.image_size),
            "device": str(device),
            "engine": detector.engine,
            "threads": torch.get_num_threads(),
            "batch_size": plan.batch_size,
        },
        "images": parts.images,
        "unreadable": parts.unreadable,
        "seconds": seconds,
        "share": {name: value / sum(seconds.values()) for name, value in seconds.items()},
        "wall_seconds": wall,
        "images_per_second": parts.images / wall,
        "wall_over_network": wall / seconds["network"],
    }


class _Parts:
    """Runs the parts in turn and adds up their ``seconds``. ``rows``: the detections, for COCO's figures."""

    def __init__(self, detector: Detector, categories: dict[int, int]) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.rows: list[Result] = []
        self.ids: list[Any] = []
        self.images = self.unreadable = 0
        self._detector, self._categories = detector, categories
        model = detector.model
        size = model.config.resizer.padded(detector.image_size)
        self._network = EngineOf(detector.engine, model, size)
        self._device = next(model.parameters()).device

    def timed(self, part: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        found = work()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[part] += time.perf_counter() - start
        return found

    def warm_up(self, images: Sequence[DatasetImage]) -> None:
        """Make the engines, of the parts and of the pipeline. Nothing of it is counted."""
        self.detect(images)
        self._detector([read.pixels for read in self._decoded(images).values()])
        self.__init__(self._detector, self._categories)

    def detect(self, images: Sequence[DatasetImage]) -> None: ...
