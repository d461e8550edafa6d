"""An evaluation: what its parts take one after the other, and what the whole pipeline takes."""

from __future__ import annotations

import itertools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from porting.bench.machine import describe_machine
from porting.errors import EfficientDetError
from pytorch_model.config import EfficientDetConfig
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.preprocess import DecodedImage, ImageError
from pytorch_model.detection.results import Result, to_results
from pytorch_model.detection.run import SILENT, SUFFIXES, Listener
from pytorch_model.devices import choose_device, use_threads
from pytorch_model.efficientdet import load_model
from pytorch_model.evaluation.classes import class_to_category
from pytorch_model.evaluation.dataset import Dataset, DatasetImage, read_dataset
from pytorch_model.evaluation.figures import evaluate
from pytorch_model.evaluation.run import EvaluationOptions, evaluate_dataset
from pytorch_model.files import save_json

T = TypeVar("T")

PARTS = ("decode", "preprocess", "network", "postprocess", "scoring")


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

    ``listener`` hears how many images are done; each is done twice. ``folder`` receives the pipeline's
    results. Loading the model and making the engine are not counted. Raises :class:`EfficientDetError` if
    weights, data or device cannot be used.
    """
    device = choose_device(plan.device)
    use_threads(plan.threads)
    machine = describe_machine(device)
    detector = Detector(load_model(plan.weights).to(device), engine=plan.engine)
    config = detector.model.config
    dataset, categories = _dataset(plan, config, folder)
    parts = _Parts(detector, categories)
    parts.run(dataset.images[: plan.batch_size])  # makes the engine
    parts.forget()
    count = len(dataset.images)
    for start in range(0, count, plan.batch_size):
        parts.run(dataset.images[start : start + plan.batch_size])
        listener.progress(min(start + plan.batch_size, count), 2 * count)
    if not parts.ids:
        raise EfficientDetError(f"--data {plan.data}: none of the images can be read; give another folder")
    if dataset.has_ground_truth:
        parts.timed("scoring", lambda: evaluate(dataset.content, parts.rows, parts.ids))
    options = EvaluationOptions(plan.weights, folder / "evaluation", plan.batch_size)
    begin = time.perf_counter()
    evaluate_dataset(detector, dataset, categories, options, listener=_SecondHalf(listener))
    wall = time.perf_counter() - begin
    seconds = {part: parts.seconds[part] for part in PARTS}
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
        "images": len(parts.ids),
        "unreadable": count - len(parts.ids),
        "seconds": seconds,
        "share": {part: value / sum(seconds.values()) for part, value in seconds.items()},
        "wall_seconds": wall,
        "images_per_second": len(parts.ids) / wall,
        "wall_over_network": wall / seconds["network"],
    }


class _Parts:
    """Runs the parts in turn and adds up their ``seconds``. ``rows``: detections. ``ids``: images read."""

    def __init__(self, detector: Detector, categories: Mapping[int, int]) -> None:
        self._detector, self._categories = detector, categories
        self.forget()

    def forget(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.rows: list[Result] = []
        self.ids: list[Any] = []

    def timed(self, part: str, work: Callable[[], T]) -> T:
        start = time.perf_counter()
        found = work()
        if self._detector.device.type == "cuda":
            torch.cuda.synchronize(self._detector.device)
        self.seconds[part] += time.perf_counter() - start
        return found

    def run(self, images: Sequence[DatasetImage]) -> None:
        """All parts up to the rows of COCO's results, of one batch."""
        decoded = self.timed("decode", lambda: self._decoded(images))
        if not decoded:
            return
        pixels = [image.pixels for image in decoded.values()]
        batches = self.timed("preprocess", lambda: self._detector.batches(pixels))
        outputs = self.timed("network", lambda: [self._detector.compute(batch) for batch in batches])
        found = self.timed("postprocess", lambda: [self._detector.select(output) for output in outputs])
        for image, detections in zip(decoded, itertools.chain.from_iterable(found), strict=True):
            self.rows += to_results(image.id, detections, self._categories)
            self.ids.append(image.id)

    def _decoded(self, images: Sequence[DatasetImage]) -> dict[DatasetImage, DecodedImage]:
        decoded = {}
        for image in images:
            try:
                decoded[image] = self._detector.load(image.path)
            except ImageError:
                continue  # the pipeline skips and counts it too
        return decoded


class _SecondHalf:
    """Tells a listener that as much has been done before."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def progress(self, done: int, total: int | None) -> None:
        if total is not None:
            self._listener.progress(total + done, 2 * total)


def _dataset(plan: EvalPlan, config: EfficientDetConfig, folder: Path) -> tuple[Dataset, Mapping[int, int]]:
    """The data set, and class → category. Of images only, a list is written into ``folder``."""
    data, classes = plan.data, config.num_classes
    if not os.path.isdir(data):
        raise EfficientDetError(
            f"--data {data} is not a folder; give one with COCO annotations and images, or with images only"
        )
    if any(data.glob("*.json")) or any(data.glob("annotations/*.json")):
        dataset = read_dataset(data, limit=plan.limit)
        return dataset, class_to_category(dataset, classes, None, config.class_names)
    files = sorted(file.name for file in data.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise EfficientDetError(
            f"--data {data} holds neither COCO annotations nor images; give another folder"
        )
    listed = folder / "images.json"
    images = [{"id": number, "file_name": name} for number, name in enumerate(files, start=1)]
    categories = [{"id": number, "name": str(number)} for number in range(1, classes + 1)]
    save_json(listed, {"images": images, "categories": categories})
    dataset = read_dataset(None, annotations=listed, images=data, limit=plan.limit)
    return dataset, {category: category for category in dataset.categories}
