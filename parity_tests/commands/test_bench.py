"""tools/bench.py: every side is measured or says why not. No figure is judged by the clock."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from parity_tests.helpers.small_models import small
from porting.bench import infer
from porting.bench.measure import in_turn
from porting.bench.sides import DEFAULT, POSTPROCESS, SIDES, Setup, Side
from porting.bench.sides.process import Job, SideProcess
from porting.bench.sides.torchvision import batched_nms
from porting.bench.sides.worker import Worker
from porting.cli.drawing.bench import draw_networks, draw_sides
from porting.cli.main import execute
from porting.errors import ConfigError, EfficientDetError
from porting.export import Weights
from porting.parity.measure import FLOAT32_ACCUMULATED_TOLERANCE
from pytorch_model import create_model, load_model
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.weights.files import write_weights

ROW = {"side", "state", "reason", *infer.FIGURES}


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measured(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    """The figures that bench.py prints with ``--json``; every run is short and has one thread."""
    assert execute("bench", [*arguments, "--json"]) == status
    figures: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return figures


def infer_on(weights: Path, sides: str = "eager,folded", batch_sizes: str = "1") -> tuple[str, ...]:
    chosen = ("--sides", sides, "--batch-sizes", batch_sizes)
    return ("infer", "--weights", str(weights), *chosen, "--repeat", "1", "--threads", "1")


# --- infer --------------------------------------------------------------------------------------------


def check_rows(figures: dict[str, Any], names: tuple[str, ...]) -> None:
    """Every side of ``names`` has a row: measured and right, or not installed."""
    for result in figures["results"]:
        assert [row["side"] for row in result["networks"]] == list(names)
        for row in (*result["networks"], *result["postprocess"]):
            assert set(row) == ROW
            table = SIDES if row in result["networks"] else POSTPROCESS
            if table[row["side"]].missing:
                assert row["state"] == "not installed"
                assert row["reason"].startswith("pip install ")
                assert row["median_ms"] is None
                continue
            assert (row["state"], row["reason"]) == ("measured", None)
            assert 0 < row["best_ms"] <= row["median_ms"]
            assert row["first_seconds"] > 0
            if row in result["networks"]:
                assert row["relative_error"] <= FLOAT32_ACCUMULATED_TOLERANCE


def test_every_side_that_begins_fast(small_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = measured(capsys, *infer_on(small_weights, ",".join(DEFAULT), "2,1"))
    check_rows(figures, DEFAULT)
    assert [result["batch_size"] for result in figures["results"]] == [1, 2]
    assert figures["settings"]["threads"] == 1
    assert figures["settings"]["auto"] in SIDES
    assert set(figures["machine"]) >= {"cpu", "cores", "avx512", "instructions", "load", "gpu", "versions"}
    assert figures["machine"]["versions"]["torch"] == torch.__version__
    for result in figures["results"]:
        rows = {row["side"]: row for row in result["networks"]}
        assert rows[result["base"]]["ratio"] == 1
        assert result["base"] == ("eager" if SIDES["effdet"].missing else "effdet")
        fastest = rows[result["fastest"]]["median_ms"]
        assert fastest == min(row["median_ms"] for row in rows.values() if row["median_ms"])
        ours = result["postprocess"][0]
        assert ours["side"] == "ours"
        assert ours["ratio"] == ours["median_ms"] / fastest


@pytest.mark.slow
def test_every_side_that_begins_slowly(small_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = tuple(name for name in SIDES if name not in DEFAULT)
    check_rows(measured(capsys, *infer_on(small_weights, ",".join(slow))), slow)


def test_seeded_weights_and_the_size_of_images(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("porting.synthetic.CALIBRATION_IMAGES", 1)  # seeds in a fraction of the time
    arguments = ("--models", "efficientdet_lite0", "--image-size", "64", "--batch-sizes", "1")
    rest = ("--sides", "folded", "--repeat", "1", "--threads", "1")
    assert execute("bench", ["infer", *arguments, *rest]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "efficientdet-lite0, 64 × 64, batch of 1, ratio to folded" in printed
    assert "weights: seeded" in printed
    assert "postprocessing, ours: best" in printed
    assert "× the fastest network (folded)" in printed


def test_packages_that_are_missing(
    small_weights: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Side, "missing", property(lambda side: side.packages))
    assert execute("bench", [*infer_on(small_weights, "eager,openvino,effdet")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "ratio to eager" in printed
    assert "openvino: not installed: pip install 'efficientdet-porting[openvino]'" in printed
    assert "effdet: not installed: pip install effdet" in printed
    assert "postprocessing, effdet: not installed" in printed
    figures = measured(capsys, *infer_on(small_weights, "openvino"))
    assert figures["passed"]
    assert (figures["results"][0]["base"], figures["results"][0]["fastest"]) == (None, None)


def test_a_side_that_fails_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if SIDES["effdet"].missing:
        pytest.skip("needs effdet and timm")
    weights = tmp_path / "custom.safetensors"
    config = small(image_size=(64, 64))
    write_weights(weights, EfficientDet(config).state_dict(), config, {})
    result = measured(capsys, *infer_on(weights, "eager,effdet"))["results"][0]
    eager, effdet = result["networks"]
    assert (result["base"], eager["state"], effdet["state"]) == ("eager", "measured", "failed")
    assert effdet["reason"].startswith("effdet has no model with this network")
    assert (effdet["best_ms"], effdet["ratio"]) == (None, None)


def test_nothing_that_can_be_measured_is_a_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "overflow.safetensors"
    model = create_model("efficientdet-lite0", image_size=(64, 64))
    with torch.no_grad():
        model.class_net.predict.depthwise.weight.fill_(1e30)
        model.class_net.predict.pointwise.weight.fill_(1e30)  # finite; their product is not
    write_weights(weights, model.state_dict(), model.config, {})
    figures = measured(capsys, *infer_on(weights, "eager"), status=1)
    assert not figures["passed"]
    assert figures["results"][0]["networks"][0]["reason"] == "its outputs are not finite (NaN or infinity)"


def test_wrong_outputs_are_seen(small_weights: Path, tmp_path: Path) -> None:
    """The error is to the float64 outputs, image by image, and the table names a side that is far off."""
    state_dict, config = load_model(small_weights).state_dict(), load_model(small_weights).config
    files = infer._write_inputs(Weights(state_dict, config), (64, 64), [2], tmp_path)
    found = _errors(files)
    assert found < 1e-5
    with np.load(files[2]) as stored:
        changed = {key: array * (1.5 if key == "1_9" else 1) for key, array in stored.items()}
    np.savez(files[2], **changed)
    assert _errors(files) == pytest.approx(1 / 3, abs=1e-3)


def _errors(files: tuple[str, str, str]) -> float:
    side = SideProcess(Job("network", "eager", *files, (64, 64), "cpu", 1))
    return float(side.batch(2)["relative_error"])


def test_a_network_that_is_far_off_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    row = dict.fromkeys(ROW, 1.0) | {"side": "odd", "state": "measured", "relative_error": 0.3}
    result = {"model": "m", "image_size": [64, 64], "batch_size": 1, "base": "odd", "fastest": "odd"}
    machine = {"cpu": "c", "cores": 2, "avx512": False, "instructions": "AVX2", "gpu": "g", "load": 1.5}
    figures = {
        "machine": machine | {"versions": {"torch": "2"}},
        "settings": {"weights": "seeded", "auto": "odd", "repeat": 1, "threads": 2},
        "results": [result | {"networks": [row], "postprocess": []}],
    }
    draw_networks(Console(width=100, highlight=False), figures)
    printed = capsys.readouterr().out
    assert "odd is off by 3e-01: it computes something else" in printed
    assert "GPU MB" in printed
    assert "the machine was busy when this began (load 1.5)" in printed
    assert "c, 2 cores, without AVX-512 (AVX2), threads: 2, on g" in printed


def test_a_process_that_dies(small_weights: Path, tmp_path: Path) -> None:
    files = (str(small_weights), str(tmp_path / "images.npy"), str(tmp_path / "exact.npz"))
    worker = Worker(Job("network", "eager", *files, (64, 64), "cpu", 1))
    try:
        assert worker.problem is None
        worker._process.kill()
        assert math.isnan(worker.run())
        assert worker.problem is not None
        assert f"signal {signal.SIGKILL.value}" in worker.problem
        assert worker.batch(1) == {}
    finally:
        worker.close()


def test_an_interrupt_ends_every_process(small_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[Worker] = []

    class Noted(Worker):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            workers.append(self)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "Worker", Noted)
    monkeypatch.setattr(infer, "in_turn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute("bench", infer_on(small_weights, "eager"))
    assert len(workers) == 2  # the network and our postprocessing
    assert all(worker._process.poll() is not None for worker in workers)


def test_tensorflow_without_the_device(tensorflow: Any, small_weights: Path) -> None:
    from porting.bench.sides.tensorflow import make

    model = load_model(small_weights)
    weights = Weights(model.state_dict(), model.config)
    with pytest.raises(ConfigError, match="this TensorFlow cannot compute on cuda"):
        make(Setup(weights, (64, 64), torch.device("cuda"), 1, "function"))


def test_the_stand_in_suppresses_nothing() -> None:
    with pytest.raises(RuntimeError, match="torchvision is not installed"):
        batched_nms(torch.zeros(1, 4), torch.zeros(1), torch.zeros(1), 0.5)


def test_sides_run_in_turn() -> None:
    order: list[str] = []

    def side(name: str) -> float:
        order.append(name)
        return float(len(order))

    heard: list[int] = []
    seconds = in_turn(
        {name: lambda name=name: side(name) for name in "ab"},  # type: ignore[misc]
        repeat=2,
        warm_up=1,
        after_each=lambda: heard.append(len(order)),
    )
    assert "".join(order) == "ababab"
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert heard == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("infer --sides eager,effdet2", "'effdet2' is not one of all, eager, "),
        ("infer --models efficientdet-d9", "'efficientdet-d9' is not one of "),
        ("infer --batch-sizes 1,0", "'1,0' is not a list of numbers from 1"),
        ("infer --repeat 0", "--repeat is 0, must be at least 1"),
        ("infer --model efficientdet-d0", "--model is not for infer: give --models"),
        ("eval --model efficientdet-d0", "--model is not for eval: give --weights"),
        ("infer --weights a.pth --models efficientdet-d0", "--weights says which model: leave --models out"),
        ("convert --sides eager", "--sides is for infer, not for convert"),
        ("infer --engine eager", "--engine is for eval, not for infer"),
        ("detect --threads 1", "--threads is for infer and eval, not for detect"),
        ("eval --weights a.pth", "eval needs --weights and --data"),
    ],
)
def test_bad_usage(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        execute("bench", arguments.split())
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


# --- eval ---------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images, one of which cannot be read."""
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        image.new("RGB", (80, 60), (40 * number, 0, 200)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(b"no image")
    return folder


def evaluate(weights: Path, data: Path) -> tuple[str, ...]:
    rest = ("--threads", "1", "--engine", "eager", "--batch-size", "2")
    return ("eval", "--weights", str(weights), "--data", str(data), *rest)


def test_the_parts_of_an_evaluation(
    images: Path, small_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pycocotools", reason="needs pycocotools")
    content = {
        "images": [{"id": number, "file_name": f"{number}.png"} for number in range(3)],
        "categories": [{"id": 1, "name": "person"}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0}
        ],
    }
    (images / "instances_val.json").write_text(json.dumps(content))
    figures = measured(capsys, *evaluate(small_weights, images))
    assert (figures["images"], figures["unreadable"]) == (2, 1)
    assert figures["settings"]["engine"] == "eager"
    seconds = figures["seconds"]
    assert list(seconds) == ["decode", "preprocess", "network", "postprocess", "scoring"]
    assert min(seconds.values()) > 0
    assert sum(figures["share"].values()) == pytest.approx(1)
    assert figures["wall_over_network"] == figures["wall_seconds"] / seconds["network"]
    assert figures["images_per_second"] == 2 / figures["wall_seconds"]


def test_images_alone_are_not_scored(
    images: Path, small_weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert execute("bench", evaluate(small_weights, images)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "efficientdet-lite0, 64 × 64, engine eager, batches of 2, 2 images" in printed
    assert "scoring 0.00 0 %" in printed
    assert "1 images could not be read" in printed
    assert "× the network alone" in printed


def test_data_that_cannot_be_used(images: Path, small_weights: Path, tmp_path: Path) -> None:
    with pytest.raises(EfficientDetError, match=r"--data .*nowhere is not a folder"):
        execute("bench", evaluate(small_weights, tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EfficientDetError, match="holds neither COCO annotations nor images"):
        execute("bench", evaluate(small_weights, empty))
    for number in range(2):
        (images / f"{number}.png").write_bytes(b"no image either")
    with pytest.raises(EfficientDetError, match="none of the images can be read"):
        execute("bench", evaluate(small_weights, images))


# --- detect -------------------------------------------------------------------------------------------


def test_the_parts_of_detection(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL.Image", reason="needs Pillow")
    arguments = ["detect", "--model", "efficientdet-lite0", "--repeat", "1", "--batch-size", "1"]
    figures = measured(capsys, *arguments)
    ratio = figures["ratio"]
    parts = {"decode, pillow", "normalise, resize, pad", "network", "select", "NMS"}
    assert parts <= set(ratio)
    assert ratio["network"] == 1
    assert figures["postprocessing_over_network"] == ratio["select"] + ratio["NMS"]
    assert execute("bench", arguments) == 0
    assert "× the network" in capsys.readouterr().out


def test_the_sides_of_a_conversion(capsys: pytest.CaptureFixture[str]) -> None:
    figures = measured(capsys, "convert", "--model", "efficientdet-lite0", "--repeat", "1")
    names = ("import torch", "convert efficientdet-lite0, no framework", "plain read of the same bytes")
    torch_import, convert, read = (figures["ratio"][name] for name in names)
    assert figures["over_import_and_two_reads"] == convert / (torch_import + 2 * read)
    assert figures["megabytes_kept"] == pytest.approx(13, rel=0.1)
    assert figures["peak_over_kept"] > 1
    draw_sides(Console(), figures)
    assert "× (import torch + 2 plain reads)" in capsys.readouterr().out


def test_the_sides_of_a_cold_start(capsys: pytest.CaptureFixture[str]) -> None:
    figures = measured(capsys, "cold", "--model", "efficientdet-lite0", "--repeat", "1")
    assert set(figures["ratio"]) == {
        "import torch",
        "convert --help",
        "detect in one image, efficientdet-lite0",
    }
