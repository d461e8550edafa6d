"""Everything at once gives the results, order and errors of everything in turn; bounded, and quick to end."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from parity_tests.helpers.paths import ROOT
from parity_tests.helpers.small_models import small
from pytorch_model import devices
from pytorch_model.config import EfficientDetConfig, model_config
from pytorch_model.detection import preprocess as preprocess_module
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.pipeline import Pipeline, default_batch_size
from pytorch_model.detection.pipeline.threads import ahead, behind
from pytorch_model.detection.preprocess import DecodedImage, NetworkInput
from pytorch_model.detection.resizing.host import resize_on_host
from pytorch_model.detection.resizing.tensors import normalise, resize_bilinear
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import ENGINES, GPU_BATCH
from pytorch_model.errors import ConfigError, WeightsError
from pytorch_model.evaluation.dataset import read_dataset
from pytorch_model.evaluation.processes import Processes
from pytorch_model.evaluation.shards import Shards
from pytorch_model.evaluation.streams import Outcome, Stream, detect_dataset
from pytorch_model.evaluation.streams import settings as settings_of

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [each.name for each in threading.enumerate() if each.name.startswith(("ahead", "behind"))]


# --- threads ------------------------------------------------------------------------------------------


def outcome_of(results: Iterable[Any]) -> tuple[list[Any], str]:
    """What comes, and the error at the end if there is one."""
    seen: list[Any] = []
    try:
        for result in results:
            seen.append(result)
    except ValueError as error:
        return seen, str(error)
    return seen, ""


def failing_at(place: int | None, problem: str) -> Callable[[int], int]:
    def work(item: int) -> int:
        if item == place:
            raise ValueError(f"{problem} {item}")
        return item * item

    return work


def up_to(count: int, broken: bool) -> Iterator[int]:
    yield from range(count)
    if broken:
        raise ValueError("the source broke off")


PLACE = st.one_of(st.none(), st.integers(0, 12))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 12), st.booleans(), PLACE, PLACE, st.integers(1, 5), st.integers(1, 4))
def test_threads_change_nothing(
    count: int, broken: bool, ahead_at: int | None, behind_at: int | None, workers: int, room: int
) -> None:
    """Errors of the source, of the work ahead and of the work behind come at their place."""

    def run(workers: int) -> tuple[list[Any], str]:
        reads = ahead(failing_at(ahead_at, "cannot read"), up_to(count, broken), workers, room)
        work = failing_at(behind_at, "cannot finish")
        with closing(reads), closing(behind(work, reads, workers > 0)) as results:
            return outcome_of(results)

    assert run(workers) == run(0)


def test_an_error_of_the_source_waits_for_the_results_before_it() -> None:
    assert outcome_of(behind(str, up_to(3, broken=True), True)) == (["0", "1", "2"], "the source broke off")


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_stop_when_they_are_ahead(workers: int) -> None:
    """The source is endless, and the caller slow."""
    last = -1

    def source() -> Iterator[int]:
        nonlocal last
        while True:
            last += 1
            yield last

    with closing(ahead(lambda item: item, source(), workers, room=4)) as results:
        for delivered, result in zip(range(200), results, strict=False):
            assert result == delivered
            assert last <= delivered + 4  # four wait or are worked on


def test_a_thread_that_hangs_does_not_hold_the_end() -> None:
    held, started = threading.Event(), threading.Event()

    def work(item: int) -> int:
        if item:
            started.set()
            held.wait()
        return item

    with closing(ahead(work, iter(range(9)), workers=2, room=3)) as results:
        assert next(results) == 0
        started.wait()
    held.set()  # closed while they hang; now they end
    for thread in threading.enumerate():
        if thread.name.startswith("ahead"):
            thread.join()


# --- the same results ---------------------------------------------------------------------------------

SIZES = ((60, 80), (128, 96), (33, 200), (200, 40), (5, 7))


def write_images(folder: Path, kinds: Iterable[int]) -> None:
    """A data set with an image for each of ``kinds``: the number of a size, -1 corrupt, -2 missing."""
    folder.mkdir()
    listed = []
    for number, kind in enumerate(kinds):
        name = f"{number}.{'jpg' if number % 2 else 'png'}"
        listed.append({"id": number, "file_name": name})
        if kind == -1:
            (folder / name).write_bytes(b"\xff\xd8\xff not an image")
        elif kind >= 0:
            pixels = np.random.default_rng(number).integers(0, 256, (*SIZES[kind], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
    (folder / "a.json").write_text(json.dumps({"images": listed, "categories": [{"id": 1, "name": "a"}]}))


def evaluated(detector: Detector, folder: Path, out: Path, batch_size: int, workers: int) -> Outcome:
    dataset = read_dataset(None, folder / "a.json", folder)
    own = settings_of(detector, dataset, batch_size, {1: 1}, "w")
    streams = [
        Stream("ours", None, Shards(out, "ours", own)),
        Stream("reference", mirrored(detector), Shards(out, "reference", own)),
    ]
    pipeline = Pipeline(detector, batch_size=batch_size, workers=workers)
    outcome = detect_dataset(pipeline, dataset, streams, {1: 1}, Processes(), lambda *_: None)
    assert outcome is not None
    return outcome


def mirrored(detector: Detector) -> Callable[[Tensor], Any]:
    """Another network."""
    return lambda images: detector.model(images.flip(3))


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    return Detector(EfficientDet(small(image_size=(64, 64))), engine="eager")


@settings(deadline=None, max_examples=8)
@given(
    st.lists(st.integers(-2, len(SIZES) - 1), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_any_number_of_workers_evaluates_the_same(
    detector: Detector,
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[int],
    batch_size: int,
    workers: int,
) -> None:
    folder = tmp_path_factory.mktemp("sets")
    write_images(folder / "images", kinds)
    in_turn = evaluated(detector, folder / "images", folder / "in turn", batch_size, 0)
    at_once = evaluated(detector, folder / "images", folder / "at once", batch_size, workers)
    assert at_once == in_turn
    assert list(at_once.unreadable) == [number for number, kind in enumerate(kinds) if kind < 0]
    assert at_once.evaluated == [number for number, kind in enumerate(kinds) if kind >= 0]
    for name in ("ours-0.jsonl", "reference-0.jsonl"):
        kept = (folder / "in turn" / name).read_bytes()
        assert (folder / "at once" / name).read_bytes() == kept


def test_in_turn_is_what_the_detector_finds(detector: Detector, tmp_path: Path) -> None:
    write_images(tmp_path / "images", [0, 1, 2])
    files = [tmp_path / f"images/{number}" for number in ("0.png", "1.jpg", "2.png")]
    pipeline = Pipeline(detector, batch_size=3, workers=0)
    [batch] = pipeline.run(files, detector.load, lambda item, image, found: found)
    for found, expected in zip(batch.found[0], detector(files), strict=True):
        for key, values in expected.items():
            torch.testing.assert_close(found[key], values, rtol=0, atol=0)


def test_mirror_images_are_fused_in_the_thread_behind(detector: Detector, tmp_path: Path) -> None:
    write_images(tmp_path / "images", [0, 2])
    flipping = Detector(detector.model, image_size=(64, 64), engine="eager", tta="flip")
    files = [tmp_path / "images/0.png", tmp_path / "images/1.jpg"]
    [batch] = Pipeline(flipping, batch_size=2, workers=1).run(files, flipping.load, lambda *given: given[2])
    for found, expected in zip(batch.found[0], flipping(files), strict=True):
        assert torch.equal(found["boxes"], expected["boxes"])


# --- what is refused, and what breaks -----------------------------------------------------------------


def test_numbers_that_cannot_be_used(detector: Detector) -> None:
    with pytest.raises(ConfigError, match="batch_size is 0, must be at least 1"):
        Pipeline(detector, batch_size=0)
    for workers in (-1, 257):
        with pytest.raises(ConfigError, match=f"workers is {workers}, must be from 0 to 256"):
            Pipeline(detector, workers=workers)


def pixels(shade: int = 0) -> DecodedImage:
    return DecodedImage(torch.full((3, 40, 50), shade, dtype=torch.uint8), "none")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_reaches_the_caller(detector: Detector, workers: int) -> None:
    def load(item: int) -> DecodedImage:
        if item == 4:
            raise MemoryError("of item 4")
        return pixels()

    batches = Pipeline(detector, batch_size=2, workers=workers).run(range(9), load, lambda *given: given[0])
    assert [next(batches).found, next(batches).found] == [[[0, 1]], [[2, 3]]]
    with pytest.raises(MemoryError, match="of item 4"):
        next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_network_that_breaks_loses_no_batch_before(
    detector: Detector, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    compute = Detector.compute

    def breaking(*given: Any) -> Any:
        if next(calls) == 2:
            raise WeightsError("not finite")
        return compute(*given)

    monkeypatch.setattr(Detector, "compute", breaking)
    pipeline = Pipeline(detector, batch_size=2, workers=workers)
    batches = pipeline.run(range(9), pixels, lambda *given: given[0])
    assert [next(batches).found, next(batches).found] == [[[0, 1]], [[2, 3]]]
    with pytest.raises(WeightsError, match="not finite"):
        next(batches)
    assert pipeline.speed.images == 4


def test_an_interrupted_evaluation_resumes(detector: Detector, tmp_path: Path) -> None:
    write_images(tmp_path / "images", [0, 1, -1, 2, 3, 4, 0])
    whole = evaluated(detector, tmp_path / "images", tmp_path / "whole", 2, 0)
    dataset = read_dataset(None, tmp_path / "images/a.json", tmp_path / "images")
    shards = Shards(tmp_path / "part", "ours", settings_of(detector, dataset, 2, {1: 1}, "w"))

    def interrupt(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    pipeline = Pipeline(detector, batch_size=2, workers=3)
    streams = [Stream("ours", None, shards)]
    with pytest.raises(KeyboardInterrupt):
        detect_dataset(pipeline, dataset, streams, {1: 1}, Processes(), interrupt)
    assert sorted(shards.read()) == [0, 1]
    resumed = evaluated(detector, tmp_path / "images", tmp_path / "part", 2, 3)
    assert resumed.results["ours"] == whole.results["ours"]
    assert resumed.unreadable == whole.unreadable


INTERRUPTED = """
import os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
from parity_tests.helpers.small_models import small
from porting.cli import process
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.pipeline import Pipeline
from pytorch_model.efficientdet import EfficientDet

