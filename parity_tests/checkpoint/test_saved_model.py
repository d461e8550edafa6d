"""SavedModels and frozen graphs: written by TensorFlow here, and of AutoML's release."""

from __future__ import annotations

import math
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity_tests.helpers.object_trees import automl_paths
from parity_tests.helpers.paths import ROOT
from parity_tests.helpers.small_models import SHALLOW, seeded, tiny
from porting.checkpoint import open_checkpoint, wire
from porting.checkpoint.frozen_graph import FrozenGraph
from porting.checkpoint.v2.index import read_index
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import choose_variables
from porting.errors import CheckpointError
from porting.infer import infer_config
from porting.scopes import EMA_SUFFIX
from pytorch_model.config import BackboneConfig, EfficientDetConfig


def small() -> EfficientDetConfig:
    return tiny(backbone=BackboneConfig("efficientnet-b0", 8, SHALLOW))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == expected[name].dtype, name
        assert array.shape == expected[name].shape, name
        assert array.tobytes() == expected[name].tobytes(), name
        assert array.flags.owndata, name


# --- SavedModels ----------------------------------------------------------------------------------------


def test_a_release_serves_the_plain_variables(shared: Path) -> None:
    """Checked by the checksums of a released D0.

    The plain variables of its SavedModel are the checkpoint's averages; the averages in the SavedModel are
    neither the checkpoint's averages nor its plain values.
    """
    served = read_index(shared / "checkpoint_index/d0_savedmodel/variables.index").entries
    released = read_index(shared / "checkpoint_index/d0_ap3429/model.index").entries
    names = [name for name in served if not name.endswith(EMA_SUFFIX) and name != "global_step"]
    assert len(names) == 709
    for name in names:
        assert served[name].crc32c == released[name + EMA_SUFFIX].crc32c, name
        assert served[name + EMA_SUFFIX].crc32c not in (
            released[name].crc32c,
            released[name + EMA_SUFFIX].crc32c,
        ), name


