"""Class names from the label map of a training run to the results: kept with the weights, used everywhere."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from parity_tests.helpers.small_models import one_of_each_layer
from porting.checkpoint.v2.writer import write_bundle
from porting.cli import process
from porting.cli.main import execute
from porting.export import TARGETS, Weights, onnx_file
from porting.publish.model_card import model_card
from porting.synthetic import synthetic_checkpoint
from pytorch_model import load_model
from pytorch_model.config import EfficientDetConfig
from pytorch_model.errors import ConfigError

NAMES = ("ant", "bee", "wasp")
YAML = "num_classes: 3\nimage_size: 160x128\nlabel_map:\n  1: ant\n  2: bee\n  3: wasp\n"


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_tool(name: str, *arguments: object, cwd: Path) -> Done:
    """The tool in this process, which saves the time to start one; what it prints is 150 columns wide."""
    out, err, status = io.StringIO(), io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setenv("COLUMNS", "150")
        try:
            process.run(lambda: execute(name, list(map(str, arguments))))
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int)
    return Done(status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, the hparams of its training, and weights ported with them."""
    folder = tmp_path_factory.mktemp("named")
    write_bundle(folder / "run" / "model", synthetic_checkpoint(one_of_each_layer()))
    (folder / "run.yaml").write_text(YAML)
    done = run_tool(
        "convert", "--ckpt", "run", "--hparams", "run.yaml", "--out", "named.safetensors", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert "ant, bee, wasp" in done.stdout
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    done = run_tool("convert", "--ckpt", "run", "--out", "plain.pth", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "plain.pth"


def photograph(folder: Path) -> Path:
    Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    (folder / "images").mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "1.png")
    return folder / "images"


def detected(folder: Path, weights: Path, *more: object) -> tuple[set[str], str]:
    """The names in the table of detections, and what the summary says about where they are from."""
    out = folder / "found"
    arguments = ("--weights", weights, "--images", photograph(folder), "--out", out, "--score-threshold", 0)
    done = run_tool("detect", *arguments, "--device", "cpu", "--json", *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    with (out / "detections.csv").open(encoding="utf-8", newline="") as file:
        names = {row["name"] for row in csv.DictReader(file)}
    source = json.loads(done.stdout)["class_names"]
    assert source in done.stderr  # the table that a person sees says it too
    return names, source


def test_the_weights_keep_the_names(folder: Path, plain: Path) -> None:
    assert load_model(folder / "named.safetensors").config.class_names == NAMES
    assert load_model(plain).config.class_names is None


def test_labels_of_a_conversion_win(folder: Path) -> None:
    (folder / "mine.txt").write_text("0 Ant\n1 Bee\n2 Wasp\n")
    more = ("--labels", "mine.txt", "--hparams", "run.yaml", "--out", "labels.pth", "--json")
    done = run_tool("convert", "--ckpt", "run", *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["class_names"] == ["Ant", "Bee", "Wasp"]
    assert load_model(folder / "labels.pth").config.class_names == ("Ant", "Bee", "Wasp")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--labels", "two.txt"), "two.txt does not fit this model: it lists 2 names, but the model has 3"),
        (("--labels", "absent.txt"), "absent.txt cannot be read"),
        (
            ("--hparams", "label_map={4:'fly'}"),
            "the label_map of --hparams does not fit this model",
        ),
        (("--hparams", "label_map={'fly':4}"), "label_map is .*'fly' is not a class id"),
    ],
)
def test_names_that_do_not_fit_are_refused(folder: Path, more: tuple[str, ...], message: str) -> None:
    (folder / "two.txt").write_text("ant\nbee\n")
    done = run_tool("convert", "--ckpt", "run", *more, "--out", "refused.pth", cwd=folder)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr
    assert not (folder / "refused.pth").exists()


def test_detect_uses_the_names_of_the_weights(folder: Path, plain: Path) -> None:
    names, source = detected(folder, folder / "named.safetensors")
    assert names <= set(NAMES)
    assert source == "kept with the weights"
    names, source = detected(folder, plain)
    assert names <= {"class 1", "class 2", "class 3"}
    assert source == "not known"


def test_what_is_given_to_detect_wins(folder: Path) -> None:
    weights = folder / "named.safetensors"
    (folder / "letters.yml").write_text("obj_list: [a, b, c]\n")
    names, source = detected(folder, weights, "--labels", "letters.yml")
    assert (names <= {"a", "b", "c"}, source) == (True, "letters.yml")
    names, source = detected(folder, weights, "--hparams", "label_map={1: x, 2: y, 3: z}")
    assert (names <= {"x", "y", "z"}, source) == (True, "the label_map of --hparams")


def test_evaluation_matches_the_names_of_the_weights(folder: Path, plain: Path) -> None:
    """The data set numbers its categories differently and has Roboflow's category 0."""
    pytest.importorskip("pycocotools", reason="needs pycocotools")
    categories = [(0, "insects"), (1, "Wasp"), (2, "ant"), (3, "bee")]
    box = {"image_id": 1, "bbox": [1, 1, 30, 30], "area": 900, "iscrowd": 0}
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": 96, "width": 128}],
        "categories": [{"id": id_, "name": name} for id_, name in categories],
        "annotations": [{"id": n, "category_id": n, **box} for n in (1, 2, 3)],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    arguments = ("--annotations", "truth.json", "--images", photograph(folder), "--device", "cpu")
    done = run_tool("eval", "--weights", "named.safetensors", *arguments, "--out", "by_name", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "category 0 (insects) has no annotations and no class: left out" in done.stdout
    settings = json.loads((folder / "by_name" / "metrics.json").read_text())["settings"]["ours"]
    assert settings["categories"] == {"1": 2, "2": 3, "3": 1}
    done = run_tool("eval", "--weights", plain, *arguments, "--out", "by_id", cwd=folder)
    assert done.returncode == 0, done.stderr
    settings = json.loads((folder / "by_id" / "metrics.json").read_text())["settings"]["ours"]
    assert settings["categories"] == {"1": 1, "2": 2, "3": 3}


def card(config: EfficientDetConfig) -> str:
    origin = dict.fromkeys(
        ("source", "source_format", "variables_sha256", "tool", "tool_version", "license"), "x"
    )
    numbers = {"parameters": 1, "automl_parameters": 1, "published_parameters_millions": None, "step": None}
    published = {"published_ap_val": None, "published_ap_test_dev": None}
    about = {
        "config": config.to_dict(),
        "metadata": {**origin, **numbers, **published, "weights": "EMA", "assumed": []},
    }
    return model_card("x", about, {"metadata": {"picture": "x"}, "runs": []}, None, {"x.pth": (1, "0")})


def test_the_model_card_names_the_classes() -> None:
    config = one_of_each_layer()
    assert "- classes: 1 ant, 3 big\\_wasp" in card(config.replace(class_names=("ant", "", "big_wasp")))
    assert "- classes: the weights hold no names; give --labels" in card(config)
    assert "- classes: the weights hold no names; COCO's, assumed for 90" in card(
        config.replace(num_classes=90)
    )


def test_the_onnx_file_names_the_classes() -> None:
    config = one_of_each_layer()
    assert "class_names" not in onnx_file.about(Weights({}, config, {"step": "3"}))
    said = onnx_file.about(Weights({}, config.replace(class_names=("ant", "", "été")), {"step": "3"}))
    assert (said["step"], said["model"], said["class_names"]) == ("3", config.name, '["ant", "", "été"]')


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs the extra onnx")
def test_an_exported_file_has_the_names(folder: Path) -> None:
    import onnx

    model = load_model(folder / "named.safetensors")
    TARGETS["onnx"].write(Weights(model.state_dict(), model.config), folder / "named.onnx")
    props = {prop.key: prop.value for prop in onnx.load(folder / "named.onnx").metadata_props}
    assert json.loads(props["class_names"]) == list(NAMES)


def test_a_release_is_named_too(folder: Path) -> None:
    pytest.importorskip("tensorflow", reason="needs TensorFlow")
    more = ("--out", "release", "--name", "bugs", "--license", "mit", "--labels", "mine.txt", "--size", "128")
    (folder / "mine.txt").write_text("Ant\nBee\nWasp\n")
    done = run_tool("release", "--ckpt", "run", *more, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "- classes: 1 Ant, 2 Bee, 3 Wasp" in (folder / "release/bugs/README.md").read_text()
    done = run_tool("release", "--verify-release", "release/bugs", "--ckpt", "run", cwd=folder)
    assert done.returncode == 0, done.stderr


def test_names_of_another_number_of_classes_are_no_configuration() -> None:
    with pytest.raises(ConfigError, match="class_names are 2, must be one for each of the 3 classes"):
        one_of_each_layer().replace(class_names=("ant", "bee"))