def load(item):
    if item == 0:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    time.sleep(100_000)

def main():
    detector = Detector(EfficientDet(small()), engine="eager")
    list(Pipeline(detector, batch_size=2, workers=2).run(range(9), load, lambda *given: None))

process.run(main)
"""


def test_an_interrupt_ends_the_process_though_workers_are_busy() -> None:
    """Each of two workers would read for a day."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "error: interrupted; nothing was left half-written\n")


def test_an_interrupt_leaves_out_the_other_images_of_the_batch(detector: Detector) -> None:
    """It comes while the network computes the second batch, and the first image of the first is drawn."""
    pipeline, drawn, drawing = Pipeline(detector, batch_size=3, workers=1), list[int](), threading.Event()

    def finish(item: int, *_: object) -> None:
        drawn.append(item)
        drawing.set()
        pipeline._stopped.wait(20)

    def interrupt(_: Tensor) -> NoReturn:
        assert drawing.wait(60)
        raise KeyboardInterrupt

    pixels = torch.zeros(3, 8, 8, dtype=torch.uint8)
    runs = pipeline.run(
        range(6), lambda _: DecodedImage(pixels, "none"), finish, [(3, [None]), (3, [interrupt])]
    )
    with pytest.raises(KeyboardInterrupt), closing(runs):
        list(runs)
    assert drawn == [0]


