"""Damaged, hostile and foreign TFLite files: a CheckpointError, or the same checkpoint as before."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity_tests.helpers.tflite_files import TINY, convert_function, golden, tflite_bytes, tiny_variables
from porting.checkpoint import open_checkpoint
from porting.checkpoint.tflite import checkpoint as tflite
from porting.checkpoint.tflite import graph as tflite_graph
from porting.checkpoint.tflite import match as tflite_match
from porting.checkpoint.tflite.checkpoint import TFLiteCheckpoint
from porting.checkpoint.tflite.flatbuffer import Table, flexbuffer_map
from porting.checkpoint.tflite.flow import Mismatch
from porting.checkpoint.tflite.graph import Graph, Operator, Tensor, _check_order, read_graph
from porting.checkpoint.tflite.heads import End, _check_predictions, _head
from porting.checkpoint.tflite.match import match
from porting.checkpoint.tflite.structure import Convolution, Head, Structure
from porting.checkpoint.tflite.weights import Layer, _without_bn, check_layers, shared_kernel
from porting.errors import CheckpointError, ConfigError
from pytorch_model.formats.wire import Malformed

INT8, FLOAT32 = golden("int8").read_bytes(), golden("float32").read_bytes()


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def error_of(tmp_path: Path, data: bytes) -> str:
    """The error of opening ``data``, which must be one line with the name of the file."""
    path = tmp_path / "model.tflite"
    path.write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def place_of(data: bytes, view: np.ndarray) -> int:
    """The position in ``data`` where a view of it starts."""
    start: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    return int(view.__array_interface__["data"][0]) - start


def anchors_of(data: bytes) -> np.ndarray:
    """The anchors in ``data``, a view of it."""
    graph = read_graph(data)
    (detection,) = (op for op in graph.operators if op.kind == "TFLite_Detection_PostProcess")
    return graph.tensors[detection.inputs[2]].stored()


def edited(data: bytes, view: np.ndarray, value: np.ndarray) -> bytes:
    """``data`` with the bytes of ``view``, an array read from it, replaced by those of ``value``."""
    start, new = place_of(data, view), np.asarray(value, view.dtype).tobytes()
    assert len(new) == view.nbytes
    return data[:start] + new + data[start + len(new) :]


# --- damage that can be detected --------------------------------------------------------------------------


def test_files_that_are_not_tflite(tmp_path: Path) -> None:
    assert "is not a TFLite file" in error_of(tmp_path, b"")
    assert "is not a TFLite file" in error_of(tmp_path, b"\x1c\0\0\0TFL2" + bytes(100))
    with pytest.raises(CheckpointError, match="No such file"):
        open_checkpoint(tmp_path / "none.tflite")
    (tmp_path / "renamed").write_bytes(INT8)
    assert open_checkpoint(tmp_path / "renamed").format == "TFLite, int8"


@pytest.mark.parametrize("data", [INT8, FLOAT32], ids=["int8", "float32"])
def test_every_truncation_is_rejected(tmp_path: Path, data: bytes) -> None:
    lengths = {*range(64), *range(64, len(data), len(data) // 100), *range(len(data) - 16, len(data))}
    for length in sorted(lengths):
        error_of(tmp_path, data[:length])


def constant_bytes(graph: Graph, data: bytes) -> np.ndarray:
    """bool [len(data)]: whether a byte belongs to a constant."""
    inside = np.zeros(len(data), bool)
    for tensor in graph.tensors:
        if tensor.is_constant:
            inside[place_of(data, tensor.data) :][: len(tensor.data)] = True
    return inside


@pytest.mark.parametrize("data", [INT8, FLOAT32], ids=["int8", "float32"])
def test_damage_outside_the_weights_is_reported_or_harmless(tmp_path: Path, data: bytes) -> None:
    """A wrong byte elsewhere: an error, a note, or variables equal up to the last digits of an int8 scale."""
    sound = TFLiteCheckpoint(golden("int8" if data is INT8 else "float32"))
    variables = dict(sound)
    rng = np.random.default_rng(0)
    rejected = noted = 0
    for place in rng.choice(np.flatnonzero(~constant_bytes(read_graph(data), data)), 120, replace=False):
        damaged = bytearray(data)
        damaged[place] ^= 1 << rng.integers(8) if rng.random() < 0.5 else rng.integers(1, 256)
        path = tmp_path / "damaged.tflite"
        path.write_bytes(damaged)
        try:
            found = TFLiteCheckpoint(path)
        except CheckpointError:
            rejected += 1
            continue
        assert found.shapes == sound.shapes
        assert found.settings == sound.settings
        if len(found.notes) > len(sound.notes):
            noted += 1
            continue
        for name, value in variables.items():
            assert np.allclose(found[name], value, rtol=2e-6, atol=0), f"{name}, byte {place}"
    print(f"{rejected} rejected, {noted} noted, of 120")
    assert rejected > 40


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.integers(8, len(INT8) - 1), st.integers(0, 255)), min_size=1, max_size=20),
    cut=st.integers(0, 300),
)
def test_anything_opens_or_is_rejected(tmp_path: Path, changes: list[tuple[int, int]], cut: int) -> None:
    damaged = bytearray(INT8)
    for place, value in changes:
        damaged[place] = value
    (tmp_path / "damaged.tflite").write_bytes(damaged[: len(damaged) - cut])
    try:
        found = TFLiteCheckpoint(tmp_path / "damaged.tflite")
    except CheckpointError:
        return
    for name, shape in found.shapes.items():
        assert found[name].shape == shape


@given(st.binary(max_size=400))
def test_garbage_behind_the_identifier(garbage: bytes) -> None:
    with pytest.raises(Malformed):
        read_graph(garbage[:4].ljust(4, b"\0") + b"TFL3" + garbage[4:])


@given(st.binary(max_size=80))
def test_garbage_options(garbage: bytes) -> None:
    with contextlib.suppress(Malformed):
        assert all(isinstance(value, int | float) for value in flexbuffer_map(garbage).values())


def test_options_of_the_detection_operator() -> None:
    operator = structure(INT8).postprocess
    assert operator is not None
    options = flexbuffer_map(operator.custom_options.tobytes())
    assert options["num_classes"] == 5
    assert options["max_detections"] == 25
    assert options["nms_iou_threshold"] == 0.5
    assert options["use_regular_nms"] == 0
    assert options["y_scale"] == 1.0


def test_vectors_cost_no_more_than_the_file() -> None:
    """A length that claims 4 GB is rejected before anything is allocated."""
    vtable = struct.pack("<HHH", 6, 8, 4)
    data = (
        struct.pack("<I", 12) + vtable + bytes(2) + struct.pack("<iI", 8, 4) + struct.pack("<I", 0xFFFFFFFF)
    )
    table = Table.root(data)
    for read in (
        lambda: table.array(0, np.dtype("<f4")),
        lambda: table.tables(0, 1 << 40),
        lambda: table.text(0),
    ):
        with pytest.raises(Malformed, match="are outside"):
            read()


# --- damage to kernels and biases that the heads share ----------------------------------------------------


@functools.cache
def structure(data: bytes) -> Structure:
    return match(read_graph(data))


def head_layer(data: bytes, level: int) -> Any:
    return structure(data).class_net.levels[level]


def test_a_levels_kernel_must_be_a_multiple(tmp_path: Path) -> None:
    kernel = head_layer(FLOAT32, 2)[1].pointwise.kernel.stored()
    value = kernel.copy()
    value[5, 0, 0, 2] *= 1.0001
    message = error_of(tmp_path, edited(FLOAT32, kernel, value))
    assert "class_net/class-1/pointwise_kernel is one kernel in AutoML" in message
    assert "output channel 5" in message
    assert "class_net/class-1-bn-" in message


def int8_levels(codes: list[np.ndarray], scales: list[float]) -> list[Layer]:
    """One layer of a head at each level, with these int8 kernels [out, in] and one scale each."""
    layers = []
    for level, (stored, scale) in enumerate(zip(codes, scales, strict=True), start=3):
        conv = head_layer(INT8, level - 3)[1].pointwise
        out, fan_in = stored.shape
        kernel = dataclasses.replace(
            conv.kernel,
            shape=(out, 1, 1, fan_in),
            data=stored.astype(np.int8).view(np.uint8).reshape(-1),
            scale=np.full(out, scale, np.float32),
            zero_point=np.zeros(out, np.int64),
        )
        conv = dataclasses.replace(conv, kernel=kernel, in_filters=fan_in, out_filters=out)
        layers.append(Layer(conv, "kernel", "bias", f"bn-{level}"))
    return layers


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    factors=st.lists(st.floats(0.05, 20) | st.floats(-20, -0.05), min_size=2, max_size=5),
)
def test_a_shared_kernel_comes_back_from_any_quantisation(seed: int, factors: list[float]) -> None:
    """For any scales of the batch norms, the levels agree and each comes back to half a step.

    A weight that is wrong by two steps is rejected.
    """
    kernel = np.random.default_rng(seed).normal(size=(3, 16))
    largest = np.abs(kernel).max()
    scales = [float(np.float32(abs(factor) * largest / 127)) for factor in factors]
    codes = [np.rint(kernel * factor / scale) for factor, scale in zip(factors, scales, strict=True)]
    codes = [code.clip(-127, 127) for code in codes]
    found, found_scales = shared_kernel(int8_levels(codes, scales))
    for factor, scale, multiples in zip(factors, scales, found_scales, strict=True):
        apart = np.abs(found[:, 0, 0] * multiples[:, None] - kernel * factor).max()
        assert apart <= scale * 1.01
    codes[-1][1, 7] += -3 if codes[-1][1, 7] > 0 else 3
    with pytest.raises(Malformed, match="output channel 1 of the kernel for bn-"):
        shared_kernel(int8_levels(codes, scales))


def test_a_weight_half_way_between_two_codes_may_go_either_way() -> None:
    kernel = np.array([[127.0, 40.5, -3.0]])
    for up, down in ((41, 40), (40, 41)):
        codes = [kernel.copy(), kernel.copy()]
        codes[0][0, 1], codes[1][0, 1] = up, down
        found, _ = shared_kernel(int8_levels(codes, [0.1, 0.2]))
        assert found[0, 0, 0, 1] == pytest.approx(up * 0.1)


def test_a_channel_switched_off_at_one_level(tmp_path: Path) -> None:
    """A batch norm with gamma 0 makes its channel zero, only at its level."""
    kernel = head_layer(FLOAT32, 0)[1].pointwise.kernel.stored()
    value = kernel.copy()
    value[5] = 0
    (tmp_path / "model.tflite").write_bytes(edited(FLOAT32, kernel, value))
    found, sound = TFLiteCheckpoint(tmp_path / "model.tflite"), TFLiteCheckpoint(golden("float32"))
    assert found["class_net/class-1-bn-3/gamma"][5] == 0
    for level in TINY.levels[1:]:
        gamma = f"class_net/class-1-bn-{level}/gamma"
        kernels = [
            checkpoint["class_net/class-1/pointwise_kernel"] * checkpoint[gamma]
            for checkpoint in (found, sound)
        ]
        np.testing.assert_allclose(kernels[0], kernels[1], rtol=1e-5)


def test_the_last_bias_must_be_one(tmp_path: Path) -> None:
    bias = head_layer(INT8, 3)[-1].pointwise.bias.stored()
    message = error_of(tmp_path, edited(INT8, bias, bias + 2))
    assert "class_net/class-predict/bias is one bias in AutoML but differs from level to level" in message


def test_a_depthwise_kernel_has_no_bias(tmp_path: Path) -> None:
    bias = head_layer(INT8, 3)[0].depthwise.bias.stored()
    message = error_of(tmp_path, edited(INT8, bias, bias + 1))
    assert "has a bias, which a depthwise convolution" in message


def test_scales_must_agree(tmp_path: Path) -> None:
    for tensor in (head_layer(INT8, 0)[1].pointwise.kernel, head_layer(INT8, 0)[1].pointwise.bias):
        scale = tensor.scale.copy()
        scale[3] *= 1.001
        message = error_of(tmp_path, edited(INT8, tensor.scale, scale))
        assert "scales of input, kernel and bias" in message
    for wrong in (0.0, -1.0, np.nan, np.inf):
        message = error_of(tmp_path, edited(INT8, tensor.scale, np.full_like(scale, wrong)))
        assert "a quantisation scale that is not positive" in message


def test_weights_are_symmetric(tmp_path: Path) -> None:
    kernel = head_layer(INT8, 0)[1].pointwise.kernel
    message = error_of(tmp_path, edited(INT8, kernel.zero_point, np.ones_like(kernel.zero_point)))
    assert "not quantised as in TFLite" in message


def test_a_weight_that_is_not_a_number_is_left_to_conversion(tmp_path: Path) -> None:
    from porting.convert import convert
    from porting.errors import ConversionError

    stem = structure(FLOAT32).stem.kernel.stored()
    (tmp_path / "nan.tflite").write_bytes(edited(FLOAT32, stem, np.full_like(stem, np.nan)))
    with pytest.raises(ConversionError, match="stem/conv2d/kernel holds 216 NaN"):
        convert(TFLiteCheckpoint(tmp_path / "nan.tflite"), TINY)


def test_an_unused_constant_is_noted(tmp_path: Path) -> None:
    """If an operator reads the kernel of another one, its own kernel is unused."""
    first, second = (structure(FLOAT32).blocks[i].expand for i in (1, 2))
    assert first is not None
    assert second is not None
    assert first.kernel.shape == second.kernel.shape
    wanted = struct.pack("<3i", *second.step.operator.inputs)
    assert FLOAT32.count(wanted) == 1
    other = struct.pack(
        "<3i", second.step.operator.inputs[0], first.kernel.index, second.step.operator.inputs[2]
    )
    (tmp_path / "model.tflite").write_bytes(FLOAT32.replace(wanted, other))
    notes = TFLiteCheckpoint(tmp_path / "model.tflite").notes
    assert f"{len(second.kernel.data)} bytes of constants that no operator reads" in notes[0]


# --- other graphs -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Changed(Operator):
    """An operator with one of its options changed."""

    number: int = -1
    value: int = 0

    def option(self, number: int, code: str, default: int = 0) -> int:
        return self.value if number == self.number else super().option(number, code, default)


def changed_operators(graph: Graph, operator: Operator) -> Iterator[Operator]:
    replace = dataclasses.replace
    kinds = {other.kind for other in graph.operators} | {"MUL", "SOFTMAX", "RELU6", "ADD_N"}
    yield from (replace(operator, kind=kind) for kind in sorted(kinds - {operator.kind}))
    first, last = graph.operators[0], graph.operators[-1]
    constant = next(tensor.index for tensor in graph.tensors if tensor.is_constant)
    others = (-1, *graph.inputs, first.outputs[0], last.inputs[0], constant, operator.outputs[0])
    for place in range(len(operator.inputs)):
        before, after = operator.inputs[:place], operator.inputs[place + 1 :]
        yield replace(operator, inputs=before + after)
        yield from (replace(operator, inputs=(*before, other, *after)) for other in others)
    yield replace(operator, inputs=())
    yield replace(operator, inputs=operator.inputs[::-1])
    yield replace(operator, outputs=())
    same = {name.name: getattr(operator, name.name) for name in dataclasses.fields(operator)}
    yield from (Changed(**same, number=number, value=value) for number in range(7) for value in range(4))


def changed_tensors(tensor: Tensor) -> Iterator[Tensor]:
    replace, shape = dataclasses.replace, tensor.shape
    for place, size in enumerate(shape):
        for new in (0, 1, size + 1, 2 * size):
            yield replace(tensor, shape=(*shape[:place], new, *shape[place + 1 :]))
    yield replace(tensor, shape=shape[:-1])
    yield replace(tensor, shape=shape[::-1])
    if tensor.is_constant:
        yield from (replace(tensor, type=number) for number in (1, 2, 3, 9, 15))
        yield replace(tensor, data=tensor.data[: len(tensor.data) // 2])
        yield replace(tensor, data=tensor.data[:0])
        yield replace(tensor, scale=np.ones(1, np.float32), zero_point=np.zeros(1, np.int64))


def changed_graphs(graph: Graph) -> Iterator[Graph]:
    """Every graph with one difference."""
    replace, operators, tensors = dataclasses.replace, graph.operators, graph.tensors
    for place, operator in enumerate(operators):
        yield replace(graph, operators=operators[:place] + operators[place + 1 :])
        for other in changed_operators(graph, operator):
            yield replace(graph, operators=(*operators[:place], other, *operators[place + 1 :]))
        more = replace(operator, index=len(operators))
        yield replace(graph, operators=(*operators, more))
    for place, tensor in enumerate(tensors):
        for changed in changed_tensors(tensor):
            yield replace(graph, tensors=(*tensors[:place], changed, *tensors[place + 1 :]))
    for inputs in ((), graph.inputs * 2, graph.outputs):
        yield replace(graph, inputs=inputs)


@pytest.mark.parametrize(
    ("kind", "every"),
    [("float32", 31), ("int8", 37), slow("float32", 3), slow("int8", 7)],
)
def test_a_graph_with_one_change_opens_or_is_rejected(
    kind: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a different exception; and if it opens, its variables can be read."""
    sound = read_graph(golden(kind).read_bytes())
    rejected: Counter[str] = Counter()
    opened = 0
    for graph in itertools.islice(changed_graphs(sound), 0, None, every):
        monkeypatch.setattr(tflite, "read_graph", lambda data, graph=graph: graph)
        try:
            with TFLiteCheckpoint(golden(kind)) as found:
                assert all(found[name].shape == shape for name, shape in found.shapes.items())
            opened += 1
        except CheckpointError as error:
            rejected[re.sub("[0-9]+", "N", str(error))] += 1
    print(f"{rejected.total()} rejected for {len(rejected)} reasons, {opened} opened")
    assert rejected.total() > opened


