"""Exports of the network: the outputs in effdet, ONNX Runtime and torch.export equal ours."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from parity_tests.helpers.paths import ROOT, SHARED
from parity_tests.helpers.recordings import (
    Recording,
    golden_recording,
    images_of,
    shared_recording,
    weights_of,
)
from parity_tests.helpers.small_models import small
from porting.checkpoint import open_checkpoint
from porting.errors import CheckFailedError, ConversionError, EfficientDetError, OutputError
from porting.export import TARGETS, Weights, effdet, network, onnx_detector, onnx_file, tf_checkpoint
from porting.hparams import read_hparams
from porting.hparams.meaning import FIELDS
from porting.hparams.written import hparams_yaml
from porting.infer import named_config
from pytorch_model.config import MODELS, EfficientDetConfig, Resizer, model_config
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.efficientdet import EfficientDet

needs_effdet = pytest.mark.skipif(
    importlib.util.find_spec("effdet") is None, reason="needs effdet and timm: see the Makefile"
)
needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="needs the extra onnx"
)

RECORDED = [
    "efficientdet-d0",
    pytest.param("efficientdet-d4", marks=pytest.mark.slow),
    pytest.param("efficientdet-d7x", marks=pytest.mark.slow),
    pytest.param("efficientdet-lite3x", marks=pytest.mark.slow),
]


def recording_of(model: str) -> Recording:
    """Google's outputs: the copy in the project, or for other models the shared recording."""
    if model in ("efficientdet-d0", "efficientdet-d7x"):
        return golden_recording(model)
    if not SHARED.is_dir():
        pytest.skip(f"the recording of {model} is not in this clone")
    return shared_recording(model, 128)


def outputs_of(weights: Weights, images: torch.Tensor) -> list[np.ndarray]:
    model = EfficientDet(weights.config).to(images.dtype).eval()
    model.load_state_dict(dict(weights.state_dict))
    with torch.no_grad():
        class_outputs, box_outputs = model(images)
    return [output.numpy() for output in class_outputs + box_outputs]


def assert_within_googles_rounding(recording: Recording, found: Sequence[np.ndarray], exact: Any) -> None:
    """``found`` (float32) is as close to float64 as Google's own float32 at the same output, times three."""
    keys = [f"{head}_outputs/{level}" for head in ("class", "box") for level in recording.config.levels]
    worst = 0.0
    for key, ours, expected in zip(keys, found, exact, strict=True):
        error = float(np.linalg.norm(ours.astype(np.float64) - expected) / np.linalg.norm(expected))
        bound = 3 * recording.google_error[key] + 1e-6
        assert error <= bound, f"{key}: relative L2 {error:.2e}, allowed {bound:.2e}"
        worst = max(worst, error / bound)
    print(f"{recording.name}: at most {worst:.2f} of what is allowed")


# --- AutoML's checkpoint ---------------------------------------------------------------------------------


