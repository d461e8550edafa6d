"""The Object Detection API's EfficientDet: a real index, the structure of every size, our values, rejections.

There were no real weights to test with: the meaning of the numbers is from the API's source.
"""

from __future__ import annotations

import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.helpers.object_trees import VALUE, Memory, graph_of, odapi_paths, pipeline_text
from parity_tests.helpers.paths import GOLDENS
from porting.checkpoint import Checkpoint, open_checkpoint
from porting.checkpoint.objects.detection_api import ENDPOINTS
from porting.checkpoint.objects.detection_api_layout import read_layout
from porting.checkpoint.objects.graph import Variable
from porting.checkpoint.objects.open import open_object_checkpoint
from porting.checkpoint.objects.pipeline_config import read_pipeline
from porting.checkpoint.v2.bundle import TensorBundle
from porting.checkpoint.v2.index import read_index
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import choose_variables, convert
from porting.errors import CheckpointError, ConversionError
from porting.infer import infer_config
from porting.scopes import EMA_SUFFIX
from pytorch_model.anchors import decode_boxes, generate_anchors
from pytorch_model.config import EfficientDetConfig, Resizer, model_config
from pytorch_model.efficientdet import EfficientDet
from tf_reference.variables import variable_shapes, variables

SIZES = [f"efficientdet-d{n}" for n in range(8)]


def blocks_run(config: EfficientDetConfig) -> int:
    stage, block = ENDPOINTS[5]
    return sum(s.repeats for s in config.backbone.stages[:stage]) + block + 1


def detector(config: EfficientDetConfig) -> EfficientDetConfig:
    """The API's network with the whole backbone of ``config``."""
    stages = config.backbone.stages
    third, fourth, fifth = (sum(s.repeats for s in stages[:stage]) + b for stage, b in ENDPOINTS.values())
    return config.replace(backbone=config.backbone.ending_at((third, fourth, fifth)))


def tree_of(config: EfficientDetConfig) -> dict[str, Variable]:
    """Path → variable of the whole detection model, including the top of the classifier."""
    paths, shapes = odapi_paths(config, blocks_run(config)), variable_shapes(config)
    tree = {}
    for name, path in paths.items():
        shape = shapes[name]
        if "/WSM" in name:
            shape = (sum(p == path for p in paths.values()), 1)
        tree[path] = Variable(path, "", shape)
    layers = {path.rpartition("/")[0] for path in tree if "layer_with_weights" in path}
    top = "_feature_extractor/classification_backbone/layer_with_weights-"
    filters = config.backbone.blocks[-1].out_filters
    more: dict[str, tuple[int, ...]] = {f"{len(layers)}/kernel": (1, 1, filters, 1280)}
    more |= {
        f"{len(layers) + 1}/{leaf}": (1280,) for leaf in ("beta", "gamma", "moving_mean", "moving_variance")
    }
    more |= {f"{len(layers) + 2}/kernel": (1280, 1000), f"{len(layers) + 2}/bias": (1000,)}
    return tree | {top + path: Variable(top + path, "", shape) for path, shape in more.items()}


def d0(**changes: Any) -> EfficientDetConfig:
    return model_config("efficientdet-d0", num_classes=2, **changes)


def stored(config: EfficientDetConfig, prefix: str = "model/") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        f"{prefix}{path}{VALUE}": rng.random(variable.shape, np.float32)
        for path, variable in tree_of(config).items()
    }


def model_folder(folder: Path, arrays: dict[str, np.ndarray], pipeline: str) -> Path:
    """The layout of the API's model zoo: ``checkpoint/ckpt-0``, and the pipeline in the folder above."""
    write_bundle(folder / "checkpoint" / "ckpt-0", arrays)
    (folder / "pipeline.config").write_text(pipeline)
    return folder / "checkpoint"


# --- structure ------------------------------------------------------------------------------------------


def real_tree() -> dict[str, Variable]:
    entries = read_index(GOLDENS / "bundle" / "snappy.index").entries
    return {
        key.removeprefix("model/").removesuffix(VALUE): Variable(key, "", entry.shape)
        for key, entry in entries.items()
        if key.startswith("model/")
    }


def test_every_variable_of_a_real_index_is_mapped() -> None:
    """The released D1: every AutoML variable once and in its shape, and the classifier's block and top."""
    config, tree = model_config("efficientdet-d1"), real_tree()
    layout = read_layout(tree)
    assert layout.backbone == config.backbone
    assert (layout.num_levels, layout.max_level) == (5, 7)
    shapes = {n: p.shape if p.take else tree[p.path].shape for n, p in layout.pieces.items()}
    assert shapes == variable_shapes(detector(config))
    top = "_feature_extractor/classification_backbone/layer_with_weights-"
    unused = {int(path.removeprefix(top).split("/")[0]) for path in layout.unused}
    assert unused == set(range(174, 185))
    assert len({piece.path for piece in layout.pieces.values()}) + len(layout.unused) == len(tree) == 875
    assert {piece.path: piece.path for piece in layout.pieces.values()}.keys() | layout.unused == tree.keys()


def test_a_real_detector_leaves_out_the_last_block() -> None:
    """Evidence that the API's D1 differs from AutoML's: it runs 22 of B1's 23 blocks."""
    assert read_layout(real_tree()).detector_blocks == 22
    assert len(model_config("efficientdet-d1").backbone.blocks) == 23


def test_the_trees_of_these_tests_are_real() -> None:
    tree = real_tree()
    expected = tree_of(model_config("efficientdet-d1"))
    assert {path: variable.shape for path, variable in expected.items()} == {
        path: variable.shape for path, variable in tree.items()
    }