def layer_of(conv: Convolution) -> Layer:
    return Layer(conv, "kernel", "bias", None)


def test_layers_that_do_not_fit_each_other() -> None:
    replace = dataclasses.replace
    graph = read_graph(INT8)
    conv = head_layer(INT8, 0)[1].depthwise
    kernel, bias = conv.kernel, head_layer(INT8, 0)[1].pointwise.bias
    with pytest.raises(Malformed, match=r"its convolutions use \d+ bytes of weights, \d+ times the file"):
        check_layers([layer_of(conv)] * 100, graph, 10)
    turned = replace(conv, kernel=replace(kernel, axis=0, scale=kernel.scale[:1].repeat(2)))
    with pytest.raises(Malformed, match="is not quantised along its output channels"):
        check_layers([layer_of(turned)], graph, len(INT8))
    pointwise = head_layer(INT8, 0)[1].pointwise
    tensors = [replace(tensor, scale=tensor.scale[:0]) for tensor in graph.tensors]
    with pytest.raises(Malformed, match="has a quantised bias without a quantised input and kernel"):
        check_layers([layer_of(pointwise)], replace(graph, tensors=tuple(tensors)), len(INT8))
    assert bias is not None
    other = replace(conv, kernel=replace(kernel, data=np.zeros_like(kernel.data)))
    with pytest.raises(Malformed, match="kernel is one kernel in AutoML but differs from level to level"):
        list(_without_bn([layer_of(conv), layer_of(other)]))


