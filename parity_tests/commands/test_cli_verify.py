"""tools/verify.py: right weights pass; wrong ones are found, located and explained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from parity_tests.helpers.commands import verify
from porting.checkpoint import open_checkpoint
from porting.cli.commands.verify import still_assumed
from porting.cli.main import execute
from porting.convert import convert
from porting.infer import configure
from porting.sources.open import write_synthetic
from pytorch_model.config import BN_EPSILON, model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import ENGINES, choose, eager, folded
from pytorch_model.engines.choose import Network
from pytorch_model.errors import ConfigError
from pytorch_model.weights.files import read_weights, write_weights

CONFIG = model_config("efficientdet-lite0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its port, and a port with a kernel transposed."""
    folder = tmp_path_factory.mktemp("verify")
    checkpoint = write_synthetic(CONFIG.name, folder)
    with open_checkpoint(checkpoint) as opened:
        state = convert(opened, CONFIG).state_dict
    write_weights(folder / "right.safetensors", state, CONFIG, {})
    key = "bifpn.cells.1.nodes.2.conv.pointwise.weight"
    write_weights(
        folder / "wrong.safetensors", {**state, key: state[key].transpose(0, 1).contiguous()}, CONFIG, {}
    )
    return folder


CKPT = ("--ckpt", "synthetic/efficientdet-lite0", "--size", "128")


@pytest.mark.usefixtures("tensorflow")
def test_the_right_weights_pass_and_are_reported(folder: Path) -> None:
    options = ("--report", "out", "--json", "--precision", "--engine", "folded", "--engine", "eager")
    done = verify(*CKPT, "--weights", "right.safetensors", *options, "--engine", "folded", cwd=folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["passed"]
    assert summary["float64"]["activations"] == 211
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["passed"]
    assert report["about_assumed"] == summary["about_assumed"]
    assert summary["about_assumed"].startswith(
        "proven for these assumed settings: activation relu6, no resid"
    )
    assert [row["name"] for row in report["variants"]] == [row["name"] for row in summary["variants"]]
    assert "bfloat16" in [row["name"] for row in report["variants"]]
    assert "fpn_cells/cell_2/fnode7" in (folder / "out" / "report.html").read_text()
    assert [row["name"] for row in report["engines"]] == ["folded", "eager"]
    assert report["engines"] == summary["engines"]
    first = report["engines"][0]
    assert first["passed"]
    assert all(output["reference"]["relative"] < 1e-4 for output in first["outputs"])
    assert first["detections"]["expected"] == first["reference_detections"]["expected"] == 100


@pytest.mark.usefixtures("tensorflow")
def test_a_wrong_engine_fails_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(model: EfficientDet, image_size: tuple[int, int]) -> Network:
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        state["bifpn.cells.1.nodes.2.conv.pointwise.weight"][5] *= 1.01
        return eager.make(EfficientDet.from_state_dict(state, model.config), image_size)

    monkeypatch.setattr(folded, "make", wrong)
    monkeypatch.chdir(folder)
    assert execute("verify", [*CKPT, "--engine", "folded"]) == 1
    said = capsys.readouterr().out
    assert "passed float32" in said
    assert "FAILED folded" in said


def test_an_engine_that_is_not_installed_ends_it_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    missing = dataclasses.replace(ENGINES["openvino"], packages=("not_installed_here",))
    monkeypatch.setattr(choose, "ENGINES", {**ENGINES, "openvino": missing})
    with pytest.raises(ConfigError, match="the engine openvino needs not_installed_here: pip install"):
        execute("verify", ["--ckpt", "nowhere", "--engine", "openvino"])


def test_what_was_given_when_the_weights_were_ported_is_not_assumed(folder: Path) -> None:
    with open_checkpoint(folder / "synthetic" / CONFIG.name) as checkpoint:
        inference = configure(checkpoint)
        conversion = convert(checkpoint, CONFIG)
    lines = ("activation relu6", "no residual in the heads", "pooling after resampling convolutions")
    assert still_assumed(inference, conversion, {}) == lines
    about = {"assumed": json.dumps(["image size 320×320", lines[1]])}
    assert still_assumed(inference, conversion, about) == lines[1:2]
    assert still_assumed(inference, conversion, {"assumed": "not JSON"}) == lines
    assert still_assumed(inference.confirmed(), conversion, {}) == ()


@pytest.mark.usefixtures("tensorflow")
def test_wrong_weights_are_located_and_explained(folder: Path) -> None:
    done = verify(*CKPT, "--weights", "wrong.safetensors", cwd=folder)
    assert done.returncode == 1, done.stderr
    assert (
        "first divergence: bifpn.cells.1.nodes.2 in PyTorch, fpn_cells/cell_1/fnode2 in TensorFlow"
        in done.stdout
    )
    assert "likely cause: kernel layout transposed" in done.stdout


def test_a_wrong_activation_in_the_weight_file_is_rejected(folder: Path) -> None:
    """The tensors alone cannot show it, and a reference built by the same setting would agree."""
    state, config, _ = read_weights(folder / "right.safetensors")
    other = dataclasses.replace(config, act_type="swish")
    write_weights(folder / "swish.safetensors", state, other, {})
    done = verify(*CKPT, "--weights", "swish.safetensors", cwd=folder)
    assert done.returncode == 2, done.stdout
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "act_type is swish in swish.safetensors, relu6 in" in done.stderr


@pytest.mark.usefixtures("tensorflow")
def test_differences_below_the_tolerances_are_named(folder: Path) -> None:
    state, config, _ = read_weights(folder / "right.safetensors")
    state["class_net.predict.pointwise.bias"][37] += 2e-4
    other = dataclasses.replace(config, anchor_scale=9.0)
    write_weights(folder / "off.safetensors", state, other, {})
    options = ("--size", "64", "--weights", "off.safetensors", "--json", "--report", "off")
    done = verify("--ckpt", CKPT[1], *options, cwd=folder)
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    assert not summary["passed"]
    assert summary["weights"]["verdict"] == "different"
    assert "differ in 1 of 552 tensors" in done.stderr
    assert "class_net.predict.pointwise.bias" in done.stderr
    assert "not the port of this checkpoint" in done.stderr
    report = json.loads((folder / "off" / "report.json").read_text())
    assert not report["passed"]
    assert "class_net.predict.pointwise.bias" in report["diagnosis"]
    assert all(run["passed"] for run in report["runs"])
    (note,) = summary["weights"]["notes"]
    assert note.startswith("anchor_scale is 9.0 in off.safetensors, 3.0 in")
    assert note in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt", "synthetic/efficientdet-lite0", "--size", "big"], "--size big is not a size"),
        (["--ckpt", "synthetic/efficientdet-lite0", "--device", "abacus"], "--device abacus cannot be used"),
        (["--ckpt", "nowhere"], "nowhere"),
        (["--ckpt", "synthetic/efficientdet-lite0", "--graph", "x"], "--graph is for --reference meta"),
        (["--ckpt", "synthetic/efficientdet-lite0", "--weights", "none.pth"], "no weight file at none.pth"),
    ],
    ids=str,
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, folder: Path) -> None:
    done = verify(*arguments, cwd=folder)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert message in done.stderr


