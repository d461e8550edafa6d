"""The network: bias-free, any input size, torch.export and torch.compile, configurations, weight files."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from porting.parity.compared_weights import read_weight_file
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
from pytorch_model.weights.files import read_weights, write_weights


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


def test_an_image_too_thin_to_resample_is_rejected() -> None:
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
    "backbone.name": "two\nlines",
}


def described(field: str, value: Any) -> dict[str, Any]:
    """D0's configuration as a file stores it, with one changed value."""
    data: dict[str, Any] = json.loads(json.dumps(model_config("efficientdet-d0").to_dict()))
    part, _, name = field.rpartition(".")
    {"": data, "backbone": data["backbone"], "stage": data["backbone"]["stages"][1]}[part][name] = value
    return data


@pytest.mark.parametrize("field", HUGE)
def test_a_network_beyond_the_bounds_is_rejected_before_it_is_built(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field.rpartition('.')[2]} (is|must be) ") as caught:
        EfficientDetConfig.from_dict(described(field, HUGE[field]))
    assert len(str(caught.value)) < 200


def test_too_many_blocks_and_ratios_are_rejected() -> None:
    data = described("num_classes", 90)
    data["backbone"]["stages"] *= 200
    with pytest.raises(ConfigError, match="it has 3200 blocks, must have at most 1000"):
        EfficientDetConfig.from_dict(data)
    with pytest.raises(ConfigError, match="aspect_ratios are 101, must be at most 100"):
        EfficientDetConfig.from_dict(described("aspect_ratios", [1.0] * 101))


def test_numbers_too_long_to_write_are_rejected() -> None:
    with pytest.raises(ConfigError, match="num_classes is a number too long to show"):
        model_config("efficientdet-d0", num_classes=10**5000)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_weight_file_that_asks_for_a_giant_is_rejected(tmp_path: Path, suffix: str) -> None:
    """At the bounds themselves nothing is allocated: the shapes are compared first."""
    network, path = tiny(), tmp_path / f"w{suffix}"
    giant = network.config.replace(num_classes=100_000, fpn_num_filters=10_000)
    write_weights(path, network.state_dict(), giant, {})
    with pytest.raises(WeightsError, match=r"is \[.*needs \[.*10000"):
        load_model(path)


@pytest.mark.parametrize("data", [[], None, 7, {}, {"backbone": "x"}, {"backbone": {"stages": [1]}}], ids=str)
def test_a_configuration_from_nonsense_is_rejected(data: Any) -> None:
    with pytest.raises(ConfigError, match="not an EfficientDet configuration"):
        EfficientDetConfig.from_dict(data)


def test_replacing_an_unknown_field_is_rejected() -> None:
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
    """The formats alone do not detect it: safetensors has no checksum."""
    network, path = tiny(), tmp_path / f"weights{suffix}"
    write_weights(path, network.state_dict(), network.config, {"source": "a test"})
    data = bytearray(path.read_bytes())
    tensor = network.state_dict()["bifpn.cells.0.nodes.0.conv.pointwise.weight"].numpy().tobytes()
    data[bytes(data).index(tensor) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"is damaged .* content_sha256 does not fit its contents"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_tensors_that_share_memory_can_be_read_again(tmp_path: Path, suffix: str) -> None:
    """A layer used twice, one value for a whole tensor, a part of a larger tensor, columns before rows."""
    network, path = tiny(), tmp_path / f"weights{suffix}"
    state, first = network.state_dict(), dict[tuple[int, ...], torch.Tensor]()
    for key, tensor in state.items():
        if key.startswith("backbone.") and tensor.is_floating_point():
            state[key] = tensor.new_tensor(0.5).expand(tensor.shape)
        elif key.startswith("bifpn.") and tensor.is_floating_point():
            state[key] = torch.stack([tensor] * 4)[1]
        elif tensor.ndim == 4:
            state[key] = tensor.contiguous(memory_format=torch.channels_last)
        elif tensor.is_floating_point():
            state[key] = first.setdefault(tuple(tensor.shape), tensor)
    write_weights(path, state, network.config, {})
    found, _, _ = read_weights(path)
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    assert path.stat().st_size < 1.5 * sum(tensor.nbytes for tensor in state.values()) + 500_000


def test_changed_metadata_is_noticed(tmp_path: Path) -> None:
    network, path = tiny(), tmp_path / "weights.safetensors"
    write_weights(path, network.state_dict(), network.config, {"source": "a test"})
    path.write_bytes(path.read_bytes().replace(b"a test", b"b test"))
    with pytest.raises(WeightsError, match="content_sha256 does not fit its contents"):
        read_weights(path)


def test_bad_weight_files_are_rejected(tmp_path: Path) -> None:
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
def test_a_weight_file_with_a_nonsense_configuration_is_rejected(tmp_path: Path, config: Any) -> None:
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {}, "config": config}, path)
    with pytest.raises(WeightsError, match="configuration"):
        load_model(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "is not a tensor"),
        (torch.zeros(32, dtype=torch.int8), "is int8"),
        (torch.zeros(32, dtype=torch.float64), "is float64 but other tensors are float32"),
        (torch.full((32,), torch.nan), "NaN or infinite"),
    ],
    ids=str,
)
def test_tensors_that_no_network_can_use_are_rejected(tmp_path: Path, value: Any, message: str) -> None:
    network = tiny()
    path = tmp_path / "w.pth"
    write_weights(path, {**network.state_dict(), "backbone.stem.bn.bias": value}, network.config, {})
    with pytest.raises(WeightsError, match=rf"backbone\.stem\.bn\.bias.*{message}"):
        load_model(path)