@pytest.mark.parametrize("model", SIZES)
def test_names_and_back_for_every_size(model: str) -> None:
    config = model_config(model)
    tree = tree_of(config)
    layout = read_layout(tree)
    assert layout.backbone == config.backbone
    assert layout.detector_blocks == blocks_run(config)
    shapes = variable_shapes(detector(config))
    assert {n: p.shape if p.take else tree[p.path].shape for n, p in layout.pieces.items()} == shapes
    paths = {n: path for n, path in odapi_paths(config, blocks_run(config)).items() if n in shapes}
    assert {name: piece.path for name, piece in layout.pieces.items()} == paths


@given(
    st.integers(2, 7),
    st.integers(2, 5),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from(["fastattn", "sum"]),
)
@settings(max_examples=25, deadline=None)
def test_names_and_back_for_other_pyramids(
    levels: int, lowest: int, cells: int, repeats: int, method: str
) -> None:
    config = model_config(
        "efficientdet-d0",
        min_level=lowest,
        max_level=max(lowest + levels - 1, 6),
        fpn_cell_repeats=cells,
        box_class_repeats=repeats,
        fpn_weight_method=method,
        fpn_num_filters=48,
    )
    tree = tree_of(config)
    pieces = read_layout(tree).pieces
    assert {name: piece.path for name, piece in pieces.items()} == odapi_paths(config, blocks_run(config))
    assert {n: p.shape if p.take else tree[p.path].shape for n, p in pieces.items()} == variable_shapes(
        config
    )


# --- values ---------------------------------------------------------------------------------------------


def test_values_of_a_detector(tmp_path: Path) -> None:
    """D0 with our values: all of them arrive, and the predictors' channels are in AutoML's order."""
    config = d0()
    arrays = stored(config)
    arrays["save_counter" + VALUE] = np.array(1, np.int64)
    folder = model_folder(tmp_path, arrays, pipeline_text())
    paths = odapi_paths(config, blocks_run(config))
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.format == "TensorFlow Object Detection API checkpoint"
        assert dict(checkpoint.shapes) == variable_shapes(config)
        for name, array in checkpoint.read_many(checkpoint):
            theirs = arrays[f"model/{paths[name]}{VALUE}"]
            assert array.shape == checkpoint.shapes[name], name
            assert array.dtype == np.float32
            assert array.flags.owndata, name
            if "/WSM" in name:
                index = int(name.partition("WSM_")[2] or 0)
                assert array == theirs[index, 0], name
            elif name.endswith(("predict/pointwise_kernel", "predict/bias")):
                outputs = 2 if name.startswith("class_net") else 4
                by_ratio = theirs.reshape(*theirs.shape[:-1], 3, 3, outputs)  # aspect ratio, scale, output
                ours = np.swapaxes(by_ratio, -3, -2).reshape(theirs.shape)
                assert array.tobytes() == np.ascontiguousarray(ours).tobytes(), name
            else:
                assert array.tobytes() == theirs.tobytes(), name
        inference = infer_config(checkpoint.shapes, checkpoint.source)
        assert inference.config == config
        assert convert(checkpoint, inference.config).coverage.unused_count == 0
        notes = "\n".join(checkpoint.notes)
    assert "this layout was not tested with real weights" in notes
    assert "left out 7 variables outside the detector (model/_feature_extractor/classification_" in notes
    assert "left out 1 variable of the training loop (save_counter)" in notes
    assert "its suppression is hard, AutoML's is used unless you give detect and eval --hparams nms" in notes