def written(folder: Path) -> tuple[EfficientDetConfig, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A SavedModel folder like AutoML's: (configuration, served values, stale averages)."""
    config = small()
    values = seeded(config)
    stale = {name + EMA_SUFFIX: value + 1 for name, value in values.items()}
    step = {"global_step": np.array(5, np.int64)}
    write_bundle(folder / "variables" / "variables", {**values, **stale, **step})
    (folder / "saved_model.pb").write_bytes(b"\x08\x01")
    return config, {**values, **step}, stale


@pytest.mark.parametrize(
    "inside", ["", "saved_model.pb", "variables", "variables/variables", "variables/variables.index"]
)
def test_stale_averages_are_left_out(tmp_path: Path, inside: str) -> None:
    config, values, stale = written(tmp_path / "export")
    with open_checkpoint(tmp_path / "export" / inside) as checkpoint:
        assert_same(dict(checkpoint), values)
        assert checkpoint.format == "TensorFlow SavedModel"
        assert checkpoint.step == 5
        assert checkpoint.notes == (
            f"left out {len(stale)} moving averages: a SavedModel computes with the plain variables, which "
            "AutoML set to the averages when it exported the model",
        )
        assert choose_variables(checkpoint, config, raw=False)[2] == "raw"


def test_the_classifier_of_a_backbone_is_left_out(tmp_path: Path) -> None:
    """AutoML's Keras exporter saves it, although no detector runs it."""
    config, values, _ = written(tmp_path / "export")
    head = {"backbone/_head/_conv_head/kernel": np.ones((1, 1, 8, 1280), np.float32)}
    write_bundle(tmp_path / "export" / "variables" / "variables", {**values, **head})
    with open_checkpoint(tmp_path / "export") as checkpoint:
        chosen, unused, _ = choose_variables(checkpoint, config, raw=False)
    assert set(chosen.values()) == values.keys() - {"global_step"}
    assert unused["the backbone's own classifier, which a detector does not run"] == tuple(head)


def test_exported_like_automl(tensorflow: Any, tmp_path: Path) -> None:
    """A checkpoint restored and exported with the steps of AutoML's ``inference.py``.

    TensorFlow also saves averages that were never assigned.
    """
    tf, v1 = tensorflow, tensorflow.compat.v1
    averages = dict(list(seeded(small()).items())[:20])
    raw = {name: value + 2 for name, value in averages.items()}
    twins = {name + EMA_SUFFIX: value for name, value in averages.items()}
    write_bundle(tmp_path / "trained" / "model", {**raw, **twins})
    with tf.Graph().as_default(), v1.Session() as session:
        placed = [v1.get_variable(name, value.shape) for name, value in averages.items()]
        ema = v1.train.ExponentialMovingAverage(decay=0.0)
        restored = ema.variables_to_restore(placed)
        ema.apply(placed)
        session.run(v1.global_variables_initializer())
        v1.train.Saver(restored).restore(session, str(tmp_path / "trained" / "model"))
        builder = v1.saved_model.Builder(str(tmp_path / "export"))
        builder.add_meta_graph_and_variables(session, ["serve"])
        builder.save()
    index = read_index(tmp_path / "export/variables/variables.index")
    assert index.entries.keys() == raw.keys() | twins.keys()
    with open_checkpoint(tmp_path / "export") as checkpoint:
        assert_same(dict(checkpoint), averages)
        assert f"left out {len(twins)} moving averages" in checkpoint.notes[0]


@pytest.mark.parametrize("keras", [False, True], ids=["attributes", "lists"])
def test_tensorflow_2_saved_model(tensorflow: Any, tmp_path: Path, keras: bool) -> None:
    """Objects with attributes like AutoML's.

    Keras objects also list their variables, and in a SavedModel the keys come from these lists
    (``model/variables/0``) and have no meaning.
    """
    tf, config = tensorflow, small()
    values, paths = seeded(config), automl_paths(config)
    module, model = tf.Module(), tf.__internal__.tracking.AutoTrackable()
    placed = []
    for name, value in values.items():
        *parents, leaf = paths[name].split("/")
        at = model
        for part in parents:
            if getattr(at, part, None) is None:
                setattr(at, part, tf.__internal__.tracking.AutoTrackable())
            at = getattr(at, part)
        placed.append(tf.Variable(value, name=name))
        setattr(at, leaf, placed[-1])
    setattr(model.resample_layers, "1", tf.__internal__.tracking.AutoTrackable())
    if keras:
        model.variables = placed
    module.model = model
    module.serve = tf.function(lambda: tf.add_n([tf.reduce_sum(v) for v in placed]), input_signature=[])
    tf.saved_model.save(module, str(tmp_path / "export"))
    keys = read_index(tmp_path / "export/variables/variables.index").entries
    assert any(key.startswith("model/variables/0/") for key in keys) == keras
    with open_checkpoint(tmp_path / "export") as checkpoint:
        assert_same(dict(checkpoint), values)
        assert checkpoint.format == "TensorFlow SavedModel"
        assert checkpoint.notes == ()
        assert infer_config(checkpoint.shapes).config.backbone == config.backbone


def test_a_saved_model_without_variables(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"\x08\x01")
    for path in (tmp_path, tmp_path / "saved_model.pb"):
        with pytest.raises(
            CheckpointError, match=r"is a SavedModel without variables: .*; fetch the whole folder"
        ):
            open_checkpoint(path)


# --- frozen graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("resource", [False, True], ids=["reference variables", "resource variables"])
def test_tensorflow_1_frozen_graph(tensorflow: Any, tmp_path: Path, resource: bool) -> None:
    """AutoML's network with AutoML's variable names, frozen by TensorFlow as in ``model_inspect.py``."""
    from tf_reference.efficientdet import efficientdet

    tf, v1, config = tensorflow, tensorflow.compat.v1, small()
    values = seeded(config)
    values["fpn_cells/cell_0/fnode0/op_after_combine5/bn/beta"][:] = 0.25  # TensorFlow stores it as one value
    values["box_net/box-0/bias"][:] = 0  # and this as none
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        placed = {
            name: v1.get_variable(name, initializer=tf.constant(value), use_resource=resource)
            for name, value in values.items()
        }
        images = v1.placeholder(tf.float32, [1, 64, 64, 3], "images")
        heads = efficientdet({name: tf.convert_to_tensor(v) for name, v in placed.items()}, config, images)
        outputs = [tf.identity(level, f"out_{i}") for i, level in enumerate([*heads[0], *heads[1]])]
        session.run(v1.global_variables_initializer())
        frozen = v1.graph_util.convert_variables_to_constants(
            session, graph.as_graph_def(), [output.op.name for output in outputs]
        )
    path = tmp_path / "efficientdet-d0_frozen.pb"
    path.write_bytes(frozen.SerializeToString())
    with open_checkpoint(path) as checkpoint:
        assert isinstance(checkpoint, FrozenGraph)
        assert_same(dict(checkpoint), values)
        assert infer_config(checkpoint.shapes).config.backbone == config.backbone


def test_tensorflow_2_frozen_graph_is_recognised(tensorflow: Any, tmp_path: Path) -> None:
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2_as_graph,
    )

    tf = tensorflow
    kernel = tf.Variable(np.ones((3, 3, 3, 4), np.float32), name="efficientnet-b0/stem/conv2d/kernel")

    def serve(images: Any) -> Any:
        with tf.name_scope("efficientnet-b0/stem/conv2d"):
            return tf.nn.conv2d(images, kernel, 1, "SAME")

    images = tf.TensorSpec([1, 8, 8, 3], tf.float32)
    _, frozen = convert_variables_to_constants_v2_as_graph(tf.function(serve).get_concrete_function(images))
    (tmp_path / "model.pb").write_bytes(frozen.SerializeToString())
    with pytest.raises(CheckpointError, match=r"was frozen by TensorFlow 2, .* give the SavedModel folder"):
        open_checkpoint(tmp_path / "model.pb")


NAME = "efficientnet-b0/stem/conv2d/kernel"


