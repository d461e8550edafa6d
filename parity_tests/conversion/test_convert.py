"""Conversion: which values are used, how every variable is accounted for, and what is rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.helpers.configs import configs
from parity_tests.helpers.recordings import golden_recording
from porting.checkpoint import open_checkpoint
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import Conversion, apply_rules, convert, how_converted, values_sentence
from porting.errors import ConversionError
from porting.infer import infer_config
from porting.inspection import inspect
from porting.parity.compared_weights import ComparedWeights
from porting.parity.weight_comparison import compare_with_checkpoint
from porting.rules import Rule, rules
from porting.scopes import EMA_SUFFIX
from porting.sources.open import write_synthetic
from porting.synthetic import synthetic_checkpoint
from pytorch_model import EfficientDet
from pytorch_model.config import EfficientDetConfig, model_config
from tf_reference.variables import variable_shapes

Variables = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def config() -> EfficientDetConfig:
    return model_config("efficientdet-lite0", num_classes=2, fpn_cell_repeats=1, box_class_repeats=1)


@pytest.fixture(scope="module")
def content(config: EfficientDetConfig) -> Variables:
    return synthetic_checkpoint(config, momentum=True)


@pytest.fixture(scope="module")
def shared_d0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic("efficientdet-d0", tmp_path_factory.mktemp("d0"))


def port(
    folder: Path,
    content: Variables,
    config: EfficientDetConfig,
    raw: bool = False,
    ema_or_raw: bool = False,
) -> Conversion:
    write_bundle(folder / "model", content)
    with open_checkpoint(folder) as checkpoint:
        return convert(checkpoint, config, raw, ema_or_raw=ema_or_raw)


def test_moving_averages_are_used_unless_raw(
    tmp_path: Path, content: Variables, config: EfficientDetConfig
) -> None:
    name, target = "box_net/box-predict/bias", "box_net.predict.pointwise.bias"
    averaged = port(tmp_path, content, config)
    assert averaged.values_kind == "EMA"
    np.testing.assert_array_equal(averaged.state_dict[target].numpy(), content[name + EMA_SUFFIX])
    raw = port(tmp_path, content, config, raw=True)
    assert raw.values_kind == "raw"
    np.testing.assert_array_equal(raw.state_dict[target].numpy(), content[name])
    assert raw.digest != averaged.digest


def test_without_moving_averages_the_values_are_raw(
    tmp_path: Path, content: Variables, config: EfficientDetConfig
) -> None:
    plain = {name: value for name, value in content.items() if not name.endswith(EMA_SUFFIX)}
    assert port(tmp_path, plain, config).values_kind == "raw"


def test_the_account_balances(tmp_path: Path, content: Variables, config: EfficientDetConfig) -> None:
    conversion = port(tmp_path, content, config)
    coverage = conversion.coverage
    assert coverage.used + coverage.unused_count == len(content)
    assert coverage.written == len(EfficientDet(config).state_dict())
    reasons = {why: len(names) for why, names in coverage.unused.items()}
    assert reasons == {
        "raw value (its moving average is used)": coverage.used,
        "optimizer slot": sum(name.endswith("/Momentum") for name in content),
        "training scalar": 1,
    }
    EfficientDet(config).load_state_dict(conversion.state_dict)


def test_a_segmentation_head_is_left_out_and_accounted_for(
    tmp_path: Path, content: Variables, config: EfficientDetConfig
) -> None:
    """By its names in graphs and .h5 files, and by its path in object-based checkpoints."""
    head = {
        f"{scope}/{name}{suffix}": np.zeros(3, np.float32)
        for scope in ("segmentation_head", "seg_head")
        for name in ("bn_0/gamma", "conv2d_transpose_4/bias")
        for suffix in ("", EMA_SUFFIX, "/Momentum")
    }
    write_bundle(tmp_path / "model", {**content, **head})
    with open_checkpoint(tmp_path) as checkpoint:
        conversion = convert(checkpoint, infer_config(checkpoint.shapes).config)
        assert inspect(checkpoint).unexpected == ()
    why = "the segmentation head, which is not ported: the detector does not run it"
    assert sorted(conversion.coverage.unused[why]) == sorted(head)
    assert conversion.digest == port(tmp_path / "plain", content, config).digest


def drop(name: str) -> Callable[[Variables], None]:
    def change(content: Variables) -> None:
        del content[name]

    return change


def put(name: str, value: np.ndarray) -> Callable[[Variables], None]:
    def change(content: Variables) -> None:
        content[name] = value

    return change


STEM = "efficientnet-lite0/stem/conv2d/kernel"
REFUSED = {
    "missing": (
        drop(STEM + EMA_SUFFIX),
        rf"{STEM} in .* has no moving average while other variables do; --ema-or-raw takes",
    ),
    "misshapen twin": (
        put("resample_p6/bn/beta", np.zeros(3, np.float32)),
        r"resample_p6/bn/beta in .* has shape \[3\], efficientdet-lite0 needs \[64\]",
    ),
    "misshapen slot": (
        put("resample_p6/bn/beta/Momentum", np.zeros(3, np.float32)),
        r"beta/Momentum has shape \[3\], but resample_p6/bn/beta has \[64\]; this checkpoint mixes two",
    ),
    "overflowing": (
        put("resample_p6/bn/beta" + EMA_SUFFIX, np.full(64, 1e300)),
        r"resample\.p6\.bn\.bias overflows float32",
    ),
    "misshapen": (
        put("resample_p6/bn/beta" + EMA_SUFFIX, np.zeros(3, np.float32)),
        r"shape \[3\].*needs \[64\]",
    ),
    "unknown": (
        put("fpn_cells/cell_7/extra", np.zeros(3, np.float32)),
        "fpn_cells/cell_7/extra is not a variable",
    ),
    "unknown, two lines": (
        put("fpn_cells/two\nlines", np.zeros(3, np.float32)),
        r"fpn_cells/two\\nlines is not a variable",
    ),
    "nan": (
        put("resample_p6/bn/beta" + EMA_SUFFIX, np.full(64, np.nan, np.float32)),
        "resample_p6/bn/beta holds 64 NaN",
    ),
    "infinite": (
        put("resample_p6/bn/beta" + EMA_SUFFIX, np.array([np.inf] + [0] * 63, np.float32)),
        "resample_p6/bn/beta holds 1 NaN or infinite value of 64",
    ),
    "negative variance": (
        put("resample_p6/bn/moving_variance" + EMA_SUFFIX, np.full(64, -1, np.float32)),
        "resample_p6/bn/moving_variance holds a negative variance",
    ),
    "integers": (
        put("resample_p6/bn/beta" + EMA_SUFFIX, np.zeros(64, np.int32)),
        "resample_p6/bn/beta holds int32",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_rejected(
    fault: str, tmp_path: Path, content: Variables, config: EfficientDetConfig
) -> None:
    change, message = REFUSED[fault]
    broken = dict(content)
    change(broken)
    with pytest.raises(ConversionError, match=message):
        port(tmp_path, broken, config)


def test_a_variable_without_any_value_is_named(
    tmp_path: Path, content: Variables, config: EfficientDetConfig
) -> None:
    broken = {name: value for name, value in content.items() if not name.startswith(STEM)}
    with pytest.raises(ConversionError, match=rf"needs {STEM}.*which .* lacks"):
        port(tmp_path, broken, config)


def test_averages_without_raw_values(tmp_path: Path, content: Variables, config: EfficientDetConfig) -> None:
    only = {name: value for name, value in content.items() if name.endswith(EMA_SUFFIX)}
    assert port(tmp_path, only, config).values_kind == "EMA"
    with pytest.raises(ConversionError, match=r"has no raw value, only a moving average; leave out --raw"):
        port(tmp_path, only, config, raw=True)


def test_averages_where_they_are_and_raw_values_elsewhere(
    tmp_path: Path, content: Variables, config: EfficientDetConfig
) -> None:
    names = [STEM, "resample_p6/bn/moving_variance"]
    partial = {name: value for name, value in content.items() if name not in {n + EMA_SUFFIX for n in names}}
    found = port(tmp_path, partial, config, ema_or_raw=True)
    count = len(variable_shapes(config))
    assert found.values_kind == f"EMA ({count - 2} of {count}, the rest raw)"
    for name, value in found.variables.items():
        expected = content[name if name in names else name + EMA_SUFFIX]
        assert value.tobytes() == expected.tobytes()
    left_out = {name for names in found.coverage.unused.values() for name in names}
    assert left_out.isdisjoint(names)
    assert port(tmp_path, content, config, ema_or_raw=True).values_kind == "EMA"
    raw = {name: value for name, value in content.items() if not name.endswith(EMA_SUFFIX)}
    assert port(tmp_path, raw, config, ema_or_raw=True).values_kind == "raw"


def test_a_partial_average_is_found_by_comparison_too(
    tmp_path: Path, content: Variables, config: EfficientDetConfig
) -> None:
    partial = {name: value for name, value in content.items() if name != STEM + EMA_SUFFIX}
    state_dict = port(tmp_path, partial, config, ema_or_raw=True).state_dict
    with open_checkpoint(tmp_path / "model") as checkpoint:
        found = compare_with_checkpoint(ComparedWeights("w", state_dict, config), checkpoint, config)
    assert found.passed
    count = len(variable_shapes(config))
    assert found.match == f"EMA ({count - 1} of {count}, the rest raw)"


@pytest.mark.parametrize("kind", ["EMA", "raw", "EMA (3 of 4, the rest raw)"])
def test_the_kind_of_values_says_how_to_convert_again(kind: str) -> None:
    assert how_converted(kind) == {"raw": kind == "raw", "ema_or_raw": "(" in kind}
    assert kind.partition(" ")[0].lower() in values_sentence(kind).lower()


def test_scalars_of_automls_training_are_left_out(
    tmp_path: Path, content: Variables, config: EfficientDetConfig
) -> None:
    """positives_momentum has a running mean, mixed precision a loss scale, Adam the powers of its betas."""
    floats = ("moving_normalizer", "current_loss_scale", "beta1_power", "beta2_power")
    scalars: Variables = {name: np.array(1, np.float32) for name in floats}
    scalars["good_steps"] = np.array(7, np.int64)
    found = port(tmp_path, {**content, **scalars}, config).coverage
    assert sorted(found.unused["training scalar"]) == sorted({*scalars, "global_step"})


def test_float64_keeps_the_folded_mean_exact(
    tmp_path: Path, content: Variables, config: EfficientDetConfig
) -> None:
    write_bundle(tmp_path / "model", content)
    with open_checkpoint(tmp_path) as checkpoint:
        exact = convert(checkpoint, config, dtype="float64").state_dict["resample.p6.bn.running_mean"]
    scope = "resample_p6"
    mean = content[f"{scope}/bn/moving_mean{EMA_SUFFIX}"].astype(np.float64)
    np.testing.assert_array_equal(exact.numpy(), mean - content[f"{scope}/conv2d/bias{EMA_SUFFIX}"])


def test_removing_biases_keeps_the_function_in_training_mode() -> None:
    """Both networks are the same function after a training step, too.

    A bias before a batch norm cancels with the mean of the batch, and it shifts the running mean's update by
    as much as the folded mean was shifted.
    """
    recording = golden_recording("efficientdet-lite0")
    variables, scope = recording.variables(), "resample_p6"
    kernel = torch.from_numpy(variables[f"{scope}/conv2d/kernel"].transpose(3, 2, 0, 1).astype(np.float64))
    bias = torch.from_numpy(variables[f"{scope}/conv2d/bias"].astype(np.float64))
    folded = EfficientDet(recording.config).double().resample["p6"]
    ported = apply_rules(rules(recording.config), variables, "float64")
    prefix = "resample.p6."
    folded.load_state_dict({k.removeprefix(prefix): v for k, v in ported.items() if k.startswith(prefix)})
    plain = torch.nn.BatchNorm2d(len(bias), eps=1e-3, momentum=0.01, dtype=torch.float64)
    for leaf, name in (("weight", "gamma"), ("bias", "beta"), ("running_mean", "moving_mean")):
        plain.state_dict()[leaf].copy_(torch.from_numpy(variables[f"{scope}/bn/{name}"]))
    plain.state_dict()["running_var"].copy_(torch.from_numpy(variables[f"{scope}/bn/moving_variance"]))
    x = torch.randn(2, kernel.shape[1], 4, 4, dtype=torch.float64)
    for training in (False, True, False):
        folded.train(training)
        plain.train(training)
        expected = plain(torch.nn.functional.conv2d(x, kernel, bias))
        torch.testing.assert_close(folded(x, (4, 4)), expected, rtol=0, atol=1e-12)


def break_rules(monkeypatch: pytest.MonkeyPatch, change: Callable[[Rule], list[Rule]]) -> None:
    broken = [new for rule in rules(model_config("efficientdet-d0")) for new in change(rule)]
    monkeypatch.setattr("porting.convert.rules", lambda config: iter(broken))


BROKEN_RULES: dict[str, tuple[Callable[[Rule], list[Rule]], str]] = {
    "a variable not used": (
        lambda r: [r._replace(sources=r.sources[:1]) if r.target == "resample.p6.bn.running_mean" else r],
        "uses resample_p6/conv2d/bias 0 times instead of 1",
    ),
    "a variable used twice": (
        lambda r: [r._replace(sources=tuple(s.replace("WSM_1", "WSM") for s in r.sources))],
        "WSM 2 times instead of 1",
    ),
    "a variable that does not exist": (
        lambda r: [r._replace(sources=tuple(s.replace("se/conv2d_1", "se/conv2d_2") for s in r.sources))],
        "conv2d_2/.*which efficientdet-d0 does not have",
    ),
    "a tensor written twice": (
        lambda r: [r, r._replace(sources=())] if r.target == "backbone.stem.bn.weight" else [r],
        r"writes backbone\.stem\.bn\.weight 2 times",
    ),
    "a level left out": (
        lambda r: [r._replace(sources=tuple(s.replace("bn-3", "bn-4") for s in r.sources))],
        r"-bn-3/\w+ 0 times instead of 1|-bn-4/\w+ 2 times",
    ),
}


@pytest.mark.parametrize("fault", BROKEN_RULES)
def test_a_broken_rule_table_never_converts(
    fault: str, shared_d0: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = BROKEN_RULES[fault]
    break_rules(monkeypatch, change)
    with open_checkpoint(shared_d0) as checkpoint, pytest.raises(ConversionError, match=message):
        convert(checkpoint, model_config("efficientdet-d0"))


@settings(deadline=None, max_examples=15)
@given(configs(), st.booleans())
def test_any_configuration_survives_writing_reading_and_inference(
    tmp_path_factory: pytest.TempPathFactory, config: EfficientDetConfig, momentum: bool
) -> None:
    content = synthetic_checkpoint(config, momentum=momentum)
    folder = tmp_path_factory.mktemp("any")
    write_bundle(folder / "model", content)
    unseen = ("num_scales", "aspect_ratios", "fpn_weight_method", "act_type", "survival_prob")
    overrides = {name: getattr(config, name) for name in (*unseen, "conv_after_downsample", "image_size")}
    endpoints = config.backbone.endpoints  # only a pipeline.config could tell
    told = {"endpoints": endpoints} if endpoints else {}
    with open_checkpoint(folder) as checkpoint:
        found = infer_config(checkpoint.shapes, checkpoint.source, overrides, told).config
        conversion = convert(checkpoint, found)
    assert (
        found.replace(
            name=config.name, anchor_scale=4.0, mean_rgb=config.mean_rgb, stddev_rgb=config.stddev_rgb
        )
        == config
    )
    for name, value in conversion.variables.items():
        np.testing.assert_array_equal(value, content[name + EMA_SUFFIX])


def test_the_real_d0_checkpoint(shared: Path) -> None:
    with open_checkpoint(shared / "oracle" / "checkpoints" / "efficientdet-d0") as checkpoint:
        inference = infer_config(checkpoint.shapes, checkpoint.source)
        conversion = convert(checkpoint, inference.config)
        assert checkpoint.step is not None
    assert inference.variant == "efficientdet-d0"
    assert (conversion.coverage.used, conversion.coverage.unused_count) == (709, 710)
    recording = golden_recording("efficientdet-d0")
    for name, value in recording.variables().items():
        np.testing.assert_array_equal(conversion.variables[name], value, err_msg=name)