@pytest.mark.parametrize("ratios", [(1.0, 2.0, 0.5), (0.5, 1.0, 2.0), (1.0, 3.0)])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("coder", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_the_same_detections(
    tmp_path: Path, ratios: tuple[float, ...], background: bool, coder: tuple[float, ...]
) -> None:
    """Boxes and logits of one location: the API's channels by its rules, ours by AutoML's."""
    scales, classes = 3 if len(ratios) == 3 else 2, 2
    anchors = scales * len(ratios)
    config = d0(aspect_ratios=ratios if len(ratios) == 2 else (1.0, 2.0, 0.5), num_scales=scales)
    arrays = stored(config)
    rng = np.random.default_rng(1)
    head = (
        "model/_box_predictor/_prediction_heads/class_predictions_with_background/_class_predictor_layers/0"
    )
    slots = classes + background
    for leaf, shape in (("pointwise_kernel", (1, 1, 64, anchors * slots)), ("bias", (anchors * slots,))):
        arrays[f"{head}/{leaf}{VALUE}"] = rng.standard_normal(shape).astype(np.float32)
    text = pipeline_text(
        background=str(background).lower(),
        ratios=list(ratios),
        scales=scales,
        box_coder="y_scale: {} x_scale: {} height_scale: {} width_scale: {}".format(*coder),
    )
    features = rng.standard_normal(64)
    theirs = their_predictions(arrays, features, ratios, scales, slots, background, coder)
    with open_checkpoint(model_folder(tmp_path, arrays, text)) as checkpoint:
        ours = our_predictions(checkpoint, config, features)
        inferred = infer_config(checkpoint.shapes, settings=checkpoint.settings).config
        assert (inferred.aspect_ratios, inferred.num_scales) == (config.aspect_ratios, scales)
    assert len(ours) == len(theirs) == anchors
    for (box, logits), (their_box, their_logits) in zip(sorted(ours), sorted(theirs), strict=True):
        np.testing.assert_allclose(box, their_box, rtol=1e-4, atol=1e-4)  # float32 sums of 64 products
        np.testing.assert_allclose(logits, their_logits, rtol=1e-5)


def test_packed_like_the_model_zoo(tmp_path: Path) -> None:
    whole = model_config("efficientdet-d1", num_classes=2, fpn_cell_repeats=1, box_class_repeats=1)
    arrays = stored(whole)
    pipeline = pipeline_text(extractor="ssd_efficientnet-b1_bifpn_keras", anchor_scale=3.5)
    folder = model_folder(tmp_path / "efficientdet_d1", arrays, pipeline)
    with tarfile.open(tmp_path / "d1.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "efficientdet_d1", "efficientdet_d1")
    with open_checkpoint(folder) as unpacked, open_checkpoint(tmp_path / "d1.tar.gz") as checkpoint:
        assert checkpoint.settings == unpacked.settings
        assert checkpoint.settings["endpoints"] == (6, 14, 21)
        assert "this layout was not tested with real weights" in checkpoint.notes[0]
        name = "efficientnet-b1/stem/conv2d/kernel"
        key = f"model/_feature_extractor/_efficientnet/layer_with_weights-0/kernel{VALUE}"
        assert checkpoint[name].tobytes() == arrays[key].tobytes()


Prediction = tuple[tuple[float, ...], tuple[float, ...]]


def their_predictions(
    arrays: dict[str, np.ndarray],
    features: np.ndarray,
    ratios: tuple[float, ...],
    scales: int,
    slots: int,
    background: bool,
    coder: tuple[float, ...],
) -> list[Prediction]:
    """(box yxyx, class logits) of each anchor at the centre of the first cell of P3, by the API's rules."""

    def predict(head: str) -> np.ndarray:
        kernel = arrays[f"model/_box_predictor/{head}/pointwise_kernel{VALUE}"][0, 0]
        return features @ kernel + arrays[f"model/_box_predictor/{head}/bias{VALUE}"]

    codes = predict("_box_prediction_head/_box_encoder_layers/0").reshape(-1, 4) / coder
    head = "_prediction_heads/class_predictions_with_background/_class_predictor_layers/0"
    logits = predict(head).reshape(-1, slots)[:, int(background) :]
    found: list[Prediction] = []
    for i, (ratio, scale) in enumerate((r, 2 ** (s / scales)) for r in ratios for s in range(scales)):
        height, width = 32 * scale / np.sqrt(ratio), 32 * scale * np.sqrt(ratio)
        ty, tx, th, tw = codes[i]
        y, x, h, w = ty * height + 4, tx * width + 4, np.exp(th) * height, np.exp(tw) * width
        found.append(((y - h / 2, x - w / 2, y + h / 2, x + w / 2), tuple(logits[i])))
    return found


def our_predictions(
    checkpoint: Checkpoint, config: EfficientDetConfig, features: np.ndarray
) -> list[Prediction]:
    def predict(scope: str) -> np.ndarray:
        return features @ checkpoint[f"{scope}/pointwise_kernel"][0, 0] + checkpoint[f"{scope}/bias"]

    anchors = generate_anchors(config)[: config.num_anchors].double()
    codes = torch.from_numpy(predict("box_net/box-predict").reshape(-1, 4))
    logits = predict("class_net/class-predict").reshape(config.num_anchors, -1)
    boxes = decode_boxes(codes, anchors).numpy()
    return [(tuple(box), tuple(row)) for box, row in zip(boxes, logits, strict=True)]


@pytest.mark.parametrize(
    ("model", "endpoints"),
    [
        ("efficientdet-d1", (6, 14, 21)),
        ("efficientdet-d4", (7, 18, 30)),
        ("efficientdet-d7", (10, 25, 42)),
    ],
)
def test_deeper_backbones_are_a_different_network(
    tmp_path: Path, model: str, endpoints: tuple[int, int, int]
) -> None:
    """Their pyramid comes from the middle of AutoML's stages; the detector has no blocks after it."""
    whole = model_config(model, num_classes=2, fpn_num_filters=16, fpn_cell_repeats=1, box_class_repeats=1)
    pipeline = pipeline_text(
        extractor=f"ssd_{whole.backbone.name}_bifpn_keras",
        combine="combine_method: 'sum'" if whole.fpn_weight_method == "sum" else "",
    )
    with open_checkpoint(model_folder(tmp_path, stored(whole), pipeline)) as checkpoint:
        inference = infer_config(checkpoint.shapes, checkpoint.source, settings=checkpoint.settings)
        assert inference.unseen == ()  # the pipeline, or the API's own code, says how the network computes
        config = inference.config
        result = convert(checkpoint, config)
        blocks = f"{whole.backbone.name}/blocks_{endpoints[-1] + 1}/"
        assert not any(name.startswith(blocks) for name in checkpoint)
    assert inference.variant is None
    settings: dict[str, Any] = {"image_size": (512, 512), "anchor_scale": 4.0}  # not those of the variant
    settings |= {"resizer": Resizer("keep_aspect_ratio"), "anchor_stride": "power_of_two"}
    assert config == detector(whole).replace(name="custom", **settings)
    assert config.backbone.endpoints == endpoints
    assert result.coverage.unused_count == 0
    assert set(result.state_dict) == set(EfficientDet(config).state_dict())


def test_the_backbones_name_may_be_given_too(tmp_path: Path) -> None:
    """AutoML's yaml files always name it; that the detector leaves out blocks is not a contradiction."""
    whole = model_config("efficientdet-d1", num_classes=2, fpn_cell_repeats=1, box_class_repeats=1)
    pipeline = pipeline_text(extractor="ssd_efficientnet-b1_bifpn_keras")
    with open_checkpoint(model_folder(tmp_path, stored(whole), pipeline)) as checkpoint:
        about = checkpoint.shapes, checkpoint.source
        found = infer_config(*about, settings=checkpoint.settings)
        named = infer_config(*about, {"backbone": whole.backbone}, checkpoint.settings)
        assert named.config == found.config
        other = {"backbone": model_config("efficientdet-d3").backbone}
        with pytest.raises(
            ConversionError, match=r"backbone was given as efficientnet-b3, .* say efficientnet-b1"
        ):
            infer_config(*about, other, checkpoint.settings)


def test_the_blocks_of_the_pyramid() -> None:
    config = detector(model_config("efficientdet-d1"))
    backbone = EfficientDet(config).backbone.eval()
    outputs: list[torch.Tensor] = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        features = backbone(torch.rand(1, 3, 64, 64))
    assert len(outputs) == 22
    for feature, index, side in zip(features, (6, 14, 21), (8, 4, 2), strict=True):
        assert torch.equal(feature, outputs[index])
        assert feature.shape[-2:] == (side, side)


def test_the_pipelines_settings(tmp_path: Path) -> None:
    """Settings of the pipeline get into the configuration, unless the user overrides them."""
    arrays = stored(d0(fpn_cell_repeats=1, box_class_repeats=1))
    folder = model_folder(tmp_path, arrays, pipeline_text(anchor_scale=3.5, size=640))
    with open_checkpoint(folder) as checkpoint:
        inference = infer_config(checkpoint.shapes, checkpoint.source, settings=checkpoint.settings)
    assert (inference.config.anchor_scale, inference.config.image_size) == (3.5, (640, 640))
    assert inference.config.aspect_ratios == (1.0, 2.0, 0.5)
    # The pipeline and the API's code say everything; one cell and one repeat are no released variant.
    assert [line.partition(" has ")[0] for line in inference.assumed] == ["no released variant"]


def test_an_image_size_that_is_not_square(tmp_path: Path) -> None:
    path = tmp_path / "pipeline.config"
    path.write_text(pipeline_text(resizer="fixed_shape_resizer { width: 640 height: 480 }"))
    assert read_pipeline(path).image_size == (480, 640)


def test_training_state(tmp_path: Path) -> None:
    """A checkpoint of the API's trainer: step, momentum and averages, all with reordered channels."""
    config = d0()
    arrays = stored(config)
    trainable = {v.name for v in variables(config) if v.trainable}
    paths = odapi_paths(config, blocks_run(config))
    mean = "resample_p6/bn/moving_mean"  # the API's optimizer can average these too
    for name in {*trainable, mean}:
        key = f"model/{paths[name]}"
        for slot, change in (("average", 1), ("momentum", -1)):
            arrays[f"{key}/.OPTIMIZER_SLOT/optimizer/{slot}{VALUE}"] = arrays[key + VALUE] + np.float32(
                change
            )
    arrays["step" + VALUE] = np.array(9, np.int64)
    arrays["optimizer/iter" + VALUE] = np.array(9, np.int64)
    with open_checkpoint(model_folder(tmp_path, arrays, pipeline_text())) as checkpoint:
        assert checkpoint.step == 9
        for name in ("box_net/box-predict/bias", "fpn_cells/cell_0/fnode4/WSM_1", mean):
            np.testing.assert_array_equal(checkpoint[name + EMA_SUFFIX], checkpoint[name] + np.float32(1))
            np.testing.assert_array_equal(checkpoint[name + "/Momentum"], checkpoint[name] + np.float32(-1))
        assert choose_variables(checkpoint, config, raw=False)[2] == "EMA"


def test_saved_model_by_its_graph(tmp_path: Path) -> None:
    """In the API's SavedModels the keys are numbers in lists; the attributes are in the graph."""
    config = d0()
    tree = tree_of(config)
    keys = {f"_model/{path}": f"_model/variables/{n}" for n, path in enumerate(tree)}
    arrays = {
        keys[f"_model/{path}"] + VALUE: np.full(variable.shape, n, np.float32)
        for n, (path, variable) in enumerate(tree.items())
    }
    (tmp_path / "pipeline.config").write_text(pipeline_text())
    graph = graph_of(dict.fromkeys(keys, ""), keys)
    memory = Memory(arrays, graph, str(tmp_path / "saved_model" / "variables" / "variables"))
    checkpoint = open_object_checkpoint(cast(TensorBundle, memory))
    assert dict(checkpoint.shapes) == variable_shapes(config)
    path = odapi_paths(config, blocks_run(config))["class_net/class-0/bias"]
    assert checkpoint["class_net/class-0/bias"][0] == list(tree).index(path)


# --- label maps -----------------------------------------------------------------------------------------

LABEL_MAP = "item {\n id: 2\n display_name: 'a bee'\n name: '/m/01'\n}\nitem { name: 'ant', id: 1 }\n"


def with_label_map(*paths: str) -> str:
    readers = "".join(f"train_input_reader {{ label_map_path: '{path}' }}\n" for path in paths)
    return f"{pipeline_text()}{readers}eval_input_reader: {{ label_map_path: 'PATH/label_map.pbtxt' }}\n"


@pytest.fixture(scope="module")
def few_arrays() -> dict[str, np.ndarray]:
    return stored(d0(fpn_cell_repeats=1, box_class_repeats=1))


@pytest.mark.parametrize("inner", ["", "annotations", "data"])
@pytest.mark.parametrize("pack", [False, True])
def test_a_label_map_beside_the_pipeline(
    tmp_path: Path, few_arrays: dict[str, np.ndarray], inner: str, pack: bool
) -> None:
    """Its names are those of the configuration, whatever folder the pipeline says."""
    model = tmp_path / "model"
    folder = model_folder(model, few_arrays, with_label_map("C:\\\\data\\\\my_label_map.pbtxt"))
    (model / inner).mkdir(exist_ok=True)
    (model / inner / "my_label_map.pbtxt").write_text(LABEL_MAP)
    path = folder
    if pack:
        path = tmp_path / "model.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(model, ".")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.settings["class_names"] == ("ant", "a bee")
        assert any(
            note.startswith("class names are from") and "my_label_map.pbtxt" in note
            for note in checkpoint.notes
        )
        inference = infer_config(checkpoint.shapes, checkpoint.source, settings=checkpoint.settings)
    assert inference.config.class_names == ("ant", "a bee")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "names the label map 'label_map.pbtxt', which is not beside it; put it there"),
        ("item { id: 3 name: 'wasp' }", "are not used: it names class 3, but the model has classes 1 to 2"),
        ("item { id: 0 name: 'wasp' }", r"are not used: it names class 0 \('wasp'\), but the API's classes"),
        ("item { id: 1", "are not used: line 1"),
        ("#" * (1 << 21), "are not used: it cannot be read: it has more than 1,048,576 bytes"),
    ],
)
def test_a_label_map_that_gives_no_names(
    tmp_path: Path, few_arrays: dict[str, np.ndarray], content: str | None, reason: str
) -> None:
    """One outside the model's folder is not looked at either. The weights are converted all the same."""
    folder = model_folder(tmp_path / "model", few_arrays, with_label_map("../label_map.pbtxt"))
    (tmp_path / "label_map.pbtxt").write_text(LABEL_MAP)
    if content is not None:
        (tmp_path / "model" / "label_map.pbtxt").write_text(content)
    with open_checkpoint(folder) as checkpoint:
        assert "class_names" not in checkpoint.settings
        assert re.search(reason, "\n".join(checkpoint.notes))


