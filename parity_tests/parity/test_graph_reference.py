"""Graphs as references: Google's own, carried in goldens/, and any configuration's built here."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from parity_tests.helpers.commands import verify
from parity_tests.helpers.configs import configs
from parity_tests.helpers.paths import GOLDENS, TOOLS
from parity_tests.helpers.recordings import golden_recording, normalise
from parity_tests.helpers.small_models import built, small
from parity_tests.helpers.tflite_files import TINY, golden
from porting.checkpoint import open_checkpoint
from porting.checkpoint.tflite.checkpoint import TFLiteCheckpoint
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import apply_rules
from porting.errors import EfficientDetError
from porting.parity import ParityResult, compare
from porting.parity.reference import graph_session
from porting.parity.reference.choose import FileReference, open_reference
from porting.parity.reference.graph import open_meta, open_saved_model
from porting.parity.reference.graph_taps import find_taps
from porting.parity.reference.tflite import TFLiteReference
from porting.rules import rules, taps
from porting.scopes import EMA_SUFFIX
from porting.synthetic import synthetic_image, synthetic_variables
from pytorch_model.config import EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from tf_reference.variables import variable_shapes

pytestmark = pytest.mark.usefixtures("tensorflow")

Variables = dict[str, np.ndarray]

#: How Google's code was configured for each golden graph, see goldens/make_graphs.py.
GRAPHS: dict[str, tuple[str, dict[str, Any]]] = {
    "d0": ("efficientdet-d0", {}),
    "lite0_keras": ("efficientdet-lite0", {}),
    "d0_variants": (
        "efficientdet-d0",
        {
            "conv_after_downsample": True,
            "fpn_weight_method": "attn",
            "act_type": "hswish",
            "survival_prob": 0.8,
        },
    ),
    "d7x": ("efficientdet-d7x", {}),
}


def unpacked(name: str, folder: Path) -> Path:
    path = folder / "model.meta"
    path.write_bytes(gzip.decompress((GOLDENS / f"graph-{name}.meta.gz").read_bytes()))
    return path


def compared(
    reference: FileReference,
    config: EfficientDetConfig,
    variables: Variables,
    images: np.ndarray,
    sabotage: Callable[[EfficientDet], None] = lambda model: None,
) -> ParityResult:
    model = EfficientDet(config).eval()
    model.load_state_dict(apply_rules(rules(config), variables))
    sabotage(model)
    return compare(model, reference.on(images), images, shown=reference.taps)


@pytest.fixture
def d0(tmp_path: Path) -> tuple[Path, EfficientDetConfig, Variables, np.ndarray]:
    recording = golden_recording("efficientdet-d0")
    return unpacked("d0", tmp_path), recording.config, recording.variables(), recording.images[:1]


# --- Google's graphs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "d7x" else []) for name in GRAPHS]
)
def test_google_s_own_graph_at_every_activation(name: str, tmp_path: Path) -> None:
    model, overrides = GRAPHS[name]
    config, recording = model_config(model, **overrides), golden_recording(model)
    reference = open_meta(unpacked(name, tmp_path), config, recording.variables())
    images = recording.images[:1]
    assert reference.size == images.shape[1:3]
    result = compared(reference, config, recording.variables(), images)
    assert [tap.pair for tap in result.taps] == sorted(
        taps(config), key=[tap.pair for tap in result.taps].index
    )
    assert not result.absent
    assert result.passed, result.first_divergence
    worst = result.worst("accumulated")
    print(f"{name}: {len(result.taps)} taps, accumulated ≤ {worst.accumulated.relative:.1e}")


@pytest.mark.parametrize(
    ("parameter", "tap"),
    [
        ("backbone.blocks.7.se.reduce.bias", "efficientnet-b0/blocks_7/se"),
        ("bifpn.cells.0.nodes.4.resample.0.bn.weight", "fpn_cells/cell_0/fnode4/resample_0_1_9"),
        ("box_net.predict.pointwise.bias", "box_outputs/3"),
    ],
)
def test_a_fault_is_found_against_google_s_graph(
    d0: tuple[Path, EfficientDetConfig, Variables, np.ndarray], parameter: str, tap: str
) -> None:
    path, config, variables, images = d0

    def sabotage(model: EfficientDet) -> None:
        with torch.no_grad():
            model.get_parameter(parameter).mul_(1.01)

    result = compared(open_meta(path, config, variables), config, variables, images, sabotage)
    assert result.first_divergence is not None
    assert result.first_divergence.pair.tap == tap


def test_the_graph_computes_with_the_values_it_is_given(
    d0: tuple[Path, EfficientDetConfig, Variables, np.ndarray],
) -> None:
    """Moving averages or raw: whatever the user chose, not what the graph was saved with."""
    path, config, averages, images = d0
    raw = {name: value + np.float32(0.01) for name, value in averages.items()}
    for values in (averages, raw):
        assert compared(open_meta(path, config, values), config, values, images).passed
    assert not compared(open_meta(path, config, raw), config, averages, images).passed


def test_one_activation_at_a_time_gives_the_same(
    d0: tuple[Path, EfficientDetConfig, Variables, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many stretches the graph is run in, to bound the memory."""
    path, config, variables, images = d0
    whole = compared(open_meta(path, config, variables), config, variables, images)
    monkeypatch.setattr(graph_session, "_AT_ONCE", 200_000)
    pieces = compared(open_meta(path, config, variables), config, variables, images)
    assert pieces == whole