def test_an_image_of_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = read_graph(INT8)
    tensors = list(graph.tensors)
    tensors[graph.inputs[0]] = dataclasses.replace(tensors[graph.inputs[0]], type=2)  # int32
    changed = dataclasses.replace(graph, tensors=tuple(tensors))
    monkeypatch.setattr(tflite, "read_graph", lambda data: changed)
    with pytest.raises(CheckpointError, match="its input is neither float nor an 8-bit image"):
        TFLiteCheckpoint(golden("int8"))


def test_heads_that_do_not_fit_each_other() -> None:
    found = structure(FLOAT32)
    class_chain, box_chain = found.class_net.levels[0], found.box_net.levels[0]
    with pytest.raises(Mismatch, match="its class net differs from level to level"):
        _head("class", [class_chain, class_chain[1:]], [End(), End()])
    heads = Head((class_chain,), None), Head((box_chain[1:],), None)
    with pytest.raises(Mismatch, match=r"its heads predict 45 and 36 values per location, after 3 and 2"):
        _check_predictions(*heads)
    with pytest.raises(Mismatch, match="it does not list its predictions anchor by anchor"):
        _check_predictions(Head((class_chain,), 3), Head((box_chain,), None))


def test_an_impossible_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    def network(self: object) -> None:
        raise ConfigError("fpn_cell_repeats is 0, must be at least 1")

    monkeypatch.setattr(tflite_match._Matcher, "network", network)
    with pytest.raises(Mismatch, match="fpn_cell_repeats is 0"):
        match(read_graph(FLOAT32))


