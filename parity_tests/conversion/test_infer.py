"""The configuration of a checkpoint, inferred from names and shapes only."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from parity_tests.helpers.configs import configs
from porting.errors import ConfigError, ConversionError
from porting.infer import INDISTINGUISHABLE, infer_config, named_config, setting_lines
from pytorch_model.config import MODELS, EfficientDetConfig, model_config
from tf_reference.variables import variable_shapes

#: Fields that leave no trace in the variables.
UNSEEN = {
    "name": "x",
    "image_size": (512, 512),
    "num_scales": 3,
    "aspect_ratios": (1.0, 2.0, 0.5),
    "anchor_scale": 4.0,
    "act_type": "swish",
    "conv_after_downsample": False,
    "survival_prob": None,
    "mean_rgb": (0.0, 0.0, 0.0),
    "stddev_rgb": (1.0, 1.0, 1.0),
}


@pytest.mark.parametrize("model", MODELS)
def test_every_variant_is_recognised(model: str) -> None:
    config = model_config(model)
    inference = infer_config(variable_shapes(config), f"somewhere/{model}/model")
    assert inference.variant == model
    assert inference.config == config


@pytest.mark.parametrize("model", MODELS)
def test_custom_classes_keep_the_variant(model: str) -> None:
    config = model_config(model, num_classes=7)
    inference = infer_config(variable_shapes(config), f"{model}/model")
    assert inference.config == config


@settings(deadline=None, max_examples=150)
@given(configs())
def test_any_configuration_is_recovered(config: EfficientDetConfig) -> None:
    given_anchors = {"num_scales": config.num_scales, "aspect_ratios": config.aspect_ratios}
    stated = {"endpoints": config.backbone.endpoints} if config.backbone.endpoints else {}
    found = infer_config(variable_shapes(config), overrides=given_anchors, settings=stated).config
    methods = {found.fpn_weight_method, config.fpn_weight_method}
    assert len(methods) == 1 or methods in INDISTINGUISHABLE
    seen = config.replace(fpn_weight_method=found.fpn_weight_method, **UNSEEN)
    assert found.replace(**UNSEEN) == seen
    assert variable_shapes(found) == variable_shapes(config)


@pytest.mark.parametrize("min_level", [2, 3, 4, 5])
def test_levels_without_head_layers(min_level: int) -> None:
    """Heads with only a predicting layer have no batch norms that name the levels; the widths show them."""
    config = model_config("efficientdet-d1", box_class_repeats=0, min_level=min_level)
    found = infer_config(variable_shapes(config)).config
    assert (found.min_level, found.max_level) == (min_level, 7)


def test_settings_of_the_checkpoint_are_not_assumed() -> None:
    shapes = variable_shapes(model_config("efficientdet-d0"))
    stated = {"image_size": (640, 512), "anchor_scale": 3.5}
    for find in (infer_config, partial(named_config, "efficientdet-d0")):
        inference = find(shapes, settings=stated)
        assert inference.variant == "efficientdet-d0"
        assert (inference.config.image_size, inference.config.anchor_scale) == ((640, 512), 3.5)
        assert not any(line.startswith(("image size", "anchor scale")) for line in inference.assumed)
        assert find(shapes, settings=stated, overrides={"anchor_scale": 2.0}).config.anchor_scale == 2


def test_a_mean_without_a_deviation() -> None:
    shapes = variable_shapes(model_config("efficientdet-d0"))
    assumed = infer_config(shapes, overrides={"mean_rgb": (0.0, 0.0, 0.0)}).assumed
    assert "standard deviation 58.395/57.12/57.375" in assumed
    assert not any(line.startswith("mean ") for line in assumed)


def test_other_endpoints_are_a_different_network() -> None:
    """All blocks but the last, with the same variables: P3…P5 come from the middle of their stages."""
    released = model_config("efficientdet-d1")
    backbone = released.backbone.ending_at((6, 14, 21))
    assert (len(backbone.blocks), backbone.endpoints) == (22, (6, 14, 21))
    shapes = variable_shapes(released.replace(backbone=backbone))
    for find in (infer_config, partial(named_config, "efficientdet-d1")):
        inference = find(shapes, settings={"endpoints": (6, 14, 21)})
        assert inference.variant is None
        assert inference.config == released.replace(name="custom", backbone=backbone)
    assert released.backbone.ending_at((7, 15, 22)) == released.backbone
    assert EfficientDetConfig.from_dict(inference.config.to_dict()) == inference.config


@pytest.mark.parametrize(
    "endpoints", [(6, 14), (6, 14, 20), (14, 6, 22), (-16, 14, 22), (6, 14, 23), (6.0, 14, 22), "abc"]
)
def test_impossible_endpoints(endpoints: Any) -> None:
    config = model_config("efficientdet-d1")
    with pytest.raises(ConfigError, match="must be a block of stride 8, one of stride 16 and the last block"):
        config.replace(backbone=replace(config.backbone, endpoints=endpoints))


def test_fields_without_a_trace_are_listed_as_assumed() -> None:
    assumed = infer_config(variable_shapes(model_config("efficientdet-d0"))).assumed
    assert "image size 512×512" in assumed
    assert "fusion fastattn" in assumed
    assert "no residual in the heads" in assumed
    assert "3 scales of aspect ratios 1, 2, 0.5" in assumed
    given = infer_config(
        variable_shapes(model_config("efficientdet-d0")), overrides={"image_size": (640, 640)}
    )
    assert given.config.image_size == (640, 640)
    assert not any("image size" in line for line in given.assumed)


def test_the_name_decides_what_the_weights_cannot() -> None:
    shapes = variable_shapes(model_config("efficientdet-d6"))
    unnamed = infer_config(shapes, "somewhere/model")
    assert unnamed.variant == "efficientdet-d6"
    assert any("efficientdet-d7" in line for line in unnamed.assumed)
    assert infer_config(shapes, "cache/efficientdet-d7/model").config == model_config("efficientdet-d7")
    d2 = variable_shapes(model_config("efficientdet-d2"))
    assert infer_config(d2, "efficientdet-d2-640/model").config.image_size == (640, 640)
    advprop = infer_config(variable_shapes(model_config("efficientdet-d0")), "efficientdet-d0-advprop/model")
    assert advprop.config.mean_rgb == (127.5, 127.5, 127.5)
    assert any("AdvProp" in line for line in advprop.assumed)
    named = named_config(
        "efficientdet-d0", variable_shapes(advprop.config), None, "efficientdet-d0-advprop/model"
    )
    assert named.config.mean_rgb == (127.5, 127.5, 127.5)
    assert any("AdvProp" in line for line in named.assumed)


@pytest.mark.parametrize(
    ("model", "source"),
    [
        ("efficientdet-d6", "efficientdet-d7-vs-d6/model"),
        ("efficientdet-d3", "d2-640-then-d3/model"),
        ("efficientdet-d6", "no_advprop/efficientdet-d6/model"),
    ],
)
def test_an_ambiguous_name_decides_nothing(model: str, source: str) -> None:
    assert infer_config(shapes_of(model), source).config == model_config(model)


def shapes_of(model: str) -> dict[str, tuple[int, ...]]:
    return dict(variable_shapes(model_config(model)))


def test_two_models_in_one_graph_are_rejected() -> None:
    shapes = shapes_of("efficientdet-d0")
    shapes["efficientnet-b0/stem_1/conv2d_1/kernel"] = (3, 3, 3, 32)
    with pytest.raises(ConversionError, match="two models were built in one graph"):
        infer_config(shapes)
    shapes = shapes_of("efficientdet-d0") | shapes_of("efficientdet-d1")
    with pytest.raises(ConversionError, match="two models, efficientnet-b0 and efficientnet-b1"):
        infer_config(shapes)


def test_other_files_are_rejected() -> None:
    with pytest.raises(ConversionError, match=r"not an AutoML EfficientDet.*resnet/conv1"):
        infer_config({"resnet/conv1": (7, 7, 3, 64)})
    backbone = {n: s for n, s in shapes_of("efficientdet-d3").items() if n.startswith("efficientnet")}
    with pytest.raises(ConversionError, match="not an AutoML EfficientDet"):
        infer_config(backbone)


@pytest.mark.parametrize(
    "scope", ["efficientnet-b0/blocks_3/", "efficientnet-b0/stem/", "fpn_cells/cell_0/fnode0/", "class_net/"]
)
def test_a_missing_part_is_named(scope: str) -> None:
    shapes = {
        name: shape for name, shape in shapes_of("efficientdet-d0").items() if not name.startswith(scope)
    }
    named = scope.replace("b0", ".*")
    with pytest.raises(ConversionError, match=f"is incomplete: no variable name matches {named}"):
        infer_config(shapes)


def test_unsupported_structures_are_rejected_by_name() -> None:
    shapes = shapes_of("efficientdet-d0")
    shapes["fpn_cells/cell_0/fnode0/op_after_combine5/conv/kernel"] = (3, 3, 64, 64)
    with pytest.raises(ConversionError, match="separable_conv=False"):
        infer_config(shapes)
    shapes = shapes_of("efficientdet-d0")
    shapes["efficientnet-b0/blocks_3/se/conv2d/bias"] = (99,)
    with pytest.raises(ConversionError, match="blocks_3/se has 99 squeeze filters"):
        infer_config(shapes)


@pytest.mark.parametrize(
    "name",
    [
        "box_net/box-predict/bias",
        "efficientnet-b0/stem/conv2d/kernel",
        "efficientnet-b0/blocks_0/se/conv2d/bias",
        "fpn_cells/cell_0/fnode0/op_after_combine5/conv/pointwise_kernel",
    ],
)
@pytest.mark.parametrize("shape", [(), (0,), (0, 0, 0, 0)], ids=str)
def test_impossible_shapes_are_rejected(name: str, shape: tuple[int, ...]) -> None:
    shapes = {**shapes_of("efficientdet-d0"), name: shape}
    with pytest.raises(ConversionError, match=name):
        infer_config(shapes)
    with pytest.raises(ConversionError):
        named_config("efficientdet-d0", shapes)


def test_classes_that_the_anchors_do_not_divide() -> None:
    shapes = {**shapes_of("efficientdet-d0"), "class_net/class-predict/bias": (811,)}
    with pytest.raises(ConversionError, match=r"811 values per location for 9 anchors.*mixes two models"):
        infer_config(shapes)


def test_a_backbone_that_is_not_an_efficientnet() -> None:
    name = "efficientnet-b0/blocks_1/depthwise_conv2d/depthwise_kernel"
    message = rf"{name} has shape \[3, 3, 97, 1\], whose channels are not a multiple"
    with pytest.raises(ConversionError, match=message):
        infer_config({**shapes_of("efficientdet-d0"), name: (3, 3, 97, 1)})


def test_a_backbone_of_other_stages() -> None:
    """The last block, which is a stage by itself, becomes one more block of the stage before it."""
    shapes = shapes_of("efficientdet-d0")
    last, before = "efficientnet-b0/blocks_15/", "efficientnet-b0/blocks_14/"
    one_fewer = {name: shape for name, shape in shapes.items() if not name.startswith(last)}
    more = {name.replace(before, last): shape for name, shape in shapes.items() if name.startswith(before)}
    with pytest.raises(ConversionError, match="the backbone has 6 stages, EfficientNet has 7"):
        infer_config(one_fewer | more)


def test_resampling_without_batch_norm_is_rejected_by_name() -> None:
    shapes = {n: s for n, s in shapes_of("efficientdet-d0").items() if "resample" not in n or "/bn/" not in n}
    with pytest.raises(ConversionError, match="apply_bn_for_resampling=False"):
        infer_config(shapes)


def test_other_anchors_must_be_given() -> None:
    shapes = variable_shapes(model_config("efficientdet-d0", num_scales=2))
    with pytest.raises(ConversionError, match=r"6 anchors per location.*--hparams num_scales"):
        infer_config(shapes)
    assert infer_config(shapes, overrides={"num_scales": 2}).config.num_anchors == 6


def test_for_a_wrong_model_name_the_right_one_is_suggested() -> None:
    shapes = shapes_of("efficientdet-d0")
    with pytest.raises(
        ConversionError, match="these are the variables of efficientdet-d0: give --model efficientdet-d0"
    ):
        named_config("efficientdet-d1", shapes)
    with pytest.raises(ConversionError, match=r"efficientnet-b0/stem/conv2d/kernel has shape \[5\]"):
        named_config("efficientdet-d0", {**shapes, "efficientnet-b0/stem/conv2d/kernel": (5,)})


def test_a_named_model_takes_its_classes_from_the_variables() -> None:
    shapes = variable_shapes(model_config("efficientdet-d7", num_classes=5))
    inference = named_config("efficientdet-d7", shapes)
    assert inference.config == model_config("efficientdet-d7", num_classes=5)


def test_an_override_that_contradicts_the_variables_is_rejected() -> None:
    with pytest.raises(ConversionError, match="num_classes was given as 20, but the variables"):
        infer_config(shapes_of("efficientdet-d0"), overrides={"num_classes": 20})
    assert (
        infer_config(
            shapes_of("efficientdet-d0"), overrides={"fpn_weight_method": "attn"}
        ).config.fpn_weight_method
        == "attn"
    )


# AutoML's other network parts


def google_names(shared: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Keras D0 that Google's code saved as .h5, by AutoML's names."""
    listed = json.loads((shared / f"exports/names_h5_{name}.json").read_text())
    return {path.partition("/")[2].removesuffix(":0"): tuple(shape) for path, shape in listed.items()}