def tensor(shape: tuple[int, ...], **fields: Any) -> bytes:
    """A ``TensorProto``: ``content`` raw, ``packed`` or ``single`` values listed, ``dtype``."""
    dimensions = b"".join(wire.bytes_field(2, wire.int_field(1, n)) for n in shape)
    message = wire.int_field(1, fields.get("dtype", 1)) + wire.bytes_field(2, dimensions)
    if "content" in fields:
        message += wire.bytes_field(4, fields["content"])
    if "packed" in fields:
        message += wire.bytes_field(5, struct.pack(f"<{len(fields['packed'])}f", *fields["packed"]))
    for value in fields.get("single", ()):
        message += wire.fixed32_field(5, struct.unpack("<I", struct.pack("<f", value))[0])
    return message


def node(name: str, message: bytes, op: str = "Const") -> bytes:
    entry = wire.bytes_field(1, b"value") + wire.bytes_field(2, wire.bytes_field(8, message))
    content = wire.bytes_field(1, name.encode()) + wire.bytes_field(2, op.encode())
    return wire.bytes_field(1, content + wire.bytes_field(5, entry))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (tensor((2, 2), content=struct.pack("<4f", 1, 2, 3, 4)), [[1, 2], [3, 4]]),
        (tensor((2, 2), packed=[1, 2, 3, 4]), [[1, 2], [3, 4]]),
        (tensor((2, 2), single=[1, 2, 3, 4]), [[1, 2], [3, 4]]),
        (tensor((2, 2), packed=[1, 2]), [[1, 2], [2, 2]]),
        (tensor((2, 2), single=[7]), [[7, 7], [7, 7]]),
        (tensor((2, 2)), [[0, 0], [0, 0]]),
        (tensor((), packed=[3]), 3),
        (tensor((0, 4)), np.zeros((0, 4))),
    ],
)
def test_ways_of_writing_a_tensor(tmp_path: Path, tensorflow: Any, message: bytes, expected: Any) -> None:
    (tmp_path / "g.pb").write_bytes(node(NAME, message))
    proto = tensorflow.compat.v1.AttrValue.FromString(wire.bytes_field(8, message)).tensor
    np.testing.assert_array_equal(tensorflow.make_ndarray(proto), expected)
    with open_checkpoint(tmp_path / "g.pb") as checkpoint:
        assert_same(dict(checkpoint), {NAME: np.array(expected, np.float32)})


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (b"", "is a graph without AutoML's variables"),
        (node("a/kernel", tensor((1,), packed=[1])), "is a graph without AutoML's variables"),
        (node(NAME, tensor(()), op="VarHandleOp"), "is a graph whose variables are not in it"),
        (node(NAME, tensor((1,), dtype=3)), f"{NAME} is of type number 3, but weights are float32"),
        (
            node(NAME, tensor((1 << 20, 1 << 20), packed=[1])),
            "claims 4398046511104 bytes, more than the file",
        ),
        (node(NAME, tensor((2,), content=b"1234")), r"of shape \[2\] holds 4 bytes"),
        (node(NAME, tensor((2,), packed=[1, 2, 3])), r"of shape \[2\] holds 12 bytes"),
        (node(NAME, tensor((-1 % (1 << 64), 1))), "has an impossible shape"),
        (node(NAME, tensor((1,), packed=[1])) * 2, f"the constant {NAME} is in it twice"),
        (b"\x08\x01\x12\x00", "it is the saved_model.pb of a SavedModel, renamed"),
        (node(NAME, tensor((1,), packed=[1]))[:-2], "runs past the end"),
        (wire.bytes_field(1, wire.bytes_field(1, b"\xff")), "the name of a node is not UTF-8"),
    ],
)
def test_rejected_graphs(tmp_path: Path, graph: bytes, reason: str) -> None:
    (tmp_path / "g.pb").write_bytes(graph)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(tmp_path / "g.pb")
    assert str(tmp_path / "g.pb") in str(caught.value)


def test_no_steps(tmp_path: Path) -> None:
    (tmp_path / "g.pb").write_bytes(node(NAME, tensor((1,), packed=[1])))
    with pytest.raises(CheckpointError, match="which has no step 3; leave out the step"):
        open_checkpoint(tmp_path / "g.pb", step=3)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_reported(tmp_path: Path, data: st.DataObject) -> None:
    """Changed bytes give another graph or a CheckpointError; never a different exception or a giant array."""
    graph = bytearray(node(NAME, tensor((2, 3), packed=range(6))) + node("class_net/a/bias", tensor((4,))))
    for _ in range(data.draw(st.integers(1, 4))):
        graph[data.draw(st.integers(0, len(graph) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "g.pb").write_bytes(graph)
    with suppress(CheckpointError), open_checkpoint(tmp_path / "g.pb") as checkpoint:
        for name in checkpoint:
            assert checkpoint[name].nbytes == 4 * math.prod(checkpoint.shapes[name]) <= len(graph)


def test_readers_need_neither_tensorflow_nor_h5py(tmp_path: Path) -> None:
    """Opening a SavedModel imports every reader, and nothing heavy."""
    written(tmp_path / "export")
    script = (
        "import sys; from porting.checkpoint import open_checkpoint; "
        f"assert open_checkpoint({str(tmp_path / 'export')!r}).step == 5; "
        "print(sorted({'tensorflow', 'h5py', 'keras'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