def test_no_label_map_is_named(tmp_path: Path, few_arrays: dict[str, np.ndarray]) -> None:
    with open_checkpoint(model_folder(tmp_path, few_arrays, pipeline_text())) as checkpoint:
        assert not any("label map" in note or "class names" in note for note in checkpoint.notes)


# --- what must be rejected -------------------------------------------------------------------------------


def test_without_pipeline(tmp_path: Path) -> None:
    write_bundle(tmp_path / "a" / "b" / "c" / "ckpt-0", stored(d0()))
    (tmp_path / "pipeline.config").write_text(pipeline_text())  # too far up to belong to this model
    with pytest.raises(CheckpointError, match=r"the box coding, .* are only in its pipeline\.config"):
        open_checkpoint(tmp_path / "a" / "b" / "c")


@pytest.mark.parametrize(
    "prefix",
    ["ckpt-0", "model/ckpt-0", "variables/ckpt-0", "variables/variables", "saved/variables/variables"],
)
def test_a_pipeline_outside_the_archive_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    """An archive is unpacked in a place where other users may write too."""
    write_bundle(tmp_path / "model" / prefix, stored(d0()))
    (tmp_path / "shared").mkdir()
    for outside in ("", "shared"):
        (tmp_path / outside / "pipeline.config").write_text(pipeline_text(anchor_scale=3.0, size=896))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    with tarfile.open(tmp_path / "model.tar", "w") as tar:
        tar.add(tmp_path / "model", ".")
    beside = "its folder variables" if prefix.endswith("variables/variables") else "ckpt-0.index"
    advice = (
        rf"model\.tar:.* only in its pipeline\.config; .*, beside {beside} \(unpack an archive for that\)$"
    )
    with pytest.raises(CheckpointError, match=advice):
        open_checkpoint(tmp_path / "model.tar")
    assert [path.name for path in (tmp_path / "shared").iterdir()] == ["pipeline.config"]