# --- what cannot be used --------------------------------------------------------------------------------


def test_a_training_graph_is_rejected(tmp_path: Path) -> None:
    config = model_config("efficientdet-d0")
    variables = golden_recording("efficientdet-d0").variables()
    with pytest.raises(
        EfficientDetError, match=r"is the graph of a training run .*the batch's own statistics"
    ):
        open_meta(unpacked("d0_train", tmp_path), config, variables)


def test_graphs_that_do_not_fit_are_rejected(
    d0: tuple[Path, EfficientDetConfig, Variables, np.ndarray],
) -> None:
    path, config, variables, images = d0
    with pytest.raises(EfficientDetError, match="built for images of 128×128, not 96×96; try --size 128x128"):
        open_meta(path, config, variables).on(np.zeros((1, 96, 96, 3), np.float32))
    with pytest.raises(
        EfficientDetError, match=r"none of the one convolution that reads efficientnet-b1/stem"
    ):
        open_meta(path, model_config("efficientdet-d1"), variables)
    with pytest.raises(
        EfficientDetError, match=r"reads the variable fpn_cells/.* it is another model's graph"
    ):
        open_meta(path, model_config("efficientdet-d0", max_level=8), variables)
    reference = open_meta(path, config, variables)
    reference.variables = {name: name for name in variables if name != "class_net/class-predict/bias"}
    with pytest.raises(
        EfficientDetError, match=r"does not show class_outputs/3 \(5 of 10 outputs are missing\)"
    ):
        reference.on(images)
    del variables["resample_p6/bn/gamma"]
    with pytest.raises(
        EfficientDetError, match=r"reads the variable resample_p6/bn/gamma, which the checkpoint"
    ):
        open_meta(path, config, variables)


def half(nodes: dict[str, Any]) -> None:
    nodes["efficientnet-b0/stem/conv2d/Conv2D"].attr["T"].type = 19  # DT_HALF


def channels_first(nodes: dict[str, Any]) -> None:
    nodes["efficientnet-b0/stem/conv2d/Conv2D"].attr["data_format"].s = b"NCHW"


def batch_statistics(nodes: dict[str, Any]) -> None:
    norm = nodes["efficientnet-b0/stem/tpu_batch_normalization/FusedBatchNormV3"]
    norm.input[3] = norm.input[1]