def test_files_that_no_converter_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Malformed, match="does not begin like a TFLite file"):
        read_graph(bytes(100))
    graph = read_graph(FLOAT32)
    constant = next(tensor.index for tensor in graph.tensors if tensor.is_constant)
    with pytest.raises(Malformed, match="one of the graph's inputs is a constant"):
        _check_order(graph.tensors, graph.operators, (constant,))
    with monkeypatch.context() as patch:
        patch.setattr(tflite_graph, "_MOST_OPERATORS", 3)
        with pytest.raises(Malformed, match=r"claims \d+ entries; no more than 3 are expected"):
            read_graph(FLOAT32)
    with monkeypatch.context() as patch:
        patch.setattr(Table, "has", lambda self, field: True)
        with pytest.raises(Malformed, match="tensor 0 is sparse, which is not supported"):
            read_graph(FLOAT32)
    monkeypatch.setattr(Table, "tables", lambda self, field, most: [])
    with pytest.raises(Malformed, match="it holds 0 graphs, not one"):
        read_graph(FLOAT32)


# --- other networks ---------------------------------------------------------------------------------------


def anchors_moved(data: bytes) -> bytes:
    anchors = anchors_of(data)
    value = anchors.copy()
    value[7, 1] += 0.01
    return edited(data, anchors, value)