@pytest.mark.parametrize("model", [None, "efficientdet-d0"])
def test_the_detector_beside_a_segmentation_head(shared: Path, model: str | None) -> None:
    shapes = google_names(shared, "seg")
    assert any(name.startswith("segmentation_head/") for name in shapes)
    found = named_config(model, shapes) if model else infer_config(shapes)
    assert found.config == model_config("efficientdet-d0", num_classes=3)


@pytest.mark.parametrize("model", [None, "efficientdet-d0"])
def test_qufpn_is_named(shared: Path, model: str | None) -> None:
    shapes = google_names(shared, "qufpn")
    with pytest.raises(ConversionError, match=r"model was trained with fpn_name=qufpn \(QuFPN, a"):
        _ = named_config(model, shapes) if model else infer_config(shapes)


@pytest.mark.parametrize("levels", [3, 5, 6])
def test_qufpn_of_any_height_is_named(levels: int) -> None:
    config = model_config("efficientdet-d0", max_level=2 + levels)
    shapes = dict(variable_shapes(config))
    for node in range(2 * levels - 2, 5 * levels - 4):
        shapes[f"fpn_cells/cell_0/fnode{node}/WSM"] = ()
    with pytest.raises(ConversionError, match="fpn_name=qufpn"):
        infer_config(shapes)
    del shapes[f"fpn_cells/cell_0/fnode{5 * levels - 5}/WSM"]
    infer_config(shapes)  # conversion will find the nodes that are too many


def test_the_original_graph_confirms_the_function() -> None:
    found = infer_config(variable_shapes(model_config("efficientdet-d0")), overrides={"act_type": "relu"})
    assert found.unseen == ("fpn_weight_method", "survival_prob", "conv_after_downsample")
    left = found.confirmed()
    assert left.unseen == ()
    assert set(found.assumed) - set(left.assumed) == set(setting_lines(found.config, found.unseen))
    assert "image size 512×512" in left.assumed  # a graph of one size does not say that it was trained so
    summed = infer_config(variable_shapes(model_config("efficientdet-d7")), "efficientdet-d7/model")
    assert "fpn_weight_method" not in summed.unseen  # there are no fusion weights
