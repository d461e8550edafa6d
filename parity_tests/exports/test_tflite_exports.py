"""TFLite files of D models, and of AutoML's TensorFlow 1 exporter, which hold pixels and detections too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.helpers.exported.models import Export, served
from parity_tests.helpers.recordings import normalise
from parity_tests.helpers.tflite_files import TINY, convert_function, tflite_bytes
from porting.checkpoint import open_checkpoint
from porting.checkpoint.graph.anchors import anchor_settings, centre_sizes
from porting.checkpoint.tflite.flow import Mismatch
from porting.checkpoint.tflite.graph import Graph, read_graph
from porting.checkpoint.tflite.match import _backbone_config, _weight_method, match
from porting.checkpoint.tflite.structure import NodeMatch
from porting.checkpoint.tflite.weights import fusion_weights
from porting.convert import convert
from porting.errors import CheckpointError, EfficientDetError
from porting.infer import infer_config
from porting.parity.lockstep import compare
from porting.parity.reference.tflite import TFLiteReference
from porting.synthetic import synthetic_image, synthetic_variables
from pytorch_model.config import BackboneConfig, EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet

STAGES = TINY.backbone.stages
TINY_D = model_config("efficientdet-d0").replace(
    name="custom",
    backbone=BackboneConfig("efficientnet-b0", 8, STAGES),
    image_size=(96, 72),
    fpn_num_filters=16,
    fpn_cell_repeats=1,
    box_class_repeats=1,
    num_classes=4,  # as many as a box has numbers
)


def assert_ported(path: Path, config: EfficientDetConfig) -> dict[str, Any]:
    """The file at ``path`` ports, and every activation that it shows is ours. Returns its settings."""
    with open_checkpoint(path) as checkpoint:
        inference = infer_config(checkpoint.shapes, str(path), {}, checkpoint.settings)
        conversion = convert(checkpoint, inference.config)
        settings = dict(checkpoint.settings)
    assert inference.config.backbone == config.backbone
    assert inference.config.num_classes == config.num_classes
    model = EfficientDet.from_state_dict(conversion.state_dict, inference.config)
    reference = TFLiteReference(path, inference.config)
    images = normalise(synthetic_image(*inference.config.image_size)[None], inference.config)
    result = compare(model, reference.on(images), images, shown=reference.taps)
    assert result.passed, result.first_divergence
    print(f"{len(result.taps)} compared, worst {result.worst('accumulated').accumulated.relative:.1e}")
    return settings


@pytest.mark.parametrize(
    "method",
    [
        "fastattn",
        pytest.param("channel_fastattn", marks=pytest.mark.slow),
        pytest.param("sum", marks=pytest.mark.slow),
        pytest.param("attn", marks=pytest.mark.slow),
    ],
)
def test_d_models(tensorflow: Any, tmp_path: Path, method: str) -> None:
    config = TINY_D.replace(fpn_weight_method=method)
    variables = synthetic_variables(config, 3)
    if method == "fastattn":
        variables["fpn_cells/cell_0/fnode1/WSM"] = np.float32(0)  # folded into a convolution
        variables["fpn_cells/cell_0/fnode2/WSM_1"] = np.float32(-1)
    (tmp_path / "d.tflite").write_bytes(tflite_bytes(config, variables, "float32"))
    settings = assert_ported(tmp_path / "d.tflite", config)
    assert settings["act_type"] == "swish"
    assert settings.get("fpn_weight_method") == {"sum": None, "attn": "fastattn"}.get(method, method)
    assert (settings["anchor_scale"], settings["aspect_ratios"]) == (4.0, (1.0, 2.0, 0.5))


def exported_bytes(tf: Any, config: EfficientDetConfig, variables: dict[str, np.ndarray]) -> bytes:
    """As by AutoML's TensorFlow 1 exporter: grey levels in, [1, 100, 7] out."""
    constants = {name: tf.constant(value) for name, value in variables.items()}

    @tf.function(input_signature=[tf.TensorSpec([1, *config.image_size, 3], tf.uint8, name="image_arrays")])  # type: ignore[untyped-decorator]
    def detections(images: Any) -> Any:
        return {"detections": served(tf, config, constants, images, Export(joined=True))}

    return convert_function(detections, np.zeros((1, *config.image_size, 3), np.uint8))


