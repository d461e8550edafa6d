"""The network by itself: bias-free, flexible, and at home in PyTorch's own machinery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pytorch_model import (
    ConfigError,
    EfficientDet,
    EfficientDetConfig,
    WeightsError,
    create_model,
    load_model,
)
from pytorch_model.config import MODELS, model_config
from pytorch_model.layers import same_padding
from pytorch_model.weights import read_weights, write_weights


@pytest.mark.parametrize("model", MODELS)
def test_no_convolution_that_feeds_a_batch_norm_has_a_bias(model: str) -> None:
    with torch.device("meta"):
        network = EfficientDet(model_config(model))
    biased = {name for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    allowed = {"class_net.predict.pointwise", "box_net.predict.pointwise"}
    assert all(".se." in name for name in biased - allowed)
    assert allowed <= biased


@pytest.mark.parametrize("height", [128, 150])
@pytest.mark.parametrize("width", [128, 201])
def test_output_shapes(height: int, width: int) -> None:
    network = create_model("efficientdet_d0", num_classes=3, max_level=6).eval()
    config = network.config
    with torch.no_grad():
        classes, boxes = network(torch.zeros(2, 3, height, width))
    sizes = list(config.feature_sizes((height, width)).values())
    assert [tuple(x.shape) for x in classes] == [(2, 27, *size) for size in sizes]
    assert [tuple(x.shape) for x in boxes] == [(2, 36, *size) for size in sizes]


def test_an_image_too_thin_to_resample_is_refused() -> None:
    network = create_model("efficientdet_d0").eval()
    with pytest.raises(ConfigError, match="short side is larger"), torch.no_grad():
        network(torch.zeros(1, 3, 60, 512))


def tiny() -> EfficientDet:
    torch.manual_seed(0)
    return create_model("efficientdet_d0", num_classes=2, fpn_cell_repeats=1, box_class_repeats=1).eval()


def flat(outputs: tuple[list[torch.Tensor], list[torch.Tensor]]) -> torch.Tensor:
    return torch.cat([x.flatten() for level in outputs for x in level])


def test_torch_export() -> None:
    network, images = tiny(), torch.randn(1, 3, 128, 128)
    program = torch.export.export(network, (images,))
    with torch.no_grad():
        torch.testing.assert_close(flat(program.module()(images)), flat(network(images)))


def test_torch_compile() -> None:
    network, images = tiny(), torch.randn(1, 3, 128, 128)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(flat(compiled(images)), flat(network(images)))


def test_every_parameter_gets_a_gradient() -> None:
    network = tiny().train()
    torch.autograd.backward(flat(network(torch.randn(2, 3, 128, 128))).square().mean())
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@given(st.integers(1, 600), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2]))
def test_same_padding_gives_the_size_tensorflow_gives(size: int, kernel: int, stride: int) -> None:
    before, after = same_padding(size, kernel, stride)
    assert (size + before + after - kernel) // stride + 1 == -(-size // stride)
    assert 0 <= after - before <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"fpn_weight_method": "mean"}, "fpn_weight_method is 'mean'"),
        ({"act_type": "srelu"}, "act_type is 'srelu'"),
        ({"min_level": 6}, "min_level is 6"),
        ({"max_level": 3}, "max_level is 3"),
        ({"aspect_ratios": ()}, "aspect_ratios is empty"),
        ({"aspect_ratios": (0,)}, "aspect_ratios is .* must be above 0"),
        ({"anchor_scale": -1}, "anchor_scale is .* must be above 0"),
        ({"stddev_rgb": (0, 0, 0)}, "stddev_rgb is .* must be above 0"),
        ({"mean_rgb": (0,)}, "mean_rgb must be three numbers"),
        ({"survival_prob": 7}, "survival_prob is 7"),
        ({"num_classes": 2.5}, "num_classes is 2.5"),
        ({"image_size": 640}, "image_size is 640"),
        ({"learning_rate": 1}, "learning_rate"),
    ],
)
def test_an_impossible_configuration_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("efficientdet_d0", **change)


#: What a file may say and no network can be. Field, or stage's or backbone's field → value.
HUGE: dict[str, Any] = {
    "box_class_repeats": 10**6,
    "fpn_cell_repeats": 10**9,
    "fpn_num_filters": 10**12,
    "image_size": [10**9, 10**9],
    "max_level": 10**9,
    "num_classes": int("9" * 4000),
    "num_scales": 10**9,
    "stage.repeats": 10**9,
    "stage.kernel_size": 10**6,
    "stage.stride": 3,
    "stage.expand_ratio": 10**9,
    "stage.out_filters": 10**12,
    "backbone.stem_filters": 10**12,
    "backbone.se_ratio": float("inf"),
    "anchor_scale": float("inf"),
    "mean_rgb": ["a", "b", "c"],
    "name": ["d0"],
}


def described(field: str, value: Any) -> dict[str, Any]:
    """D0's configuration as a file says it, with one other value."""
    data: dict[str, Any] = json.loads(json.dumps(model_config("efficientdet-d0").to_dict()))
    part, _, name = field.rpartition(".")
    {"": data, "backbone": data["backbone"], "stage": data["backbone"]["stages"][1]}[part][name] = value
    return data


@pytest.mark.parametrize("field", HUGE)
def test_a_network_larger_than_any_is_refused_unbuilt(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field.rpartition('.')[2]} (is|must be) ") as caught:
        EfficientDetConfig.from_dict(described(field, HUGE[field]))
    assert len(str(caught.value)) < 200