@pytest.mark.parametrize("inner", ["model", "variables", "checkpoint"])
def test_a_pipeline_two_folders_up_is_not_used(tmp_path: Path, inner: str) -> None:
    write_bundle(tmp_path / "model" / inner / "ckpt-0", stored(d0()))
    (tmp_path / "pipeline.config").write_text(pipeline_text(anchor_scale=3.0, size=896))
    with pytest.raises(CheckpointError, match=r"the box coding, .* are only in its pipeline\.config"):
        open_checkpoint(tmp_path / "model" / inner)


@pytest.mark.parametrize(
    ("prefix", "named", "pipeline"),
    [
        pytest.param("training/ckpt-7", "training", "", id="training"),
        pytest.param("export/1/variables/variables", "export/1", "export", id="SavedModel by version"),
        pytest.param("saved/variables/variables", "saved", "saved", id="in a SavedModel"),
        pytest.param("checkpoint/ckpt-0", ".", "", id="the model zoo's folder"),
    ],
)
@pytest.mark.parametrize("pack", [False, True])
def test_where_a_pipeline_is_found(
    tmp_path: Path, prefix: str, named: str, pipeline: str, pack: bool
) -> None:
    folder = tmp_path / "model"
    write_bundle(folder / prefix, stored(d0()))
    (folder / pipeline / "pipeline.config").write_text(pipeline_text(anchor_scale=3.5))
    path = folder / named
    if pack:
        path = tmp_path / "model.tar"
        with tarfile.open(path, "w") as tar:
            tar.add(folder, ".")
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.settings["anchor_scale"] == 3.5