def anchors_swapped(data: bytes) -> bytes:
    """With rows and columns swapped, as in other detectors."""
    anchors = anchors_of(data)
    return edited(data, anchors, anchors[:, [1, 0, 3, 2]])


@pytest.mark.parametrize("change", [anchors_moved, anchors_swapped])
def test_anchors_must_be_automls(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    assert "its anchors are not arranged like AutoML's" in error_of(tmp_path, change(INT8))


def test_another_anchor_scale_and_ratios_are_read(tmp_path: Path) -> None:
    from parity_tests.helpers.tflite_files import centre_sizes

    config = TINY.replace(anchor_scale=4.5, aspect_ratios=(1.0, 1.4, 0.7))
    anchors = anchors_of(INT8)
    (tmp_path / "model.tflite").write_bytes(edited(INT8, anchors, centre_sizes(config)))
    settings = TFLiteCheckpoint(tmp_path / "model.tflite").settings
    assert settings["anchor_scale"] == 4.5
    assert settings["aspect_ratios"] == (1.0, 1.4, 0.7)
    assert settings["num_scales"] == 3


@pytest.fixture(scope="module")
def build(tensorflow: Any) -> Callable[..., bytes]:
    """Lite, changed: ``build(act_type=…)`` or ``build(options={…})``."""

    def convert(options: dict[str, float] | None = None, **changes: Any) -> bytes:
        config = TINY.replace(**changes)
        return tflite_bytes(config, tiny_variables(config), "float32", options is not None, options)

    return convert


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"act_type": "relu"}, "but the stem is 3×3 with stride 2 and relu6"),
        slow({"conv_bn_act_pattern": True}, "does not add maps of one shape, or has another activation"),
        slow({"survival_prob": 0.8}, "but the head at level 0 needs DEPTHWISE_CONV_2D"),
        slow({"options": {"y_scale": 10.0}}, "scales boxes, which AutoML does not"),
        slow({"options": {"num_classes": 4}}, "is not for the 5 classes of the class net"),
    ],
)
def test_variants_that_automl_does_not_export(
    tmp_path: Path, build: Callable[..., bytes], changes: dict[str, Any], said: str
) -> None:
    message = error_of(tmp_path, build(**changes))
    assert "is a TFLite model but not an EfficientDet" in message
    assert said in message