# --- memory, and who does what ------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_memory_does_not_grow_with_the_number_of_images(
    detector: Detector, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that are read and not yet finished: no more, however many there are."""
    monkeypatch.setattr(Detector, "compute", lambda self, batch, network=None: len(batch.images))
    monkeypatch.setattr(Detector, "select", lambda self, count: [{}] * count)
    lock = threading.Lock()
    alive = most = 0

    def load(item: int) -> DecodedImage:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
        return pixels()

    def finish(*_: Any) -> None:
        nonlocal alive
        with lock:
            alive -= 1

    pipeline = Pipeline(detector, batch_size=4, workers=workers)
    assert sum(batch.count for batch in pipeline.run(range(400), load, finish)) == 400
    # Ahead, one batch and one image a worker; in the network, one batch; behind it, two.
    assert most <= (4 * 4 + workers if workers else 4)


def test_a_gpu_gets_pinned_images_from_the_callers_thread(
    detector: Detector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy is started by the thread that runs the network; a worker only pins the pixels."""
    pinned: list[str] = []
    prepared: list[tuple[str, bool]] = []

    class Pinned(Tensor):
        pass

    def pin(self: Tensor) -> Tensor:
        pinned.append(threading.current_thread().name)
        return self.as_subclass(Pinned)

    def prepare(self: Detector, image: DecodedImage) -> NetworkInput:
        prepared.append((threading.current_thread().name, isinstance(image.pixels, Pinned)))
        return NetworkInput(torch.zeros(1, 3, 64, 64), torch.ones(1, 2), ("none",))

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Detector, "prepare", prepare)
    monkeypatch.setattr(Detector, "device", torch.device("cuda"))
    pipeline = Pipeline(detector, workers=2)
    assert pipeline.batch_size == GPU_BATCH
    assert sum(batch.count for batch in pipeline.run(range(5), pixels, lambda *_: 0)) == 5
    assert len(pinned) == 5
    assert all(name.startswith("ahead") for name in pinned)
    assert prepared == [(threading.current_thread().name, True)] * 5


