"""Frozen graphs: written by TensorFlow here, by Google's own tool, and by hand."""

from __future__ import annotations

import math
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity_tests.helpers.exported.models import keras_model, network
from parity_tests.helpers.recordings import normalise
from parity_tests.helpers.small_models import assert_same, seeded, shallow
from porting.checkpoint import open_checkpoint
from porting.checkpoint.frozen_graph import FrozenGraph
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import apply_rules
from porting.errors import CheckpointError
from porting.infer import infer_config
from porting.parity.lockstep import compare
from porting.parity.reference.choose import open_reference
from porting.rules import rules
from porting.synthetic import synthetic_image, synthetic_variables
from pytorch_model.config import EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.formats import wire
from tf_reference.variables import variable_shapes


@pytest.mark.parametrize("resource", [False, True], ids=["reference variables", "resource variables"])
def test_tensorflow_1_frozen_graph(tensorflow: Any, tmp_path: Path, resource: bool) -> None:
    """AutoML's network with AutoML's variable names, frozen by TensorFlow as in ``model_inspect.py``."""
    from tf_reference.efficientdet import efficientdet

    tf, v1, config = tensorflow, tensorflow.compat.v1, shallow()
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


def frozen_by_tensorflow_2(tf: Any, config: EfficientDetConfig, values: dict[str, np.ndarray]) -> bytes:
    """The network with the names of operations of AutoML's Keras layers, frozen by TensorFlow 2."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    _, placed = keras_model(tf, config, values)

    def serve(images: Any) -> Any:
        with tf.name_scope("efficientdet-d0"):
            heads = network(tf, config, {n: tf.convert_to_tensor(v) for n, v in placed.items()}, images)
        return [*heads[0], *heads[1]]

    images = tf.TensorSpec([1, 64, 64, 3], tf.float32)
    frozen = convert_variables_to_constants_v2(tf.function(serve).get_concrete_function(images))
    return bytes(frozen.graph.as_graph_def().SerializeToString())


def test_tensorflow_2_frozen_graph(tensorflow: Any, tmp_path: Path) -> None:
    config = shallow()
    values = seeded(config)
    (tmp_path / "model.pb").write_bytes(frozen_by_tensorflow_2(tensorflow, config, values))
    with open_checkpoint(tmp_path / "model.pb") as checkpoint:
        assert_same(dict(checkpoint), values)
        assert checkpoint.notes == ()


@pytest.mark.parametrize("scope", ["", "model/"])
def test_a_frozen_graph_as_the_reference(tensorflow: Any, tmp_path: Path, scope: str) -> None:
    tf, config = tensorflow, shallow()
    values, path = synthetic_variables(config), tmp_path / "model.pb"
    if scope:
        with tf.Graph().as_default() as graph:
            images = tf.compat.v1.placeholder(tf.float32, [1, 64, 64, 3], "images")
            constants = {name: tf.constant(value, name=scope + name) for name, value in values.items()}
            network(tf, config, constants, images)
        path.write_bytes(graph.as_graph_def().SerializeToString())
    else:
        path.write_bytes(frozen_by_tensorflow_2(tf, config, values))
    with open_checkpoint(path) as checkpoint:
        reference = open_reference("savedmodel", checkpoint, None, config, {})
    model = EfficientDet.from_state_dict(apply_rules(list(rules(config)), values), config)
    images = normalise(synthetic_image(64, 64)[None], config)
    result = compare(model, reference.on(images), images, shown=reference.taps)
    assert result.passed, result.first_divergence
    print(f"{len(result.taps)} compared, {len(result.absent)} absent")


def test_a_tensorflow_2_frozen_graph_without_names_of_layers(tensorflow: Any, tmp_path: Path) -> None:
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    kernel = tensorflow.Variable(np.ones((3, 3, 3, 4), np.float32))
    served = tensorflow.function(lambda images: tensorflow.nn.conv2d(images, kernel, 1, "SAME"))
    images = tensorflow.TensorSpec([1, 8, 8, 3], tensorflow.float32)
    frozen = convert_variables_to_constants_v2(served.get_concrete_function(images))
    (tmp_path / "model.pb").write_bytes(frozen.graph.as_graph_def().SerializeToString())
    with pytest.raises(CheckpointError, match=r"by TensorFlow 2 without the names of .* give the"):
        open_checkpoint(tmp_path / "model.pb")


def test_googles_frozen_graph(shared: Path) -> None:
    """Its activations are ``tf.nn.swish``, each with a constant named ``…/beta``."""
    with open_checkpoint(shared / "exports" / "efficientdet-d0_frozen.pb") as checkpoint:
        assert checkpoint.shapes.keys() == variable_shapes(model_config("efficientdet-d0")).keys()
        assert infer_config(checkpoint.shapes, checkpoint.source).variant == "efficientdet-d0"


def test_batch_norms_folded_by_tensorflow(tensorflow: Any, tmp_path: Path) -> None:
    from tensorflow.python.tools.optimize_for_inference_lib import fold_batch_norms

    tf, v1, config = tensorflow, tensorflow.compat.v1, shallow()
    with tf.Graph().as_default() as graph:
        images = v1.placeholder(tf.float32, [1, 64, 64, 3], "images")
        constants = {name: tf.constant(value, name=name) for name, value in seeded(config).items()}
        network(tf, config, constants, images)
        folded = fold_batch_norms(graph.as_graph_def())
    (tmp_path / "model.pb").write_bytes(folded.SerializeToString())
    with pytest.raises(CheckpointError, match=r"batch norms are folded .*_bn_offset\), .*; give the"):
        open_checkpoint(tmp_path / "model.pb")


@pytest.mark.parametrize("resource", [False, True], ids=["reference variables", "resource variables"])
def test_partitioned_variables(tensorflow: Any, tmp_path: Path, resource: bool) -> None:
    tf, v1 = tensorflow, tensorflow.compat.v1
    with tf.Graph().as_default() as graph, v1.Session(graph=graph) as session:
        partitioner = v1.fixed_size_partitioner(2)
        with v1.variable_scope("class_net/class-0", partitioner=partitioner, use_resource=resource):
            value = tf.identity(tf.convert_to_tensor(v1.get_variable("bias", [4])), "out")
        session.run(v1.global_variables_initializer())
        frozen = v1.graph_util.convert_variables_to_constants(session, graph.as_graph_def(), [value.op.name])
    (tmp_path / "model.pb").write_bytes(frozen.SerializeToString())
    with pytest.raises(CheckpointError, match=r"partitioned variables \(class_net/class-0/bias/part_0\)"):
        open_checkpoint(tmp_path / "model.pb")


# --- a scope around the model ---------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_a_scope_around_the_model(tensorflow: Any, tmp_path: Path, version: int) -> None:
    """In a frozen graph and in a V2 checkpoint."""
    config = shallow()
    values = {f"my/model/{name}": value for name, value in seeded(config).items()}
    step = {"global_step": np.array(7, np.int64)}
    if version == 1:
        path = tmp_path / "model.pb"
        graph = b"".join(
            node(name, tensor(value.shape, content=value.tobytes())) for name, value in values.items()
        )
        path.write_bytes(graph)
    else:
        path = tmp_path / "model"
        write_bundle(path, {**values, **step})
    with open_checkpoint(path) as checkpoint:
        assert_same(dict(checkpoint), {**seeded(config), **(step if version == 2 else {})})
        assert checkpoint.notes == ("the scope my/model/ before the names of all variables was left out",)


def test_two_scopes_are_left_as_they_are(tmp_path: Path) -> None:
    names = ("a/class_net/class-0/bias", "b/class_net/class-0/bias")
    (tmp_path / "g.pb").write_bytes(b"".join(node(name, tensor((1,), packed=[1])) for name in names))
    with open_checkpoint(tmp_path / "g.pb") as checkpoint:
        assert tuple(checkpoint) == names
        assert checkpoint.notes == ()


# --- messages written by hand ---------------------------------------------------------------------------


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


def conv_bias(name: str, bias: str) -> bytes:
    """An operation that adds ``bias``."""
    inputs = b"".join(wire.bytes_field(3, x.encode()) for x in ("x:0", bias, "^control"))
    content = wire.bytes_field(1, name.encode()) + wire.bytes_field(2, b"BiasAdd") + inputs
    return wire.bytes_field(1, content)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (b"", "is a graph without AutoML's variables"),
        (node("a/kernel", tensor((1,), packed=[1])), "is a graph without AutoML's variables"),
        (node(NAME, tensor(()), op="VarHandleOp"), "is a graph whose variables are not in it"),
        (node(NAME, tensor((1,), dtype=3)), f"{NAME} is int32, but weights are float32"),
        (node(NAME, tensor((1,), dtype=7)), f"{NAME} is of type number 7, which is not a plain number"),
        (
            node("class_net/class-0/pointwise_kernel", tensor((1,), packed=[1])),
            r"folded into the .* \(it has class_net/class-0/pointwise_kernel and no moving_variance",
        ),
        (
            node("class_net/a", tensor((1,), packed=[1]))
            + conv_bias("class_net/class-0/a/BiasAdd", "class_net/a")
            + node("class_net/b", tensor((1,), packed=[1]))
            + conv_bias("class_net/class-0_1/a/BiasAdd", "class_net/b"),
            "it has two constants for class_net/class-0/bias",
        ),
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


def test_a_graph_of_too_many_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("porting.checkpoint.graph.nodes._MOST_NODES", 2)
    (tmp_path / "g.pb").write_bytes(node(NAME, tensor((1,), packed=[1])) + node("a", b"") * 2)
    with pytest.raises(CheckpointError, match="it has more than 2 nodes, which no EfficientDet has"):
        open_checkpoint(tmp_path / "g.pb")