class Code:
    """Unpickling it creates a file called ``ran`` in the working folder."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("open('ran', 'w')",))


@pytest.mark.parametrize("kind", ["in a state dict", "alone", "in an old pickle"])
def test_a_pickle_with_code_is_never_run(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own text would go on to explain how to run it."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.pth"
    if kind == "in an old pickle":
        path.write_bytes(pickle.dumps(Code(), protocol=2))
    else:
        torch.save({"state_dict": {"x": Code()}} if kind == "in a state dict" else Code(), path)
    with pytest.raises(
        WeightsError, match=r"damaged or not a weight file.*nothing in it was run.*fetch"
    ) as caught:
        load_model(path)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.s:DeprecationWarning")
def test_a_program_of_torchscript_is_not_taken_for_weights(tmp_path: Path) -> None:
    torch.jit.script(nn.ReLU()).save(str(tmp_path / "w.pth"))  # type: ignore[no-untyped-call]
    with pytest.raises(WeightsError, match="nothing in it was run") as caught:
        load_model(tmp_path / "w.pth")
    assert "weights_only" not in str(caught.value)


STEM = "backbone.stem.bn.bias"  # 32 values
UNUSUAL: dict[str, tuple[Callable[[], torch.Tensor], str]] = {
    "sparse": (lambda: torch.ones(32).to_sparse(), "sparse"),
    "meta": (lambda: torch.empty(32, device="meta"), r"without values \(on the meta device\)"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.zeros(32), 0.1, 0, torch.qint8), "quantised"),
    "float8": (lambda: torch.zeros(32).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "complex": (lambda: torch.zeros(32, dtype=torch.complex64), "complex64"),
    "nested": (lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "nested"),
}


@pytest.mark.filterwarnings("ignore")  # some of these kinds are deprecated
@pytest.mark.parametrize("kind", UNUSUAL)
def test_only_plain_tensors_are_read(kind: str, tmp_path: Path) -> None:
    network, path = tiny(), tmp_path / "w.pth"
    make, shown = UNUSUAL[kind]
    tensor = make()
    config = json.dumps(network.config.to_dict())
    torch.save({"state_dict": {**network.state_dict(), STEM: tensor}, "config": config}, path)
    for read in (load_model, read_weight_file):
        with pytest.raises(WeightsError, match=rf"w\.pth: {STEM} is {shown}, which cannot be used here"):
            read(path)
    torch.save({"x": tensor}, path.with_suffix(".pt"))  # no configuration: only for comparisons
    with pytest.raises(WeightsError, match=rf"w\.pt: x is {shown}, which cannot be used here"):
        read_weight_file(path.with_suffix(".pt"))


def test_a_float8_safetensors_file_is_rejected(tmp_path: Path) -> None:
    network = tiny()
    state = {**network.state_dict(), STEM: torch.zeros(32).to(torch.float8_e4m3fn)}
    for name in ("w.safetensors", "w.pth"):
        with pytest.raises(WeightsError, match=rf"cannot write {name}: {STEM} is float8_e4m3fn"):
            write_weights(tmp_path / name, state, network.config, {})
    assert not list(tmp_path.iterdir())
    config = json.dumps(network.config.to_dict())
    safetensors.torch.save_file(state, tmp_path / "w.safetensors", {"config": config})
    with pytest.raises(WeightsError, match=rf"{STEM} is float8_e4m3fn, which cannot be used here"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "metadata", [{}, {"content_sha256": "0" * 64}], ids=["without digest", "with digest"]
)
def test_tensors_larger_than_the_file_are_not_copied(tmp_path: Path, metadata: dict[str, str]) -> None:
    """One stored value and a stride of 0 describe 8 GB."""
    state = {**tiny().state_dict(), "zz": torch.zeros(1).expand(2_000_000_000)}
    content = {"state_dict": state, "config": "{}", "metadata": metadata}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth describes 80\d{8} bytes of tensors and has \d{8};"):
        read_weights(tmp_path / "w.pth")


def test_overlapping_views_larger_than_the_file_are_rejected(tmp_path: Path) -> None:
    base = torch.zeros(100_000)
    views = {f"x{i}": base[i : i + 90_000] for i in range(9)}
    torch.save({"state_dict": views}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="describes 3240000 bytes of tensors"):
        read_weights(tmp_path / "w.pth")
    named = {f"x{i}": base for i in range(9)}  # a digest would read each of them
    torch.save({"state_dict": named, "metadata": {"content_sha256": "0" * 64}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="describes 3600000 bytes of tensors"):
        read_weights(tmp_path / "w.pth")


def test_a_file_that_unpacks_to_more_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"x": torch.zeros(100_000)}, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert torch.load(path, weights_only=True)["x"].shape == (100_000,)  # PyTorch itself unpacks it
    with pytest.raises(WeightsError, match="unpacks to more than its size"):
        read_weights(path)


@pytest.mark.parametrize("name", [3, "two\nlines", "\ud800", "x" * 1000], ids=ascii)
def test_a_tensor_without_a_name_to_print_is_rejected(name: object, tmp_path: Path) -> None:
    torch.save({"state_dict": {name: torch.zeros(1), "x": torch.zeros(1)}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"calls a tensor .*, which is not a valid name") as caught:
        read_weights(tmp_path / "w.pth")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_common_ways_to_save_stay_readable(dtype: torch.dtype, tmp_path: Path) -> None:
    """Any type, tensors out of order in memory, parts of larger ones, one tensor under two names."""
    network = tiny().to(dtype)
    state = dict(network.state_dict())
    order = "backbone.stem.conv.weight"
    state[order] = state[order].to(memory_format=torch.channels_last)
    state[STEM] = torch.stack([state[STEM], state[STEM]], dim=1)[:, 1]
    state["backbone.stem.bn.running_mean"] = state["backbone.stem.bn.weight"]
    large = max(state, key=lambda key: state[key].numel())
    state["again"] = state[large]
    assert not state[order].is_contiguous()
    assert not state[STEM].is_contiguous()
    config = json.dumps(network.config.to_dict())
    torch.save({"state_dict": state, "config": config}, tmp_path / "w.pth")
    read, _, _ = read_weights(tmp_path / "w.pth")
    assert read.keys() == state.keys()
    assert all(tensor.is_contiguous() and torch.equal(tensor, state[key]) for key, tensor in read.items())
    del state["again"]
    torch.save({"state_dict": state, "config": config}, tmp_path / "w.pth")
    loaded = load_model(tmp_path / "w.pth").state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.items())


@pytest.mark.parametrize("depth", [900, 100_000])
def test_a_deeply_nested_configuration_is_rejected(depth: int, tmp_path: Path) -> None:
    text = '{"name": ' + "[" * depth + "]" * depth + "}"
    torch.save({"state_dict": {}, "config": text}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth carries an unusable configuration"):
        read_weights(tmp_path / "w.pth")
    torch.save({"x": torch.zeros(1)}, tmp_path / "bare.pth")
    (tmp_path / "config.json").write_text(f'{{"metadata": {{}}, "config": {text}}}')
    with pytest.raises(WeightsError, match=r"config\.json is not an EfficientDet configuration"):
        read_weights(tmp_path / "bare.pth")


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from([".safetensors", ".pth"]))
def test_garbage_is_rejected(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.mktemp("garbage") / f"w{suffix}"
    path.write_bytes(data)
    with pytest.raises(WeightsError):
        load_model(path)