def test_two_files_of_one_function_and_two_different_files(folder: Path) -> None:
    same = verify("--weights", "right.safetensors", "--against", "right.safetensors", cwd=folder)
    assert same.returncode == 0, same.stderr
    assert "same function" in same.stdout
    other = verify("--weights", "wrong.safetensors", "--against", "right.safetensors", "--json", cwd=folder)
    assert other.returncode == 1, other.stderr
    assert json.loads(other.stdout)["differing"] == ["bifpn.cells.1.nodes.2.conv.pointwise.weight"]
    against = verify("--weights", "right.safetensors", "--against", CKPT[1], cwd=folder)
    assert against.returncode == 0, against.stderr


def test_tensors_stored_differently_are_not_listed_as_different(folder: Path) -> None:
    state, config, _ = read_weights(folder / "wrong.safetensors")
    shift = torch.full_like(state["backbone.stem.bn.bias"], 0.5)
    scale = state["backbone.stem.bn.weight"] / (state["backbone.stem.bn.running_var"] + BN_EPSILON).sqrt()
    state["backbone.stem.bn.running_mean"] = state["backbone.stem.bn.running_mean"] - shift
    state["backbone.stem.bn.bias"] = state["backbone.stem.bn.bias"] - shift * scale
    write_weights(folder / "moved.safetensors", state, config, {})
    done = verify("--weights", "moved.safetensors", "--against", "right.safetensors", "--json", cwd=folder)
    assert done.returncode == 1, done.stderr
    summary = json.loads(done.stdout)
    assert summary["differing"] == ["bifpn.cells.1.nodes.2.conv.pointwise.weight"]
    moved = {"backbone.stem.bn.bias", "backbone.stem.bn.running_mean"}
    assert set(summary["stored_differently"]) == moved
    assert "backbone" not in done.stderr
    assert "2 more are stored differently" in done.stderr