def test_a_classifier_is_rejected(tmp_path: Path, tensorflow: Any) -> None:
    """A network like MobileNet: one or two inverted residuals, pooling, and a dense layer."""
    tf = tensorflow
    rng = np.random.default_rng(0)

    def weights(*shape: int) -> Any:
        return tf.constant(rng.normal(size=shape).astype(np.float32))

    @tf.function(input_signature=[tf.TensorSpec([1, 64, 64, 3], tf.float32)], autograph=False)  # type: ignore[untyped-decorator]
    def mobilenet(x: Any) -> Any:
        x = tf.nn.relu6(tf.nn.conv2d(x, weights(3, 3, 3, 8), 2, "SAME"))
        x = tf.nn.relu6(tf.nn.depthwise_conv2d(x, weights(3, 3, 8, 1), [1, 1, 1, 1], "SAME"))
        x = tf.nn.conv2d(x, weights(1, 1, 8, 4), 1, "SAME")
        x = tf.nn.relu6(tf.nn.conv2d(x, weights(1, 1, 4, 64), 1, "SAME"))
        return tf.nn.softmax(tf.linalg.matmul(tf.reduce_mean(x, [1, 2]), weights(64, 10)))

    message = error_of(tmp_path, convert_function(mobilenet, np.zeros((1, 64, 64, 3), np.float32)))
    assert "operator 3 (CONV_2D) is followed by MEAN, but blocks_1 needs DEPTHWISE_CONV_2D" in message