@pytest.mark.parametrize("lite", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_grey_levels_in_and_detections_out(tensorflow: Any, tmp_path: Path, lite: bool) -> None:
    config = (TINY if lite else TINY_D).replace(
        aspect_ratios=((1.4, 0.7), (1.0, 1.0), (0.7, 1.4)), anchor_scale=2.5, num_scales=2
    )
    variables = synthetic_variables(config, 3)
    (tmp_path / "e.tflite").write_bytes(exported_bytes(tensorflow, config, variables))
    settings = assert_ported(tmp_path / "e.tflite", config)
    for name in ("image_size", "aspect_ratios", "anchor_scale", "num_scales"):
        assert settings[name] == getattr(config, name), name
    for name in ("mean_rgb", "stddev_rgb"):
        np.testing.assert_allclose(settings[name], getattr(config, name), rtol=1e-6)
    reference = TFLiteReference(tmp_path / "e.tflite", config)
    with pytest.raises(EfficientDetError, match=r"takes whole grey levels, and the image has others"):
        reference.on(np.full((1, *config.image_size, 3), 0.001, np.float32))


def test_googles_tensorflow_1_export(tensorflow: Any, shared: Path) -> None:
    path = shared / "exports" / "automl_lite0_tf1_export.tflite"
    settings = assert_ported(path, model_config("efficientdet-lite0", num_classes=3))
    assert settings["image_size"] == (128, 192)
    assert settings["mean_rgb"] == (127.0,) * 3
    assert settings["stddev_rgb"] == (128.0,) * 3
    assert settings["anchor_scale"] == 3.0


# --- images that are prepared in another way ------------------------------------------------------------


def resized(tf: Any, x: Any, size: int) -> Any:
    return tf.raw_ops.ResizeBilinear(images=x, size=[size, size])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda tf, x: tf.abs(x), "is followed by operator code 101, but the stem or a normalisation"),
        (lambda tf, x: resized(tf, x * -2.0, 96), "multiplies the image by a number that is not positive"),
        (lambda tf, x: resized(tf, x, 48), "changes the image in another way"),
    ],
)
def test_images_prepared_in_another_way(
    tensorflow: Any, tmp_path: Path, prepare: Callable[[Any, Any], Any], message: str
) -> None:
    tf = tensorflow
    kernel = tf.ones((3, 3, 3, 8))

    @tf.function(input_signature=[tf.TensorSpec([1, 96, 96, 3], tf.uint8)])  # type: ignore[untyped-decorator]
    def network(images: Any) -> Any:
        return tf.nn.conv2d(prepare(tf, tf.cast(images, tf.float32)), kernel, 2, "SAME")

    (tmp_path / "n.tflite").write_bytes(convert_function(network, np.zeros((1, 96, 96, 3), np.uint8)))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "n.tflite")


# --- fusion weights and anchors -------------------------------------------------------------------------


def node_with(*factors: float | None) -> NodeMatch:
    weights = tuple(None if factor is None else np.array([factor]) for factor in factors)
    return NodeMatch({}, None, weights)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "factors", [(0.5, 0.4999), (0.2, 0.3, 0.49), (0.0, 0.9999), (0.6, None), (None, 0.999999, 0.0)]
)
def test_fusion_weights_give_the_factors(factors: tuple[float | None, ...]) -> None:
    weights, free = fusion_weights(node_with(*factors))
    total = sum(weights) + 1e-4
    for i, (weight, factor) in enumerate(zip(weights, factors, strict=True)):
        np.testing.assert_allclose(
            weight / total, free[i] if factor is None else factor, rtol=1e-6, atol=1e-12
        )
    assert set(free) == {i for i, factor in enumerate(factors) if factor is None}
    assert all(value > 0 for value in free.values())


@pytest.mark.parametrize("factors", [(0.7, 0.4), (-0.1, 0.5)])
def test_fusion_weights_that_automl_cannot_have(factors: tuple[float, ...]) -> None:
    with pytest.raises(Mismatch, match="are negative or add up to more than 1"):
        fusion_weights(node_with(*factors))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_scales": 1, "aspect_ratios": (1.0,)},
        {"aspect_ratios": (1.0, 3.0, 0.33), "anchor_scale": 2.75},
        {"aspect_ratios": ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))},
        {"aspect_ratios": ((0.6, 1.5), (1.0, 1.0)), "num_scales": 2},
        {"anchor_scale": (4.0, 4.5, 5.0, 5.5, 6.0)},
    ],
)
def test_settings_behind_anchors(changes: dict[str, Any]) -> None:
    config = model_config("efficientdet-d0", image_size=(200, 328), **changes)
    found = anchor_settings(centre_sizes(config).astype(np.float32).astype(np.float64), config)
    assert found is not None
    assert {name: getattr(config, name) for name in found} == found


