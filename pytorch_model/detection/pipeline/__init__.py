"""Images in, results out, with everything at once: decoding, network, postprocessing, each batch by batch.

Workers read images and resize them; the network runs in the caller's thread; one thread behind it selects,
suppresses and does what the caller wants of each image. Results, errors and their order are those of doing
everything in turn, whatever the number of workers. What waits is bounded, so memory does not grow with the
number of images. Evaluation, folders of images and videos all go through here.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from pytorch_model.detection.detector import Detector, HeadOutputs
from pytorch_model.detection.pipeline.threads import ahead, behind
from pytorch_model.detection.preprocess import DecodedImage, ImageError, NetworkInput, stacked
from pytorch_model.detection.settings import MOST_WORKERS
from pytorch_model.devices import default_workers
from pytorch_model.engines import ENGINES, GPU_BATCH
from pytorch_model.engines.choose import Network
from pytorch_model.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Speed:
    """How long the parts took, in seconds, and how many images were read.

    ``decode``: reading, decoding and resizing, summed over the workers. ``network``: from a batch of images
    to the head outputs; a GPU works on after that, which ``postprocessing`` waits for. ``output``: what the
    caller makes of each image, such as a drawing. With workers the parts overlap, so ``wall``, the time from
    the first to the last, is less than their sum.
    """

    images: int = 0
    decode: float = 0.0
    network: float = 0.0
    postprocessing: float = 0.0
    output: float = 0.0
    wall: float = 0.0

    @property
    def images_per_second(self) -> float:
        return self.images / self.wall if self.wall else 0.0

    def content(self) -> dict[str, Any]:
        """The JSON object."""
        seconds = {key: value for key, value in asdict(self).items() if key != "images"}
        return {"images": self.images, "images_per_second": self.images_per_second, "seconds": seconds}


@dataclass(frozen=True)
class Finished(Generic[T, R]):
    """One batch. ``count``: its images, read or not. ``found``: for each network, what ``finish`` returned
    for each image that was read. ``unreadable``: the other images, and why."""

    count: int
    found: list[list[R]]
    unreadable: list[tuple[T, str]]


@dataclass(frozen=True)
class _Read(Generic[T]):
    """``image``: None if the image cannot be read, then ``problem`` says why. ``input``: None on a GPU."""

    item: T
    image: DecodedImage | None = None
    input: NetworkInput | None = None
    problem: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class _Computed(Generic[T]):
    """``outputs``: for each network, of each batch of one size."""

    reads: Sequence[_Read[T]]
    outputs: list[list[HeadOutputs]]


class Pipeline:
    """A detector and how to feed it; ``speed`` grows with each run.

    ``workers``: threads that read images; 0 does everything in turn; by default :func:`default_workers`.
    ``batch_size``: by default what is fastest per image. Raises :class:`ConfigError` for other numbers.
    """

    def __init__(
        self, detector: Detector, *, batch_size: int | None = None, workers: int | None = None
    ) -> None:
        self.detector = detector
        self.batch_size = default_batch_size(detector) if batch_size is None else batch_size
        self.workers = default_workers() if workers is None else workers
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}, must be at least 1")
        if not 0 <= self.workers <= MOST_WORKERS:
            raise ConfigError(f"workers is {self.workers}, must be from 0 to {MOST_WORKERS}")
        self.speed = Speed()
        self._stopped = threading.Event()

    def run(
        self,
        items: Iterable[T],
        load: Callable[[T], DecodedImage],
        finish: Callable[[T, DecodedImage, dict[str, Tensor]], R],
        networks: Iterable[tuple[int, Sequence[Network | None]]] | None = None,
    ) -> Generator[Finished[T, R], None, None]:
        """Detect in each of ``items``, batch by batch.

        ``load`` reads an item, in any thread; an :class:`ImageError` leaves the image out. ``finish`` gets
        the item, its image and all its detections on the CPU, in order, always in one thread at a time.
        ``networks``: for each batch the number of items, and what to run instead of the model where it is not
        None; by default the model on ``batch_size`` items. Close the iterator to end the threads.
        """
        plan = itertools.repeat((self.batch_size, (None,))) if networks is None else iter(networks)
        begun = time.perf_counter() - self.speed.wall
        self._stopped.clear()
        reads = ahead(
            lambda item: self._read(item, load), items, self.workers, self.batch_size + self.workers
        )
        computed = self._computed(reads, plan)
        finished = behind(
            lambda batch: self._finished(batch, finish), computed, self.workers > 0, self._stopped.set
        )
        with closing(reads), closing(finished):
            for batch, (decode, postprocessing, output) in finished:
                self.speed.images += len(batch.found[0])
                self.speed.decode += decode
                self.speed.postprocessing += postprocessing
                self.speed.output += output
                self.speed.wall = time.perf_counter() - begun
                yield batch

    def _read(self, item: T, load: Callable[[T], DecodedImage]) -> _Read[T]:
        """In a worker. An image for a GPU is put into pinned memory, and resized there."""
        start = time.perf_counter()
        try:
            image, device = load(item), self.detector.device.type
            if device == "cuda":
                image = image._replace(pixels=image.pixels.pin_memory())
            made = self.detector.prepare(image) if device == "cpu" else None
        except ImageError as error:
            return _Read(item, problem=str(error), seconds=time.perf_counter() - start)
        return _Read(item, image, made, seconds=time.perf_counter() - start)

    def _computed(
        self, reads: Iterator[_Read[T]], plan: Iterator[tuple[int, Sequence[Network | None]]]
    ) -> Iterator[_Computed[T]]:
        """In the caller's thread."""
        for count, networks in plan:
            batch = list(itertools.islice(reads, count))
            if not batch:
                return
            yield self._compute(batch, networks)

    def _compute(self, reads: Sequence[_Read[T]], networks: Sequence[Network | None]) -> _Computed[T]:
        """The network's input is let go here: postprocessing does not need it."""
        start = time.perf_counter()
        inputs = stacked(
            [read.input or self.detector.prepare(read.image) for read in reads if read.image is not None]
        )
        outputs = [[self.detector.compute(each, network) for each in inputs] for network in networks]
        self.speed.network += time.perf_counter() - start
        return _Computed([replace(read, input=None) for read in reads], outputs)

    def _finished(
        self, batch: _Computed[T], finish: Callable[[T, DecodedImage, dict[str, Tensor]], R]
    ) -> tuple[Finished[T, R], tuple[float, float, float]]:
        """In the thread behind. Also the seconds of decoding, postprocessing and output."""
        start = time.perf_counter()
        detections = [
            [{key: values.cpu() for key, values in found.items()} for found in self._select(of_network)]
            for of_network in batch.outputs
        ]
        middle = time.perf_counter()
        found: list[list[R]] = [[] for _ in detections]
        read = [(each.item, each.image) for each in batch.reads if each.image is not None]
        for results, of_network in zip(found, detections, strict=True):
            for (item, image), each in zip(read, of_network, strict=True):
                if self._stopped.is_set():
                    break  # nobody waits for the results
                results.append(finish(item, image, each))
        unreadable = [(each.item, each.problem) for each in batch.reads if each.image is None]
        decode = sum(each.seconds for each in batch.reads)
        seconds = (decode, middle - start, time.perf_counter() - middle)
        return Finished(len(batch.reads), found, unreadable), seconds

    def _select(self, of_network: Iterable[HeadOutputs]) -> Iterator[dict[str, Tensor]]:
        return itertools.chain.from_iterable(map(self.detector.select, of_network))


def default_batch_size(detector: Detector) -> int:
    """What is fastest per image: on a CPU the engine says it."""
    return ENGINES[detector.engine].cpu_batch if detector.device.type == "cpu" else GPU_BATCH