def test_heads_that_share_nothing_are_rejected(tmp_path: Path, tensorflow: Any) -> None:
    """A head with a different random kernel at one level, as in a network with separate heads."""
    from unittest import mock

    from tf_reference import layers

    other = tiny_variables()
    name = "box_net/box-1/pointwise_kernel"
    other[name] = np.random.default_rng(0).permutation(other[name].reshape(-1)).reshape(other[name].shape)
    calls = []

    def separable_conv(net: Any, x: Any, scope: str) -> Any:
        calls.append(scope)
        if scope == "box_net/box-1" and calls.count(scope) == 4:  # level 6
            net = layers.Network({**net.variables, name: tensorflow.constant(other[name])})
        return original(net, x, scope)

    original = layers.separable_conv
    with mock.patch("tf_reference.heads.separable_conv", separable_conv):
        data = tflite_bytes(TINY, tiny_variables(), "float32")
    message = error_of(tmp_path, data)
    assert "box_net/box-1/pointwise_kernel is one kernel in AutoML" in message
    assert "box_net/box-1-bn-6" in message


@pytest.mark.slow
def test_equal_widths_without_postprocessing_are_ambiguous(tmp_path: Path, tensorflow: Any) -> None:
    """With four classes, class net and box net have the same width; only the layers after them differ."""
    config = TINY.replace(num_classes=4)
    variables = tiny_variables(config)
    bare = tflite_bytes(config, variables, "float32", postprocess=False)
    assert "its class net and its box net cannot be distinguished" in error_of(tmp_path, bare)
    (tmp_path / "model.tflite").write_bytes(tflite_bytes(config, variables, "float32"))
    found = TFLiteCheckpoint(tmp_path / "model.tflite")
    np.testing.assert_allclose(
        found["class_net/class-predict/bias"], variables["class_net/class-predict/bias"], rtol=1e-6
    )