def test_anchors_that_automl_does_not_make() -> None:
    config = model_config("efficientdet-d0", image_size=(128, 128))
    anchors = centre_sizes(config)
    for wrong in (anchors[:-1], anchors * np.nan, -anchors, anchors[::-1], anchors[:, [1, 0, 3, 2]]):
        assert anchor_settings(wrong, config) is None or wrong is anchors


# --- D models that differ in one place ------------------------------------------------------------------


@pytest.fixture(scope="module")
def d_graph(tensorflow: Any) -> Graph:
    return read_graph(tflite_bytes(TINY_D, synthetic_variables(TINY_D, 3), "float32"))


def with_operator(graph: Graph, index: int, **changes: Any) -> Graph:
    operators = list(graph.operators)
    operators[index] = dataclasses.replace(operators[index], **changes)
    return dataclasses.replace(graph, operators=tuple(operators))


def with_tensor(graph: Graph, index: int, **changes: Any) -> Graph:
    tensors = list(graph.tensors)
    tensors[index] = dataclasses.replace(tensors[index], **changes)
    return dataclasses.replace(graph, tensors=tuple(tensors))


def test_squeeze_and_excitation_that_differs(d_graph: Graph) -> None:
    match(d_graph)
    mean = next(op for op in d_graph.operators if op.kind == "MEAN")
    with pytest.raises(Mismatch, match="but blocks_0/se needs MEAN and MUL"):
        match(with_operator(d_graph, mean.index, kind="SUB"))
    shape = {tensor.index: tensor.shape for tensor in d_graph.tensors}
    gates = [
        op for op in d_graph.operators if op.kind == "LOGISTIC" and shape[op.outputs[0]][:3] == (1, 1, 1)
    ]
    products = [
        op
        for op in d_graph.operators
        if op.kind == "MUL" and len({shape[i] for i in op.inputs}) == 2 and op.inputs[1] in shape
    ]
    gated = [op for op in products if any(gate.outputs[0] in op.inputs for gate in gates)]
    map_, _ = sorted(gated[1].inputs, key=lambda i: -np.prod(shape[i]))
    earlier = next(i for i in gated[0].inputs if shape[i][:3] == (1, 1, 1))
    with pytest.raises(Mismatch, match="does not gate its map as blocks_1/se does"):
        match(with_operator(d_graph, gated[1].index, inputs=(map_, earlier)))
    found = match(d_graph)
    assert found.blocks[1].se is not None
    squeeze, excite = found.blocks[1].se
    other = dataclasses.replace(found.blocks[1], se=(dataclasses.replace(squeeze, out_filters=7), excite))
    with pytest.raises(Mismatch, match="a quarter of its block's input filters"):
        _backbone_config(found.stem, (found.blocks[0], other, *found.blocks[2:]))


def test_fusion_that_differs(d_graph: Graph) -> None:
    constants = {tensor.index for tensor in d_graph.tensors if tensor.is_constant}
    factor = next(i for op in d_graph.operators if op.kind == "MUL" for i in op.inputs if i in constants)
    three = np.ones(3, np.float32).view(np.uint8)
    with pytest.raises(Mismatch, match="weights a map neither as a whole nor channel by channel"):
        match(with_tensor(d_graph, factor, shape=(3,), data=three))
    nodes = (node_with(0.5, 0.4), node_with(None, None))
    with pytest.raises(Mismatch, match="some of its nodes weight their inputs and others do not"):
        _weight_method([nodes])


def test_anchors_that_are_no_list(d_graph: Graph) -> None:
    anchors = d_graph.operators[-1].inputs[2]
    with pytest.raises(Mismatch, match="does not have a list of anchors, four numbers each"):
        match(with_tensor(d_graph, anchors, shape=(d_graph.tensors[anchors].data.size // 4,)))