def dropped_connections(nodes: dict[str, Any]) -> None:
    nodes["efficientnet-b0/blocks_1/se/Sigmoid"].op = "RandomUniform"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (half, "does not compute in float32"),
        (channels_first, "was built for NCHW maps, which TensorFlow cannot run on a CPU"),
        (batch_statistics, r"training run \(efficientnet-b0/stem/.*/moving_mean is never read\)"),
        (dropped_connections, r"training run \(efficientnet-b0/blocks_1/se/Sigmoid draws random numbers\)"),
    ],
)
def test_other_graphs_of_the_model_are_rejected(
    tensorflow: Any,
    d0: tuple[Path, EfficientDetConfig, Variables, np.ndarray],
    change: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    path, config, variables, _ = d0
    meta = tensorflow.compat.v1.MetaGraphDef.FromString(path.read_bytes())
    change({node.name: node for node in meta.graph_def.node})
    path.write_bytes(meta.SerializeToString())
    with pytest.raises(EfficientDetError, match=message):
        open_meta(path, config, variables)


def test_saved_models_that_cannot_be_run_are_rejected(tensorflow: Any, tmp_path: Path) -> None:
    tf, config = tensorflow, small()
    (tmp_path / "saved_model.pb").write_bytes(b"")
    with pytest.raises(EfficientDetError, match=r"saved_model\.pb holds no graph; export the model again"):
        open_saved_model(tmp_path, config, {})
    module = tf.Module()
    module.held = tf.Variable(1.0)
    tf.saved_model.save(module, str(tmp_path))
    with pytest.raises(EfficientDetError, match="has no serving signature; export the model again"):
        open_saved_model(tmp_path, config, {})
    shutil.rmtree(tmp_path / "variables")
    with pytest.raises(EfficientDetError, match=r"TensorFlow cannot load .*; use --reference ops"):
        open_saved_model(tmp_path, config, {})


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x0a\xff\xff"], ids=["empty", "text", "cut"])
def test_a_file_that_is_not_a_graph_is_rejected(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.meta").write_bytes(content)
    with pytest.raises(
        EfficientDetError, match=r"model\.meta (is not a graph|has none of the one convolution)"
    ):
        open_meta(tmp_path / "model.meta", model_config("efficientdet-d0"), {})


def test_a_missing_graph_is_rejected(tmp_path: Path) -> None:
    config, values = small(), synthetic_variables(small())
    write_bundle(tmp_path / "model", values)
    with open_checkpoint(tmp_path) as checkpoint:
        for kind, message in [
            ("meta", r"there is no .*model\.meta, the graph that TensorFlow saves .* give one with --graph"),
            ("savedmodel", "is not a SavedModel .*; give the folder of one with --graph"),
            ("tflite", "is not a TFLite file; give the one to compare with by --graph"),
        ]:
            with pytest.raises(EfficientDetError, match=message):
                open_reference(kind, checkpoint, None, config, values)
        with pytest.raises(
            EfficientDetError, match=r"cannot read .*: No such file or directory; check --graph"
        ):
            open_reference("meta", checkpoint, tmp_path / "other.meta", config, values)
        with pytest.raises(EfficientDetError, match="neither the folder of a SavedModel nor a frozen"):
            open_reference("savedmodel", checkpoint, tmp_path / "x", config, values)


# --- any configuration ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=configs())
def test_taps_are_the_tensors_they_should_be(tensorflow: Any, config: EfficientDetConfig) -> None:
    values = {name: np.zeros(shape, np.float32) for name, shape in variable_shapes(config).items()}
    graph, seen = built(tensorflow, config, values)
    found = find_taps(graph, {name: name for name in values}, config)
    for name, tensor in found.items():
        assert tensor is seen[name], name
    absent = seen.keys() - found.keys()
    if config.conv_bn_act_pattern:  # a node's end cannot be identified there
        absent = {name for name in absent if not name.rpartition("/")[2].startswith("fnode")}
    if len(config.bifpn_nodes) == 2:  # two levels
        absent = {name for name in absent if not name.startswith("resample_p")}
    assert not absent


def test_absent_activations_are_counted_and_outputs_compared(tensorflow: Any, tmp_path: Path) -> None:
    config = small(conv_bn_act_pattern=True)
    values = synthetic_variables(config)
    graph, _ = built(tensorflow, config, values)
    meta = tensorflow.compat.v1.MetaGraphDef(graph_def=graph.as_graph_def())
    (tmp_path / "model.meta").write_bytes(meta.SerializeToString())
    reference = open_meta(tmp_path / "model.meta", config, values)
    images = normalise(synthetic_image(*config.image_size)[None], config)
    result = compared(reference, config, values, images)
    assert result.passed, result.first_divergence
    assert set(result.absent) == {pair.tap for pair in taps(config)} - {tap.pair.tap for tap in result.taps}
    assert result.absent
    assert all("fnode" in name for name in result.absent)
    # A figure that covers several layers is compared with the rounding of several layers.
    after_gap = [tap for tap in result.taps if tap.spans > 1]
    assert after_gap
    assert all(tap.allowed[1] == tap.allowed[0] for tap in after_gap)
    assert sum(tap.spans for tap in result.taps) == len(list(taps(config)))
    assert {tap.pair.tap for tap in result.taps if "_outputs/" in tap.pair.tap} == {
        f"{kind}_outputs/{level}" for kind in ("class", "box") for level in config.levels
    }
    print(f"{len(result.taps)} compared, {len(result.absent)} absent")


def test_the_graph_inside_an_archive(tensorflow: Any, tmp_path: Path) -> None:
    config = small()
    values = synthetic_variables(config)
    graph, _ = built(tensorflow, config, values)
    meta = tensorflow.compat.v1.MetaGraphDef(graph_def=graph.as_graph_def())
    write_bundle(tmp_path / "in" / "model", values)
    (tmp_path / "in" / "model.meta").write_bytes(meta.SerializeToString())
    archive = shutil.make_archive(str(tmp_path / "efficientdet"), "gztar", tmp_path / "in")
    images = normalise(synthetic_image(*config.image_size)[None], config)
    with open_checkpoint(archive) as checkpoint:
        reference = open_reference("meta", checkpoint, None, config, values)
    assert compared(reference, config, values, images).passed


@pytest.mark.parametrize("version", [1, 2])
def test_saved_models(tensorflow: Any, tmp_path: Path, version: int) -> None:
    """Written by TensorFlow 1's builder, and by TensorFlow 2, where the names of variables are lost."""
    from tf_reference.efficientdet import efficientdet

    tf, v1, config = tensorflow, tensorflow.compat.v1, small()
    values = synthetic_variables(config)
    values["box_net/box-0/bias"][:] = 0  # the same values as another variable
    values["class_net/class-0/bias"][:] = 0
    if version == 1:
        graph, _ = built(tf, config, values)
        with graph.as_default(), v1.Session(graph=graph) as session:
            session.run(v1.global_variables_initializer())
            builder = v1.saved_model.Builder(str(tmp_path / "export"))
            builder.add_meta_graph_and_variables(session, ["serve"])
            builder.save()
        with open_checkpoint(tmp_path / "export") as checkpoint:
            reference = open_reference("savedmodel", checkpoint, None, config, values)
    else:
        module = tf.Module()
        module.held = {name.replace("/", "|"): tf.Variable(x, name=name) for name, x in values.items()}

        def serve(images: Any) -> Any:
            tensors = {name: tf.convert_to_tensor(module.held[name.replace("/", "|")]) for name in values}
            classes, boxes = efficientdet(tensors, config, images)
            return {f"{i}": x for i, x in enumerate([*classes, *boxes])}

        spec = tf.TensorSpec([1, *config.image_size, 3], tf.float32)
        served = tf.function(serve, input_signature=[spec])
        tf.saved_model.save(module, str(tmp_path / "export"), signatures=served)
        reference = open_saved_model(tmp_path / "export", config, values)
    images = normalise(synthetic_image(*config.image_size)[None], config)
    result = compared(reference, config, values, images)
    assert result.passed, result.first_divergence
    print(f"TensorFlow {version}: {len(result.taps)} compared, {len(result.absent)} absent")
    assert len(result.absent) <= (0 if version == 1 else 2)


# --- TFLite ---------------------------------------------------------------------------------------------


def test_a_tflite_file_of_another_model_is_rejected() -> None:
    config = TINY.replace(max_level=TINY.max_level + 1)
    with pytest.raises(EfficientDetError, match=rf"has no class_outputs/{config.max_level}: it is not"):
        TFLiteReference(golden("float32"), config)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_tflite_files(kind: str) -> None:
    reference = TFLiteReference(golden(kind), TINY)
    variables = dict(TFLiteCheckpoint(golden(kind)))
    images = normalise(synthetic_image(*TINY.image_size)[None], TINY)
    result = compared(reference, TINY, variables, images)
    assert reference.exact == (kind == "float32")
    assert result.passed == reference.exact
    assert {pair.tap for pair in taps(TINY) if pair.output is not None} <= reference.taps
    assert any("blocks_" in name for name in reference.taps)
    print(
        f"{kind}: {len(result.taps)} compared, worst {result.worst('accumulated').accumulated.relative:.1e}"
    )


# --- the command line -----------------------------------------------------------------------------------


def test_command_line(d0: tuple[Path, EfficientDetConfig, Variables, np.ndarray]) -> None:
    meta, _, variables, _ = d0
    folder = meta.parent
    raw = {name: value + np.float32(0.01) for name, value in variables.items()}
    write_bundle(folder / "model", {**raw, **{name + EMA_SUFFIX: x for name, x in variables.items()}})
    options = ("--reference", "meta", "--raw", "--json", "--report", "out")
    done = verify("--ckpt", folder, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["passed"]
    assert summary["reference"] == str(folder / "model.meta")
    assert (summary["float32"]["activations"], summary["float32"]["absent"]) == (227, 0)
    assert "float64" not in summary
    assert summary["about_assumed"] == (
        f"confirmed by {folder / 'model.meta'}: activation swish, fusion fastattn, no residual in the heads, "
        "pooling after resampling convolutions"
    )
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["metadata"]["reference"] == str(folder / "model.meta")
    shutil.copy(unpacked("d0_train", folder), folder / "train.meta")
    done = verify("--ckpt", folder, "--reference", "meta", "--graph", "train.meta", cwd=folder)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "is the graph of a training run" in done.stderr


def test_a_quantised_file_proves_nothing(tmp_path: Path) -> None:
    """Measured by verify.py without a verdict; no weights are written on the strength of it."""
    options = ("--ckpt", str(golden("int8")), "--reference", "tflite", "--json")
    done = verify(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"] is None
    assert "measured, not judged" in done.stderr
    command = [sys.executable, str(TOOLS / "convert.py"), *options, "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert not list(tmp_path.iterdir())


AGAINST = ("--weights", "a", "--against", "b")


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        (
            "convert.py",
            ["--ckpt", "x", "--reference", "meta"],
            "add --verify",
        ),
        (
            "verify.py",
            [*AGAINST, "--reference", "meta"],
            "so --reference has no effect",
        ),
        ("verify.py", [*AGAINST, "--variants"], "so --precision has no effect"),
        ("verify.py", [*AGAINST, "--engine", "folded"], "so --engine has no effect"),
        ("verify.py", ["--ckpt", "x", "--against", "b"], "--against is compared with --weights: give both"),
        ("verify.py", [], "give --ckpt, or --weights and --against"),
        ("eval_coco.py", ["--weights", "x", "--out", "y"], "give --coco or --annotations"),
        ("verify.py", ["--ckpt", "x", "--reference", "keras"], "invalid choice: 'keras'"),
    ],
)
def test_options_without_effect_are_rejected(tool: str, arguments: list[str], message: str) -> None:
    command = [sys.executable, str(TOOLS / tool), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