def test_the_engine_says_the_batch(detector: Detector) -> None:
    assert default_batch_size(detector) == ENGINES["eager"].cpu_batch == 1
    assert default_batch_size(Detector(detector.model, image_size=(64, 64), engine="folded")) == 8


@pytest.mark.parametrize(
    ("cores", "sharing", "workers"), [(1, "1", 1), (2, "1", 1), (16, "2", 4), (99, "1", 16), (8, "x", 4)]
)
def test_workers_by_default(cores: int, sharing: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", sharing)
    assert devices.default_workers() == workers


def test_the_speed_is_told_by_parts(detector: Detector) -> None:
    pipeline = Pipeline(detector, batch_size=2, workers=1)
    for _ in pipeline.run(range(5), pixels, lambda *_: None):
        pass
    content = pipeline.speed.content()
    assert content["images"] == 5
    assert content["images_per_second"] == pytest.approx(5 / content["seconds"]["wall"])
    assert set(content["seconds"]) == {"decode", "network", "postprocessing", "output", "wall"}
    assert min(content["seconds"].values()) > 0


# --- what several threads share -----------------------------------------------------------------------


def test_warnings_come_back_when_the_last_thread_has_read() -> None:
    """The first reader ends before the second, which began after it."""
    quiet = preprocess_module._Warnings()
    before = warnings.filters
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        first, second = quiet.ignored(), quiet.ignored()
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        warnings.warn("of an image", stacklevel=1)
        second.__exit__(None, None, None)
        assert heard == []
        warnings.warn("of ours", stacklevel=1)
        assert [str(each.message) for each in heard] == ["of ours"]
    assert warnings.filters is before


@settings(deadline=None, max_examples=40)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.booleans(),
    st.sampled_from(["efficientdet-d0", "efficientdet-lite0"]),
)
def test_resizing_on_the_cpu_is_resizing(
    size: tuple[int, int], target: tuple[int, int], half_pixel_centres: bool, model: str
) -> None:
    """Bit for bit."""
    config: EfficientDetConfig = model_config(model)
    given_ = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    out = np.empty((2, 3, *target), np.float32)
    resize_on_host(given_.numpy(), config, half_pixel_centres, out)
    expected = resize_bilinear(normalise(given_, config), target, half_pixel_centres)
    np.testing.assert_array_equal(out, expected.numpy())