CONFIGS = [
    *(model_config(name) for name in MODELS),
    model_config("efficientdet-d0", num_classes=3, image_size=(384, 640), anchor_scale=(1.0, 2, 3, 4, 5)),
    model_config(
        "efficientdet-d0",
        aspect_ratios=((1.0, 1.0), (1.4, 0.7)),
        mean_rgb=(127.5, 127.5, 127.5),
        stddev_rgb=(127.5, 127.5, 127.5),
        survival_prob=0.8,
        conv_after_downsample=True,
        class_names=("person", "", "Ampel: rot"),
        num_classes=3,
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{config.num_classes}")
def test_the_hparams_file_reads_back_to_the_same_configuration(
    tmp_path: Path, config: EfficientDetConfig
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(hparams_yaml(config), encoding="utf-8")
    read = read_hparams(str(path))
    assert model_config(read.model or "", **read.overrides) == config
    assert {field for field, _ in FIELDS.values()} == set(read.overrides)
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))  # as AutoML reads it: no tags
    assert plain.get("label_map") == ({1: "person", 3: "Ampel: rot"} if config.class_names else None)


def test_a_network_that_is_not_automls_gets_no_name(tmp_path: Path) -> None:
    config = model_config("efficientdet-d1")
    other = dataclasses.replace(config.backbone, name="other")
    values = yaml.safe_load(hparams_yaml(config.replace(name="mine", backbone=other)))
    assert {"name", "backbone_name"}.isdisjoint(values)
    assert values["fpn_cell_repeats"] == 4


def test_the_hparams_file_lies_beside_the_checkpoint(tmp_path: Path) -> None:
    weights = weights_of(golden_recording("efficientdet-lite0"))
    written = TARGETS["tf-checkpoint"].write(weights, tmp_path / "out")
    assert tmp_path / "out/config.yaml" in written.files
    with open_checkpoint(tmp_path / "out") as checkpoint:
        hparams = read_hparams(str(tmp_path / "out/config.yaml"))
        found = named_config(hparams.model or "", checkpoint.shapes, hparams.overrides)
    assert found.config == weights.config


def test_a_hparams_file_that_says_something_else_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf_checkpoint, "hparams_yaml", lambda config: "anchor_scale: 17.0")
    weights = weights_of(golden_recording("efficientdet-lite0"))
    with pytest.raises(CheckFailedError, match=r"anchor_scale is 17\.0 after writing and reading back"):
        TARGETS["tf-checkpoint"].write(weights, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- effdet ----------------------------------------------------------------------------------------------


def run_effdet(folder: Path, jobs: list[dict[str, Any]]) -> list[list[np.ndarray]]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    runner = ROOT / "parity_tests" / "helpers" / "effdet_runner.py"
    done = subprocess.run(
        [sys.executable, str(runner), str(folder / "jobs.json")],
        env={**os.environ, "PYTORCH_JIT": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = []
    for job in jobs:
        with np.load(job["out"]) as stored:
            found.append([stored[str(i)] for i in range(len(stored.files))])
    return found


def effdet_job(folder: Path, weights: Weights, images: torch.Tensor) -> dict[str, Any]:
    stem = folder / str(images.dtype).removeprefix("torch.")
    np.save(stem.with_suffix(".npy"), images.numpy())
    written = effdet.write(weights, stem.with_suffix(".pth"))
    return {
        "recipe": written.facts[:-1],
        "images": str(stem.with_suffix(".npy")),
        "out": str(stem.with_suffix(".npz")),
    }


@needs_effdet
@pytest.mark.parametrize("model", RECORDED)
def test_effdet_computes_the_same(tmp_path: Path, model: str) -> None:
    """Loaded with strict=True. Equal in float64; in float32 as close as Google's own float32."""
    recording = recording_of(model)
    images, weights = images_of(recording), weights_of(recording, "float64")
    jobs = [effdet_job(tmp_path, weights, images.double())]
    jobs.append(effdet_job(tmp_path, weights_of(recording), images.float()))
    double, single = run_effdet(tmp_path, jobs)
    exact = outputs_of(weights, images.double())
    worst = max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(double, exact, strict=True))
    print(f"{model}: float64 relative L2 {worst:.1e}")
    assert worst <= 1e-12
    assert_within_googles_rounding(recording, single, exact)


@needs_effdet
def test_effdet_with_other_classes_and_fusion_weights(tmp_path: Path) -> None:
    config = model_config(
        "efficientdet-d0", num_classes=3, num_scales=2, aspect_ratios=(1.0, 3.0), image_size=(128, 192)
    )
    torch.manual_seed(0)
    state_dict = EfficientDet(config).double().state_dict()
    for key, tensor in state_dict.items():
        if key.endswith(("weight", "weights", "running_var")):
            tensor.uniform_(0.1, 0.5)
    weights = Weights(state_dict, config)
    images = network.example_images(config).double()
    (found,) = run_effdet(tmp_path, [effdet_job(tmp_path, weights, images)])
    for ours, theirs in zip(outputs_of(weights, images), found, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=1e-10)


@pytest.mark.parametrize("model", MODELS)
def test_effdet_has_every_released_model(model: str) -> None:
    config = model_config(model, num_classes=20, aspect_ratios=(1.0,), anchor_scale=2.0)
    assert effdet.effdet_model(config) == f"tf_{model.replace('-', '_')}"
    with torch.device("meta"):
        state_dict = EfficientDet(config).state_dict()
    theirs = effdet.effdet_state_dict(Weights(state_dict, config))
    ours = [id(tensor) for tensor in state_dict.values()]
    assert sorted(ours) == sorted(id(t) for t in theirs.values() if id(t) in set(ours))


@pytest.mark.parametrize(
    "changes",
    [
        {"fpn_weight_method": "channel_fastattn"},
        {"fpn_num_filters": 72},
        {"survival_prob": 0.8},
        {"conv_after_downsample": True},
        {"act_type": "relu"},
        {"min_level": 4},
        {"backbone": model_config("efficientdet-d0").backbone.ending_at((3, 9, 15))},
    ],
)
def test_effdet_has_no_such_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = model_config("efficientdet-d0", **changes)
    with pytest.raises(ConversionError, match="effdet has no model with this network"):
        effdet.write(Weights({}, config), tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


def test_effdet_weights_that_a_disk_changed_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model_config("efficientdet-lite0")
    weights = Weights(EfficientDet(config).state_dict(), config)
    load = torch.load

    def changed(*arguments: Any, **options: Any) -> Any:
        found = load(*arguments, **options)
        found["box_net.predict.conv_pw.bias"] += 1
        return found

    monkeypatch.setattr(torch, "load", changed)
    with pytest.raises(CheckFailedError, match=r"box_net\.predict\.conv_pw\.bias differs"):
        effdet.write(weights, tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


def test_the_recipe_for_effdet_has_the_normalisation() -> None:
    """On effdet's scale, where white is 1."""
    lines = effdet.effdet_recipe(model_config("efficientdet-d0"), Path("x.pth"))
    assert "config.mean, config.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)" in lines
    lines = effdet.effdet_recipe(model_config("efficientdet-lite0", stddev_rgb=(51.0, 51, 51)), Path("x.pth"))
    assert "config.mean, config.std = (0.49803922, 0.49803922, 0.49803922), (0.2, 0.2, 0.2)" in lines


def test_effdet_lacks_a_tensor() -> None:
    config = model_config("efficientdet-d0")
    with torch.device("meta"):
        state_dict = EfficientDet(config).state_dict()
    more = {**state_dict, "backbone.stem.conv.scale": torch.ones(1)}
    with pytest.raises(ConversionError, match=r"backbone\.stem\.conv\.scale has no name in effdet"):
        effdet.effdet_state_dict(Weights(more, config))


# --- programs --------------------------------------------------------------------------------------------


@needs_onnx
@pytest.mark.parametrize("model", RECORDED)
def test_onnx_runtime_computes_the_same(tmp_path: Path, model: str) -> None:
    import onnx

    recording = recording_of(model)
    written = TARGETS["onnx"].write(weights_of(recording), tmp_path / "network.onnx")
    assert written.files == (tmp_path / "network.onnx",)
    stored = {entry.key: entry.value for entry in onnx.load(tmp_path / "network.onnx").metadata_props}
    for field in ("image_size", "mean_rgb", "stddev_rgb"):
        assert tuple(json.loads(stored[field])) == getattr(weights_of(recording).config, field)
    images = images_of(recording)
    found = onnx_file.run_onnx(tmp_path / "network.onnx", {"images": images.float()})
    exact = outputs_of(weights_of(recording, "float64"), images.double())
    assert_within_googles_rounding(recording, [output.numpy() for output in found], exact)


@needs_onnx
@pytest.mark.slow
def test_onnx_detects_the_same(tmp_path: Path) -> None:
    """The first detections, whose scores are far enough apart that their order is certain."""
    recording = golden_recording("efficientdet-d0")
    weights, nms = weights_of(recording), NMSConfig(max_output_size=8)
    onnx_detector.write(weights, tmp_path / "detector.onnx", nms)
    images = images_of(recording).float()
    images = torch.cat([images, images.flip(-1), images.flip(-2)])
    inputs = {"images": images, "image_scales": torch.linspace(1.0, 2.0, len(images))}
    model = network.loaded(weights)
    postprocessing, scales = network.Postprocessing(weights.config, nms), inputs["image_scales"]
    single = postprocessing(*network.head_outputs(model, images), scales)
    heads = network.head_outputs(model.double(), images.double())
    boxes_yxyx, scores, classes, valid_len = postprocessing.double()(*heads, scales.double())
    found = onnx_file.run_onnx(tmp_path / "detector.onnx", inputs)
    gaps = (scores[:, :-1] - scores[:, 1:]).abs().min()
    print(f"smallest gap between scores {gaps:.1e}")
    assert scores.min() > 0
    error, own = (float((other - scores).abs().max()) for other in (found[1], single[1]))
    network.require_rounding(f"scores are off by {error:.1e}", error, own)
    np.testing.assert_allclose(found[0], boxes_yxyx, atol=1e-2)
    np.testing.assert_array_equal(found[2], classes)
    np.testing.assert_array_equal(found[3], valid_len)


STRETCHED = Resizer("fixed_shape", pad_to_multiple=128)
VARYING = Resizer("keep_aspect_ratio", pad=False)


def weights_with(resizer: Resizer) -> Weights:
    torch.manual_seed(0)
    model = EfficientDet(small(resizer=resizer, anchor_stride="power_of_two", image_size=(128, 96)))
    return Weights(model.state_dict(), model.config)


@needs_onnx
@pytest.mark.slow
def test_an_onnx_detector_with_a_scale_for_each_axis(tmp_path: Path) -> None:
    """Images that are stretched have two scales; the input is larger than the image size."""
    weights, nms = weights_with(STRETCHED), NMSConfig(max_output_size=2)
    written = onnx_detector.write(weights, tmp_path / "detector.onnx", nms)
    assert "[batch, 3, 128, 128], normalised, and image_scales float32 [batch, 2] (down" in written.facts[0]
    inputs = {"images": network.example_images(weights.config, 1), "image_scales": torch.tensor([[2.0, 0.5]])}
    once = onnx_file.run_onnx(tmp_path / "detector.onnx", inputs)
    inputs["image_scales"] = torch.tensor([[4.0, 0.5]])
    again = onnx_file.run_onnx(tmp_path / "detector.onnx", inputs)
    np.testing.assert_array_equal(again[0], once[0] * np.array([2, 1, 2, 1], np.float32))


@needs_onnx
def test_an_onnx_detector_needs_one_size(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="needs one size of the network's input, but"):
        onnx_detector.write(weights_with(VARYING), tmp_path / "detector.onnx")
    assert not list(tmp_path.iterdir())


def test_exports_say_how_images_are_resized(tmp_path: Path) -> None:
    written = TARGETS["torch-export"].write(weights_with(STRETCHED), tmp_path / "network.pt2")
    assert "images float32 [batch, 3, 128, 128], normalised" in written.facts[0]
    assert written.facts[-1] == (
        "this model's images are not resized as AutoML does: stretched to the input's shape, then padded to "
        "a multiple of 128 pixels"
    )
    assert effdet.effdet_model(model_config("efficientdet-d1", resizer=STRETCHED)) == "tf_efficientdet_d1"


@pytest.mark.parametrize(
    "model", ["efficientdet-lite0", pytest.param("efficientdet-d0", marks=pytest.mark.slow)]
)
def test_torch_export_computes_the_same(tmp_path: Path, model: str) -> None:
    recording = golden_recording(model)
    weights = weights_of(recording)
    TARGETS["torch-export"].write(weights, tmp_path / "network.pt2")
    images = images_of(recording).float()
    again = torch.export.load(tmp_path / "network.pt2").module()
    with torch.no_grad():
        class_outputs, box_outputs = again(torch.cat([images, images, images]))
    found = [output.numpy()[: len(images)] for output in class_outputs + box_outputs]
    exact = outputs_of(weights_of(recording, "float64"), images.double())
    assert_within_googles_rounding(recording, found, exact)


def test_a_program_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(golden_recording("efficientdet-lite0"))
    load = torch.export.load

    def changed(path: Path) -> Any:
        program = load(path)
        with torch.no_grad():
            program.state_dict["box_net.predict.pointwise.bias"] += 1
        return program

    monkeypatch.setattr(torch.export, "load", changed)
    with pytest.raises(CheckFailedError, match="the exported program's box_p3 is off by"):
        TARGETS["torch-export"].write(weights, tmp_path / "network.pt2")
    assert not list(tmp_path.iterdir())


def test_nan_is_not_taken_for_rounding() -> None:
    """Errors are infinite if a value is NaN, also that of PyTorch's own float32."""
    with pytest.raises(
        CheckFailedError, match="the exported program's box_p3 is off, PyTorch's float32 by inf"
    ):
        network.require_rounding("box_p3 is off", math.inf, math.inf)


@pytest.mark.parametrize("target", ["effdet", "onnx", "onnx-detector", "torch-export"])
def test_names_of_files(tmp_path: Path, target: str) -> None:
    with pytest.raises(EfficientDetError, match=r"use a name that ends in \.(onnx|pt2|pth)"):
        TARGETS[target].write(Weights({}, model_config("efficientdet-d0")), tmp_path / "network.bin")


@needs_onnx
def test_an_exporter_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.4's exporter fails, because it does not take dynamic shapes."""
    monkeypatch.setattr(torch.onnx, "export", lambda module, arguments, dynamo: None)
    model = EfficientDet(model_config("efficientdet-lite0").replace(image_size=(64, 64)))
    message = r"cannot write an ONNX file: the ONNX exporter of PyTorch .* fails \(TypeError\); take a newer"
    with pytest.raises(OutputError, match=message):
        TARGETS["onnx-detector"].write(Weights(model.state_dict(), model.config), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("target", "missing"), [("onnx", "onnxruntime"), ("onnx-detector", "onnxscript")])
def test_onnx_packages_missing(
    target: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == missing else find(name, *more)
    )
    message = rf"ONNX needs {missing}: pip install 'efficientdet-porting\[onnx\]'"
    with pytest.raises(OutputError, match=message):
        TARGETS[target].write(Weights({}, model_config("efficientdet-d0")), tmp_path / "x.onnx")
