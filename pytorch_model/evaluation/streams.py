"""One pass over a data set: every image through one or two networks, results kept batch by batch.

A reference gets the same input as our network, and its outputs go through the same postprocessing, so any
difference comes from the networks. The batches, and so the results, do not depend on the number of processes
or on how often the run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from pytorch_model.detection.detector import Detector
from pytorch_model.detection.pipeline import Finished, Pipeline
from pytorch_model.detection.preprocess import DecodedImage
from pytorch_model.detection.results import ImageId, Result, to_results
from pytorch_model.engines.choose import Network
from pytorch_model.evaluation.dataset import Dataset, DatasetImage, dataset_digest
from pytorch_model.evaluation.processes import Processes
from pytorch_model.evaluation.shards import Shards, damaged


@dataclass(frozen=True)
class Stream:
    """One network under evaluation. ``network`` None: the detector's own model.

    ``exact``: it computes in float32, so its detections must equal ours.
    """

    name: str
    network: Network | None
    shards: Shards
    exact: bool = True


@dataclass
class Outcome:
    """The detections: stream name → lines in COCO's results format, in the data set's order.

    ``evaluated``: the images that were read. ``unreadable``: image → why it was skipped. ``decoders``:
    decoder → how many images it read. ``resized``: images whose size differs from the annotations'.
    """

    results: dict[str, list[Result]]
    evaluated: list[ImageId] = field(default_factory=list)
    unreadable: dict[ImageId, str] = field(default_factory=dict)
    decoders: Counter[str] = field(default_factory=Counter)
    resized: list[ImageId] = field(default_factory=list)


def settings(
    detector: Detector, dataset: Dataset, batch_size: int, categories: Mapping[int, int], weights: str
) -> dict[str, Any]:
    """Everything that detections depend on. ``weights``: a digest of the network's weights."""
    return {
        "weights": weights,
        "model": detector.model.config.name,
        "config": _digest(detector.model.config.to_dict()),
        "image_size": list(detector.image_size),
        "decoder": detector.decoder,
        "tta": detector.tta,
        "engine": detector.engine,
        "precision": detector.precision,
        "nms_configs": asdict(detector.nms),
        "batch_size": batch_size,
        "device": next(detector.model.parameters()).device.type,
        "categories": {str(label): category for label, category in categories.items()},
        "pictures": dataset_digest(dataset),
    }


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def detect_dataset(
    pipeline: Pipeline,
    dataset: Dataset,
    streams: Sequence[Stream],
    categories: Mapping[int, int],
    processes: Processes,
    progress: Callable[[int, int], None],
) -> Outcome | None:
    """Detect in every image with every stream. Batches that are kept already are not computed again.

    ``progress`` gets (images done, images of this process). Returns the outcome in the first process
    and None in the others. Raises :class:`EfficientDetError`.
    """
    batch_size = pipeline.batch_size
    batches = _batches(dataset, batch_size)
    kept = [kept_batches(stream, dataset, batch_size) for stream in streams] if processes.is_first else []
    done = processes.from_first([set(batches_kept) for batches_kept in kept])
    todo = []
    for number, images in enumerate(batches):
        missing = [stream for stream, numbers in zip(streams, done, strict=True) if number not in numbers]
        if missing:
            todo.append((number, images, missing))
    todo = todo[processes.rank :: processes.count]
    finished, total = 0, sum(len(images) for _, images, _ in todo)
    progress(finished, total)
    own: dict[str, dict[int, Any]] = {stream.name: {} for stream in streams}
    with closing(_detected(pipeline, todo, categories)) as detected:
        for (number, images, missing), batch in zip(todo, detected, strict=True):
            unreadable = [(image.id, f"{image.path}: {problem}") for image, problem in batch.unreadable]
            for stream, pictures in zip(missing, batch.found, strict=True):
                content = {"pictures": pictures, "unreadable": unreadable}
                stream.shards.append(processes.rank, number, content)
                own[stream.name][number] = json.loads(json.dumps(content))  # as if read from the file
            finished += len(images)
            progress(finished, total)
    gathered = processes.to_first(own)
    if not processes.is_first:
        return None
    for stream, batches_kept in zip(streams, kept, strict=True):
        for found in gathered:
            batches_kept.update(found[stream.name])
    return _merge({stream.name: numbers for stream, numbers in zip(streams, kept, strict=True)})


def kept_batches(stream: Stream, dataset: Dataset, batch_size: int) -> dict[int, Any]:
    """Batch number → the content that an earlier run kept.

    Raises :class:`ShardError` if it belongs to another evaluation or is damaged.
    """
    kept, batches = stream.shards.read(), _batches(dataset, batch_size)
    for number, content in kept.items():
        try:
            sound = 0 <= number < len(batches) and _is_of(content, batches[number])
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise damaged(stream.shards.folder)
    return kept


def _batches(dataset: Dataset, batch_size: int) -> list[tuple[DatasetImage, ...]]:
    starts = range(0, len(dataset.images), batch_size)
    return [dataset.images[start : start + batch_size] for start in starts]


def _is_of(content: Any, images: Collection[DatasetImage]) -> bool:
    """Whether :func:`detect_dataset` can have kept ``content`` for these images. May raise if it cannot."""
    ids = [image["id"] for image in content["pictures"]] + [id_ for id_, _ in content["unreadable"]]
    rows = [row for image in content["pictures"] for row in image["detections"]]
    return (
        sorted(map(repr, ids)) == sorted(repr(image.id) for image in images)
        and all(isinstance(reason, str) for _, reason in content["unreadable"])
        and all(isinstance(image["decoder"], str) for image in content["pictures"])
        and all(isinstance(image["size_differs"], bool) for image in content["pictures"])
        and {len(row) for row in rows} <= {6}
        and {type(value) for row in rows for value in row} <= {int, float}
    )


def _detected(
    pipeline: Pipeline,
    todo: Sequence[tuple[int, Sequence[DatasetImage], Sequence[Stream]]],
    categories: Mapping[int, int],
) -> Generator[Finished[DatasetImage, dict[str, Any]], None, None]:
    """Each batch: per stream, what is kept of each image."""

    def finish(image: DatasetImage, read: DecodedImage, detections: dict[str, Tensor]) -> dict[str, Any]:
        return {
            "id": image.id,
            "decoder": read.decoder,
            "size_differs": image.size not in (None, tuple(read.pixels.shape[1:])),
            "detections": [_compact(row) for row in to_results(image.id, detections, categories)],
        }

    images = (image for _, images, _ in todo for image in images)
    networks = ((len(images), [stream.network for stream in missing]) for _, images, missing in todo)
    return pipeline.run(images, lambda image: pipeline.detector.load(image.path), finish, networks)


def _compact(row: Result) -> list[Any]:
    return [row["category_id"], *row["bbox"], row["score"]]


def _merge(kept: Mapping[str, Mapping[int, Any]]) -> Outcome:
    """Join all batches in order. Facts about images are the same in every stream; the first is used."""
    outcome = Outcome(results={name: [] for name in kept})
    for name, batches in kept.items():
        for _, content in sorted(batches.items()):
            for image in content["pictures"]:
                outcome.results[name] += [
                    {"image_id": image["id"], "category_id": category, "bbox": bbox, "score": score}
                    for category, *bbox, score in image["detections"]
                ]
    for _, content in sorted(next(iter(kept.values())).items()):
        outcome.unreadable.update(content["unreadable"])
        for image in content["pictures"]:
            outcome.evaluated.append(image["id"])
            outcome.decoders[image["decoder"]] += 1
            if image["size_differs"]:
                outcome.resized.append(image["id"])
    return outcome