def test_too_many_blocks_and_ratios_are_refused() -> None:
    data = described("num_classes", 90)
    data["backbone"]["stages"] *= 200
    with pytest.raises(ConfigError, match="it has 3200 blocks, must have at most 1000"):
        EfficientDetConfig.from_dict(data)
    with pytest.raises(ConfigError, match="aspect_ratios are 101, must be at most 100"):
        EfficientDetConfig.from_dict(described("aspect_ratios", [1.0] * 101))


def test_numbers_too_long_to_write_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_classes is a number too long to show"):
        model_config("efficientdet-d0", num_classes=10**5000)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_weight_file_that_asks_for_a_giant_is_refused(tmp_path: Path, suffix: str) -> None:
    """At the bounds themselves nothing is allocated: the shapes are compared first."""
    network, path = tiny(), tmp_path / f"w{suffix}"
    giant = network.config.replace(num_classes=100_000, fpn_num_filters=10_000)
    write_weights(path, network.state_dict(), giant, {})
    with pytest.raises(WeightsError, match=r"is \[.*needs \[.*10000"):
        load_model(path)


@pytest.mark.parametrize("data", [[], None, 7, {}, {"backbone": "x"}, {"backbone": {"stages": [1]}}], ids=str)
def test_a_configuration_from_nonsense_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match="not an EfficientDet configuration"):
        EfficientDetConfig.from_dict(data)


def test_replacing_an_unknown_field_is_refused() -> None:
    with pytest.raises(ConfigError, match="foo"):
        model_config("efficientdet-d0").replace(foo=1)


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'efficientdet-d9'.*efficientdet-d7x"):
        create_model("efficientdet-d9")


@pytest.mark.parametrize("model", MODELS)
def test_configurations_survive_json(model: str) -> None:
    config = model_config(model)
    assert EfficientDetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weight_files_round_trip(tmp_path: Path, suffix: str) -> None:
    network, images = tiny(), torch.randn(1, 3, 128, 128)
    path = tmp_path / f"weights{suffix}"
    write_weights(path, network.state_dict(), network.config, {"source": "a test"})
    loaded = load_model(path)
    assert loaded.config == network.config
    assert read_weights(path)[2]["source"] == "a test"
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(flat(loaded(images)), flat(network(images)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_changed_tensor_is_noticed(tmp_path: Path, suffix: str) -> None:
    """The formats themselves do not: safetensors has no checksum."""
    network, path = tiny(), tmp_path / f"weights{suffix}"
    write_weights(path, network.state_dict(), network.config, {"source": "a test"})
    data = bytearray(path.read_bytes())
    tensor = network.state_dict()["bifpn.cells.0.nodes.0.conv.pointwise.weight"].numpy().tobytes()
    data[bytes(data).index(tensor) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"is damaged .* content_sha256 does not fit its contents"):
        read_weights(path)


def test_changed_metadata_is_noticed(tmp_path: Path) -> None:
    network, path = tiny(), tmp_path / "weights.safetensors"
    write_weights(path, network.state_dict(), network.config, {"source": "a test"})
    path.write_bytes(path.read_bytes().replace(b"a test", b"b test"))
    with pytest.raises(WeightsError, match="content_sha256 does not fit its contents"):
        read_weights(path)


def test_bad_weight_files_are_refused(tmp_path: Path) -> None:
    network = tiny()
    for suffix in (".safetensors", ".pth"):
        path = tmp_path / f"w{suffix}"
        with pytest.raises(WeightsError, match="no weight file"):
            load_model(path)
        write_weights(path, network.state_dict(), network.config, {})
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(WeightsError, match="damaged"):
            load_model(path)
        state = network.state_dict()
        write_weights(
            path, {k: v for k, v in state.items() if k != "backbone.stem.conv.weight"}, network.config, {}
        )
        with pytest.raises(WeightsError, match=r"lacks tensor backbone\.stem\.conv\.weight"):
            load_model(path)
        write_weights(path, {**state, "extra": torch.zeros(1)}, network.config, {})
        with pytest.raises(WeightsError, match="unknown tensor extra"):
            load_model(path)
        write_weights(path, state, network.config.replace(num_classes=5), {})
        with pytest.raises(WeightsError, match=r"class_net\.predict\.pointwise"):
            load_model(path)


@pytest.mark.parametrize("config", ["[]", "null", "7", "{", None, 7], ids=str)
def test_a_weight_file_with_a_nonsense_configuration_is_refused(tmp_path: Path, config: Any) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {}, "config": config}, path)
    with pytest.raises(WeightsError, match="configuration"):
        load_model(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "is not a tensor"),
        (torch.zeros(32, dtype=torch.int8), "is int8"),
        (torch.zeros(32, dtype=torch.float64), "is float64 where other tensors are float32"),
        (torch.full((32,), torch.nan), "NaN or infinite"),
    ],
    ids=str,
)
def test_tensors_that_no_network_can_use_are_refused(tmp_path: Path, value: Any, message: str) -> None:
    network = tiny()
    path = tmp_path / "w.pth"
    write_weights(path, {**network.state_dict(), "backbone.stem.bn.bias": value}, network.config, {})
    with pytest.raises(WeightsError, match=rf"backbone\.stem\.bn\.bias.*{message}"):
        load_model(path)


def test_a_pickle_with_code_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="damaged or not a weight file"):
        load_model(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from([".safetensors", ".pth"]))
def test_garbage_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("garbage") / f"w{suffix}"
    path.write_bytes(data)
    with pytest.raises(WeightsError):
        load_model(path)