def test_a_pipeline_of_a_thousand_shards(tmp_path: Path) -> None:
    shards = "".join(
        f'    input_path: "gs://bucket/a-data-set/tfrecords/train.record-{n:05}-of-01000"\n'
        for n in range(1000)
    )
    text = pipeline_text() + f"train_input_reader {{ tf_record_input_reader {{\n{shards}}} }}\n"
    assert len(text) > 64 << 10
    (tmp_path / "pipeline.config").write_text(text)
    assert read_pipeline(tmp_path / "pipeline.config").num_classes == 2


def test_a_pipeline_beside_the_checkpoint(tmp_path: Path) -> None:
    """Where training leaves it. It has priority over one in the folder above."""
    model_folder(tmp_path, stored(d0()), pipeline_text(anchor_scale=3.0))
    (tmp_path / "checkpoint" / "pipeline.config").write_text(pipeline_text(anchor_scale=3.5))
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        assert checkpoint.settings["anchor_scale"] == 3.5
        assert any(str(tmp_path / "checkpoint/pipeline.config") in note for note in checkpoint.notes)


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        (
            {"extractor": "ssd_efficientnet-b1_bifpn_keras"},
            "feature_extractor type is ssd_efficientnet-b1_bifpn_keras, must be efficientnet-b0 as in the",
        ),
        ({"num_classes": 3}, "num_classes is 3, must be 2 as in the checkpoint"),
        ({"num_classes": 0}, "num_classes is 0, must be 2 as in the checkpoint"),
        ({"background": "true"}, "num_classes is 2, must be 1 besides the background class as in the"),
        ({"combine": "combine_method: 'attention'"}, "combine_method is attention, must be fast_attention"),
        ({"combine": "combine_method: 'sum'"}, "combine_method is sum, must be fast_attention"),
        ({"activation": "RELU_6"}, "activation is RELU_6, SWISH, must be SWISH"),
        ({"epsilon": 0.01}, "batch_norm epsilon is 0.01, 0.001, must be 0.001"),
        ({"converter": "SOFTMAX"}, "score_converter .* is SOFTMAX, 1, must be SIGMOID, 1"),
        ({"converter": "SIGMOID logit_scale: 2.0"}, "logit_scale is SIGMOID, 2, must be SIGMOID, 1"),
        ({"box_coder": "y_scale: 0"}, "box_coder scales is 0, 10, 5, 5, must be above 0"),
        ({"anchor_level": 8}, "anchor levels is 3, 8, must be 3, 7 as in the checkpoint"),
        ({"bifpn_level": 8}, "bifpn levels is 3, 8, must be 3, 7 as in the checkpoint"),
        ({"ratios": "[1.0, 1.0, 0.5]"}, "aspect_ratios is 1, 1, 0.5, must be different numbers"),
        ({"ratios": "[1.0, 2.0]"}, "number of anchors at a location is 6, must be 9 as in the checkpoint"),
        ({"scales": 2}, "number of anchors at a location is 6, must be 9 as in the checkpoint"),
    ],
)
def test_pipelines_of_other_models(tmp_path: Path, changes: dict[str, Any], wrong: str) -> None:
    """Both values are named."""
    folder = model_folder(
        tmp_path, stored(d0(fpn_cell_repeats=1, box_class_repeats=1)), pipeline_text(**changes)
    )
    with pytest.raises(CheckpointError, match=f"does not belong to the checkpoint, .*: its .*{wrong}"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("text", "detector"),
    [
        (
            pipeline_text(extractor="ssd_mobilenet_v2_keras"),
            "'ssd' with the feature extractor 'ssd_mobilenet_v2_keras'",
        ),
        (
            "model { faster_rcnn { feature_extractor { type: 'faster_rcnn_resnet50_keras' } } }",
            "'faster_rcnn' with the feature extractor 'faster_rcnn_resnet50_keras'",
        ),
        (
            "model { center_net { feature_extractor { type: 'hourglass_104' } } }",
            "'center_net' with the feature extractor 'hourglass_104'",
        ),
    ],
)
@pytest.mark.parametrize("like_ssd", [True, False])
def test_other_detectors_are_named(tmp_path: Path, text: str, detector: str, like_ssd: bool) -> None:
    """By their pipeline, whether or not their parts have the names of EfficientDet's."""
    names = [
        "_feature_extractor/classification_backbone/layer_with_weights-0/kernel",
        "_box_predictor/0/bias",
    ]
    if not like_ssd:
        names = ["_feature_extractor_for_box_classifier_features/0/kernel"]
    arrays = {f"model/{name}{VALUE}": np.zeros((2, 2), np.float32) for name in names}
    write_bundle(tmp_path / "ckpt-0", arrays)
    (tmp_path / "pipeline.config").write_text(text)
    graph = graph_of({f"model/{name}": "" for name in names})
    memory = Memory(arrays, graph, str(tmp_path / "ckpt-0"))
    with pytest.raises(CheckpointError, match=f"describes another detector, {detector}; of the Object"):
        open_object_checkpoint(cast(TensorBundle, memory))


