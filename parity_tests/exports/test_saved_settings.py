"""What a SavedModel states besides its weights, and its detections against ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.helpers.exported.models import Export, save_model, served
from parity_tests.helpers.paths import TOOLS
from parity_tests.helpers.small_models import small
from porting.checkpoint import open_checkpoint
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import convert
from porting.infer import infer_config
from porting.parity.detections import compare_detections
from porting.parity.reference.exported import exported_detections
from porting.synthetic import synthetic_variables
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet

OWN = small(
    image_size=(200, 328),
    mean_rgb=(127.0,) * 3,
    stddev_rgb=(128.0,) * 3,
    anchor_scale=2.0,
    aspect_ratios=(1.0, 3.0, 0.33),
)


@pytest.fixture(scope="module")
def own(tensorflow: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SavedModel with settings of its own."""
    folder = tmp_path_factory.mktemp("own") / "export"
    save_model(tensorflow, folder, OWN, synthetic_variables(OWN, 2), Export(score_threshold=0.4))
    return folder


def inferred(folder: Path, **overrides: Any) -> tuple[EfficientDetConfig, EfficientDet]:
    with open_checkpoint(folder) as checkpoint:
        config = infer_config(checkpoint.shapes, "", overrides, checkpoint.settings).config
        return config, EfficientDet.from_state_dict(convert(checkpoint, config).state_dict, config)


def test_a_saved_models_own_settings(own: Path) -> None:
    config, model = inferred(own)
    for name in ("image_size", "mean_rgb", "stddev_rgb", "anchor_scale", "aspect_ratios", "num_scales"):
        assert getattr(config, name) == getattr(OWN, name), name
    with open_checkpoint(own) as checkpoint:
        notes = " ".join(checkpoint.notes)
    assert "image_size, mean_rgb, num_scales, stddev_rgb: read from the constants of the graph" in notes
    assert "NonMaxSuppressionV5, at most 100 boxes, IoU threshold 0.5, score threshold 0.4, sigma 0" in notes
    check = compare_detections(str(own), model)
    assert check is not None
    assert (check.passed, check.count, check.found) == (True, 100, 100)


@pytest.mark.parametrize(
    ("wrong", "probably"),
    [
        ({"anchor_scale": 4.0}, "probably anchor_scale, aspect_ratios or num_scales differ"),
        ({"aspect_ratios": (1.0, 2.0, 0.5)}, "probably anchor_scale, aspect_ratios or num_scales differ"),
        ({"mean_rgb": (124.0,) * 3}, "probably image_size, mean_rgb or stddev_rgb differ"),
        ({"image_size": (256, 256)}, "probably image_size, mean_rgb or stddev_rgb differ"),
    ],
)
def test_wrong_settings_fail(own: Path, wrong: dict[str, Any], probably: str) -> None:
    _, model = inferred(own, **wrong)
    check = compare_detections(str(own), model)
    assert check is not None
    assert not check.passed
    assert probably in check.cause


@pytest.mark.slow
@pytest.mark.parametrize(
    "export",
    [Export(joined=True), Export(per_class=True), Export(sigma=0.25)],
    ids=["joined", "per class", "soft"],
)
def test_other_suppressions(tensorflow: Any, tmp_path: Path, export: Export) -> None:
    save_model(tensorflow, tmp_path / "export", OWN, synthetic_variables(OWN, 2), export)
    _, model = inferred(tmp_path / "export")
    check = compare_detections(str(tmp_path / "export"), model)
    assert check is not None
    assert check.passed, check
    assert check.count > 50


def verify(own: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(TOOLS / "verify.py"),
        "--ckpt",
        str(own),
        "--reference",
        "savedmodel",
        "--json",
    ]
    return subprocess.run([*command, *options], capture_output=True, text=True)


def test_command_line(own: Path) -> None:
    done = verify(own)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["detections"]["passed"]
    done = verify(own, "--hparams", "anchor_scale=4")
    assert done.returncode == 1
    assert "FAILED detections" in done.stderr
    assert "probably anchor_scale, aspect_ratios or num_scales differ" in done.stderr


def test_a_damaged_graph_costs_its_settings_only(own: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(own, tmp_path / "export")
    (tmp_path / "export" / "saved_model.pb").write_bytes(b"\x12\xff")
    with open_checkpoint(tmp_path / "export") as checkpoint:
        assert "saved_model.pb cannot be read" in checkpoint.notes[-1]
        assert not checkpoint.settings


def test_a_graph_that_ends_with_the_heads_has_no_detections(tensorflow: Any, tmp_path: Path) -> None:
    module = tensorflow.Module()
    spec = tensorflow.TensorSpec([1, None, None, 3], tensorflow.uint8)
    module.serve = tensorflow.function(lambda x: {"a": tensorflow.cast(x, tensorflow.float32)}, [spec])
    tensorflow.saved_model.save(module, str(tmp_path), signatures=module.serve)
    assert exported_detections(tmp_path, (64, 64)) is None
    (tmp_path / "saved_model.pb").write_bytes(b"")
    assert exported_detections(tmp_path, (64, 64)) is None
    assert exported_detections(tmp_path / "model.meta", (64, 64)) is None


def test_googles_frozen_graph(tensorflow: Any, shared: Path) -> None:
    path = shared / "exports" / "efficientdet-d0_frozen.pb"
    config, model = inferred(path)
    assert (config.image_size, config.anchor_scale) == ((128, 256), 4.0)
    np.testing.assert_allclose(config.mean_rgb, (123.675, 116.28, 103.53))
    check = compare_detections(str(path), model)
    assert check is not None
    assert check.passed, check
    print(check)


def test_googles_tflite_file(tensorflow: Any, shared: Path) -> None:
    path = shared / "exports" / "automl_lite0_tf1_export.tflite"
    _, model = inferred(path)
    check = compare_detections(str(path), model)
    assert check is not None
    assert check.passed, check


def test_the_meta_file_of_a_checkpoint(tensorflow: Any, tmp_path: Path) -> None:
    """The graph that TensorFlow 1 saves with a checkpoint, where it holds the whole model."""
    v1 = tensorflow.compat.v1
    values = synthetic_variables(OWN, 2)
    with tensorflow.Graph().as_default() as graph:
        images = v1.placeholder(tensorflow.uint8, [1, None, None, 3])
        constants = {name: tensorflow.constant(value) for name, value in values.items()}
        served(tensorflow, OWN, constants, images, Export())
    write_bundle(tmp_path / "model", values)
    meta = v1.MetaGraphDef(graph_def=graph.as_graph_def())
    (tmp_path / "model.meta").write_bytes(meta.SerializeToString())
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.settings["image_size"] == OWN.image_size
        assert checkpoint.settings["anchor_scale"] == OWN.anchor_scale
        assert checkpoint.settings["mean_rgb"] == OWN.mean_rgb
    (tmp_path / "model.meta").write_bytes(b"not a graph")
    with open_checkpoint(tmp_path) as checkpoint:
        assert "model.meta cannot be read" in checkpoint.notes[-1]