def test_another_detector_without_a_pipeline() -> None:
    """Then the parts of its feature extractor are named; nothing is said about biases."""
    names = [
        "_feature_extractor/classification_backbone/layer_with_weights-0/kernel",
        "_feature_extractor/_fpn_features_generator/top_layers/0/kernel",
        "_box_predictor/_box_prediction_head/_box_encoder_layers/0/kernel",
    ]
    arrays = {f"model/{name}{VALUE}": np.zeros((2, 2), np.float32) for name in names}
    reason = (
        "it is another detector: its _feature_extractor has _fpn_features_generator, "
        "classification_backbone, and lacks _efficientnet and _bifpn_stage"
    )
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_object_checkpoint(
            cast(TensorBundle, Memory(arrays, graph_of({f"model/{n}": "" for n in names})))
        )
    assert "force_use_bias" not in str(caught.value)


def test_a_backbone_of_other_layers_says_nothing_of_biases() -> None:
    tree = tree_of(d0())
    del tree["_feature_extractor/_efficientnet/layer_with_weights-4/bias"]
    with pytest.raises(CheckpointError, match=r"lacks bias$"):
        read_layout(tree, "ckpt-0")


def without(part: str) -> Callable[[dict[str, Variable]], None]:
    def change(tree: dict[str, Variable]) -> None:
        gone = [path for path in tree if part in path]
        assert gone
        for path in gone:
            del tree[path]

    return change


def with_another(path: str) -> Callable[[dict[str, Variable]], None]:
    return lambda tree: tree.update({path: Variable(path, "", (1,))})


BOX, BIFPN = "_box_predictor/_head_scope_conv_layers", "_feature_extractor/_bifpn_stage"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            without(f"{BOX}/BoxPredictionTower/0/bias"),
            "lacks bias; it was trained with force_use_bias: false",
        ),
        (without(f"{BOX}/ClassPredictionTower/2"), "class-2 does not need, and lacks bias, depthwise_kernel"),
        (
            without("_efficientnet/layer_with_weights-7/"),
            "backbone layers are not numbered from 0 without gaps",
        ),
        (
            without("layer_with_weights"),
            "another detector: its _feature_extractor has _bifpn_stage, and lacks",
        ),
        (
            without("node_post_combine_block/9/"),
            "23 BiFPN nodes after 2 levels above P5 do not make whole cells of 8",
        ),
        (
            without("node_post_combine_block/25/2"),
            "fnode7/op_after_combine12/bn does not need, and lacks beta",
        ),
        (
            without("box_encodings/4/"),
            r"node_combine_op/5/bifpn_combine_weights has shape \[2, 1\], not \[3, 1\]",
        ),
        (without(f"{BOX}/BoxPredictionTower"), "its heads are not two towers"),
        (with_another(f"{BOX}/PredictionTower/0/kernel"), "its heads are not two towers"),
        (with_another(f"{BOX}/BoxPredictionTower/3/bias"), "ClassPredictionTower/3 has nothing that"),
        (with_another("_box_predictor/more/kernel"), r"_box_predictor/more/kernel \(1 in all\) is not part"),
        (with_another(f"{BIFPN}/node_combine_op/4/bifpn_combine_weights"), r"has shape \[1\], not \[2, 1\]"),
        (with_another("_feature_extractor/_efficientnet/layer_with_weights-3/bias"), "has bias that"),
    ],
)
def test_trees_that_almost_fit(change: Callable[[dict[str, Variable]], None], reason: str) -> None:
    tree = tree_of(d0())
    change(tree)
    with pytest.raises(CheckpointError, match=reason):
        read_layout(tree, "ckpt-0")


@pytest.mark.parametrize("kept", range(1, 40))
def test_a_backbone_that_ends_anywhere(kept: int) -> None:
    cut = re.compile(r"layer_with_weights-(\d+)/")
    tree = {
        path: variable
        for path, variable in tree_of(d0()).items()
        if not (number := cut.search(path)) or int(number[1]) < kept
    }
    with pytest.raises(CheckpointError, match=r"backbone (ends before|of \d+ blocks is not one)|and lacks"):
        read_layout(tree, "ckpt-0")


def test_a_detector_that_runs_the_classifier() -> None:
    tree = {path.replace("classification_backbone", "_efficientnet"): v for path, v in tree_of(d0()).items()}
    with pytest.raises(
        CheckpointError, match=r"_efficientnet/layer_with_weights-128 does not belong to a block"
    ):
        read_layout(tree)


def test_another_backbone() -> None:
    config = model_config("efficientdet-d0")
    tree = {
        path: Variable(path, "", tuple(n + 1 for n in variable.shape))
        for path, variable in tree_of(config).items()
    }
    with pytest.raises(CheckpointError, match=r"its backbone of 16 blocks is not one of EfficientNet-B0…B7"):
        read_layout(tree)


def test_a_fork_that_uses_other_blocks(tmp_path: Path) -> None:
    """With all of B1 in the detector, the source of its pyramid is unknown."""
    config = model_config("efficientdet-d1", num_classes=2, fpn_cell_repeats=1, box_class_repeats=1)
    shapes = variable_shapes(config)
    arrays = {
        path + VALUE: np.zeros((sum(p == path for p in odapi_paths(config, 23).values()), 1), np.float32)
        if "/WSM" in name
        else np.zeros(shapes[name], np.float32)
        for name, path in odapi_paths(config, 23).items()
    }
    with pytest.raises(
        CheckpointError, match="runs 23 blocks of efficientnet-b1, the Object Detection API runs 22"
    ):
        open_object_checkpoint(cast(TensorBundle, Memory(arrays)))


# --- pipeline.config ------------------------------------------------------------------------------------


def test_a_real_pipeline(shared: Path) -> None:
    pipeline = read_pipeline(shared / "checkpoint_index/odapi_d1/pipeline.config")
    assert pipeline.feature_extractor == "ssd_efficientnet-b1_bifpn_keras"
    assert pipeline.num_classes == 90
    assert not pipeline.add_background_class
    assert pipeline.box_scales == (1, 1, 1, 1)
    assert (pipeline.aspect_ratios, pipeline.scales_per_octave) == ((1.0, 2.0, 0.5), 3)
    assert pipeline.anchor_scale == 4
    assert pipeline.anchor_levels == pipeline.bifpn_levels == (3, 7)
    assert pipeline.activations == ("SWISH", "SWISH")
    assert pipeline.image_size == (640, 640)


def test_defaults_are_the_apis(tmp_path: Path) -> None:
    text = """model { ssd { num_classes: 1 feature_extractor { conv_hyperparams {} }
      box_predictor { weight_shared_convolutional_box_predictor { conv_hyperparams {} } }
      box_coder { faster_rcnn_box_coder {} } anchor_generator { multiscale_anchor_generator {} } } }"""
    (tmp_path / "pipeline.config").write_text(text)
    pipeline = read_pipeline(tmp_path / "pipeline.config")
    assert pipeline.add_background_class
    assert pipeline.box_scales == (10, 10, 5, 5)
    assert (pipeline.scales_per_octave, pipeline.aspect_ratios, pipeline.anchor_scale) == (2, (), 4)
    assert pipeline.combine_method == "fast_attention"
    assert pipeline.score_converter == "IDENTITY"
    assert pipeline.activations == ("RELU", "RELU")
    assert pipeline.image_size is None


def test_an_empty_list_has_no_value(tmp_path: Path) -> None:
    (tmp_path / "pipeline.config").write_text(pipeline_text(box_coder="y_scale: [] x_scale: 2"))
    assert read_pipeline(tmp_path / "pipeline.config").box_scales == (10, 2, 5, 5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no model, so it is not for an EfficientDet"),
        ("model { num_classes: 1 }", r"has no model\.ssd, so"),
        (
            "model { faster_rcnn {} }",
            "describes another detector, 'faster_rcnn' with the feature extractor ''",
        ),
        ("model { ssd {", "line 1: '{' is never closed"),
        ("model {\n ssd { >", "line 2: '{' is never closed"),
        ("model {} }", "line 1: '}' has no opening bracket"),
        ("model: ]", r"line 1: '\]' is unexpected"),
        ("a: [1, 2", r"line 1: '\[' is never closed"),
        ("\n\n{", "line 3: '{' is unexpected"),
        ("a: @", "line 1: '@' is unexpected"),
        ("a {" * 5000, "messages nest too deep"),
        ("a: " + "[" * 5000, "messages nest too deep"),
        ("#" * (1 << 21), "cannot be read: it has more than 262,144 bytes"),
        (pipeline_text(num_classes="many"), r"model\.ssd\.num_classes is 'many'; correct the file"),
        (pipeline_text(num_classes="2.5"), r"model\.ssd\.num_classes is 2\.5"),
        (pipeline_text(num_classes="{}"), r"model\.ssd\.num_classes is a message"),
        (pipeline_text(anchor_scale="nan"), r"anchor_scale is 'nan'"),
        (pipeline_text(ratios="[{}]"), r"aspect_ratios is a message"),
        (pipeline_text(box_coder="y_scale: {}"), r"y_scale is a message"),
        (
            pipeline_text(resizer="identity_resizer {}"),
            "image_resizer is 'identity_resizer', which is not supp",
        ),
        (
            pipeline_text(resizer="conditional_shape_resizer { size_threshold: 9 }"),
            r"model\.ssd\.image_resizer is 'conditional_shape_resizer', which is not supported; keep",
        ),
        (
            pipeline_text(resizer="fixed_shape_resizer { resize_method: BICUBIC }"),
            r"fixed_shape_resizer\.resize_method is BICUBIC; only BILINEAR is supported",
        ),
        (
            pipeline_text(resizer="keep_aspect_ratio_resizer { convert_to_grayscale: true }"),
            r"keep_aspect_ratio_resizer\.convert_to_grayscale is true; only colour images are supported",
        ),
        (
            pipeline_text(resizer="keep_aspect_ratio_resizer { min_dimension: 600 max_dimension: 512 }"),
            "min_dimension is 600, above max_dimension, 512; correct the file",
        ),
        (
            pipeline_text(resizer="keep_aspect_ratio_resizer { per_channel_pad_value: [1, 2] }"),
            r"pad_value is \(1\.0, 2\.0\), must be three numbers, one per channel; correct the file",
        ),
        (
            pipeline_text(
                resizer="keep_aspect_ratio_resizer { max_dimension: 640 }", padding="pad_to_multiple: 128"
            ),
            r"without pad_to_max_dimension, together with the feature extractor.s pad_to_multiple, is not",
        ),
        (
            pipeline_text(padding="pad_to_multiple: 0"),
            "pad_to_multiple is 0, must be a whole number from 1 to",
        ),
    ],
)
def test_bad_pipelines(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "pipeline.config"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_pipeline(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_pipeline(tmp_path: Path) -> None:
    (tmp_path / "pipeline.config").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_pipeline(tmp_path / "pipeline.config")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_text_is_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    text = list(pipeline_text())
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(
            st.sampled_from([*"{}<>[]:,;#'\"\\1a. \n", ""])
        )
    path = tmp_path_factory.mktemp("pipeline") / "pipeline.config"
    path.write_text("".join(text))
    with suppress(CheckpointError):
        read_pipeline(path)
    shutil.rmtree(path.parent)
