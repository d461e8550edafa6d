"""Comparing weight files: what is the same function is called so, and a difference is found where it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from parity_tests.helpers.configs import configs
from porting.checkpoint import Checkpoint, open_checkpoint
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import apply_rules, convert
from porting.errors import ConversionError, WeightsError
from porting.infer import infer_config
from porting.parity.compared_weights import ComparedWeights, read_weight_file
from porting.parity.weight_comparison import (
    CheckpointComparison,
    Verdict,
    WeightComparison,
    compare_weights,
    compare_with_checkpoint,
)
from porting.rules import rules
from porting.scopes import EMA_SUFFIX
from porting.synthetic import synthetic_checkpoint, synthetic_variables
from pytorch_model.config import BN_EPSILON, EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.weights.files import write_weights

State = dict[str, Tensor]

CONFIG = model_config("efficientdet-d0", num_classes=2, fpn_cell_repeats=1, box_class_repeats=1)


def random_state(config: EfficientDetConfig, seed: int = 0) -> State:
    """A healthy float64 state dict: no weight is zero, every variance positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {key: x.shape for key, x in EfficientDet(config).state_dict().items()}
    state: State = {}
    for key, shape in shapes.items():
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x + 0.1 * torch.sign(x)
        if key.endswith(".num_batches_tracked"):
            x = torch.zeros((), dtype=torch.int64)
        elif key.endswith((".running_var", ".fuse.weights")):
            x = x.abs()
        state[key] = x
    return state


@pytest.fixture(scope="module")
def exact() -> State:
    return random_state(CONFIG)


def rounded(state: State, dtype: torch.dtype = torch.float32) -> State:
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in state.items()}


def against(a: State, b: State, config: EfficientDetConfig | None = CONFIG) -> WeightComparison:
    return compare_weights(ComparedWeights("a", a, config), ComparedWeights("b", b, config))


def changed(comparison: WeightComparison) -> set[str]:
    return {row.key for row in comparison.differing if not row.same_function}


# --- the same -----------------------------------------------------------------------------------------


def test_equal_tensors_are_exact(exact: State) -> None:
    state = rounded(exact)
    comparison = against(state, {key: x.clone() for key, x in state.items()})
    assert comparison.verdict is Verdict.EXACT
    assert comparison.tensors == sum(x.is_floating_point() for x in state.values())
    assert comparison.differing == ()
    assert comparison.mismatches == comparison.notes == ()
    assert comparison.distance == 0
    assert "bit for bit" in comparison.explanation


def test_counters_and_nan_and_layout_do_not_matter(exact: State) -> None:
    a = {**exact, "box_net.bns.0.0.num_batches_tracked": torch.tensor(7)}
    b = {key: x for key, x in exact.items() if key != "class_net.bns.0.0.num_batches_tracked"}
    a["backbone.stem.conv.weight"] = exact["backbone.stem.conv.weight"].to(memory_format=torch.channels_last)
    a["backbone.stem.bn.bias"] = b["backbone.stem.bn.bias"] = torch.full((32,), math.nan, dtype=torch.float64)
    comparison = against(a, b)
    assert comparison.verdict is Verdict.EXACT
    assert comparison.notes == ("the counts of training batches differ, which evaluation does not read",)


def test_zero_has_no_sign_that_matters(exact: State) -> None:
    a, b = dict(exact), dict(exact)
    a["backbone.stem.bn.bias"], b["backbone.stem.bn.bias"] = (
        torch.full((32,), z).double() for z in (0.0, -0.0)
    )
    assert against(a, b).verdict is Verdict.SAME_FUNCTION


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_rounded_copy_is_the_same_function(exact: State, dtype: torch.dtype) -> None:
    comparison = against(exact, rounded(exact, dtype))
    assert comparison.verdict is Verdict.SAME_FUNCTION
    assert len(comparison.differing) == comparison.tensors
    assert f"a is float64, b {str(dtype)[6:]}" in comparison.notes[0]


def test_the_same_bytes_of_another_type_are_other_numbers(exact: State) -> None:
    half = rounded(exact, torch.float16)
    assert (
        against(
            half, {key: x.view(torch.bfloat16) if x.is_floating_point() else x for key, x in half.items()}
        ).verdict
        is Verdict.DIFFERENT
    )


BATCH_NORMS = {  # batch norm → the kernels before it, the one that makes its channels last
    "backbone.stem.bn": ("backbone.stem.conv.weight",),
    "backbone.blocks.3.depthwise.bn": ("backbone.blocks.3.depthwise.conv.weight",),
    "resample.p6.bn": ("resample.p6.conv.weight",),
    "bifpn.cells.0.nodes.4.resample.0.bn": ("bifpn.cells.0.nodes.4.resample.0.conv.weight",),
    "bifpn.cells.0.nodes.4.bn": (
        "bifpn.cells.0.nodes.4.conv.depthwise.weight",
        "bifpn.cells.0.nodes.4.conv.pointwise.weight",
    ),
}


def unfold_bias(state: State, bn: str, generator: torch.Generator) -> None:
    mean = state[f"{bn}.running_mean"]
    bias = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    key = bias_before(bn)
    state[key] = state[key] + bias if key in state else bias
    state[f"{bn}.running_mean"] = mean + bias


def bias_before(bn: str) -> str:
    return BATCH_NORMS[bn][-1].replace(".weight", ".bias")


def move_kernel_scale(state: State, bn: str, generator: torch.Generator) -> None:
    factor = 2.0 + torch.rand(state[f"{bn}.weight"].shape, generator=generator, dtype=torch.float64)
    state[BATCH_NORMS[bn][-1]] = state[BATCH_NORMS[bn][-1]] * factor.reshape(-1, 1, 1, 1)
    for key in (f"{bn}.running_mean", bias_before(bn)):
        if key in state:
            state[key] = state[key] * factor
    state[f"{bn}.weight"] = state[f"{bn}.weight"] / factor


def move_variance(state: State, bn: str, generator: torch.Generator) -> None:
    variance = state[f"{bn}.running_var"]
    other = torch.rand(variance.shape, generator=generator, dtype=torch.float64) + 0.01
    state[f"{bn}.weight"] = state[f"{bn}.weight"] * ((other + BN_EPSILON) / (variance + BN_EPSILON)).sqrt()
    state[f"{bn}.running_var"] = other


def move_mean(state: State, bn: str, generator: torch.Generator) -> None:
    scale = state[f"{bn}.weight"] / (state[f"{bn}.running_var"] + BN_EPSILON).sqrt()
    shift = torch.rand(scale.shape, generator=generator, dtype=torch.float64)
    state[f"{bn}.bias"] = state[f"{bn}.bias"] - shift * scale
    state[f"{bn}.running_mean"] = state[f"{bn}.running_mean"] - shift


def move_depthwise_scale(state: State, bn: str, generator: torch.Generator) -> None:
    depthwise, pointwise = BATCH_NORMS[bn]
    factor = 0.5 + torch.rand(len(state[depthwise]), generator=generator, dtype=torch.float64)
    state[depthwise] = state[depthwise] * factor.reshape(-1, 1, 1, 1)
    state[pointwise] = state[pointwise] / factor.reshape(1, -1, 1, 1)


Move = Callable[[State, str, torch.Generator], None]
MOVES: list[tuple[Move, str]] = [
    (move, bn)
    for bn, kernels in BATCH_NORMS.items()
    for move in (unfold_bias, move_kernel_scale, move_variance, move_mean, move_depthwise_scale)
    if move is not move_depthwise_scale or len(kernels) == 2
]


@pytest.mark.parametrize(("move", "bn"), MOVES)
def test_each_way_of_storing_one_function(exact: State, move: Move, bn: str) -> None:
    other = dict(exact)
    move(other, bn, torch.Generator().manual_seed(1))
    for a, b in ((rounded(exact), rounded(other)), (rounded(other), rounded(exact)), (exact, other)):
        comparison = against(a, b)
        assert comparison.verdict is Verdict.SAME_FUNCTION, comparison.explanation
        assert 0 < len(comparison.differing) <= 4
        assert "changes no part by more than rounding" in comparison.explanation


@settings(deadline=None, max_examples=25)
@given(moves=st.lists(st.sampled_from(MOVES), max_size=6), seed=st.integers(0, 2**32), data=st.data())
def test_any_way_of_storing_it_and_one_wrong_number(
    exact: State, moves: list[tuple[Move, str]], seed: int, data: st.DataObject
) -> None:
    """However the parts were re-split, they are the same; and one number 1 % off is seen through it."""
    other, generator = dict(exact), torch.Generator().manual_seed(seed)
    for move, bn in moves:
        move(other, bn, generator)
    a, b = rounded(other), rounded(exact)
    assert against(a, b).same_function
    key = data.draw(st.sampled_from([key for key in b if b[key].is_floating_point()]))
    broken = b[key].reshape(-1).clone()
    broken[data.draw(st.integers(0, len(broken) - 1))] *= 1.01
    comparison = against(a, {**b, key: broken.reshape(b[key].shape)})
    assert comparison.verdict is Verdict.DIFFERENT
    assert key in changed(comparison)


def test_the_same_function_computes_the_same(exact: State) -> None:
    """What the parts claim, by running the network."""
    other, generator = dict(exact), torch.Generator().manual_seed(2)
    for move, bn in MOVES:
        if move is not unfold_bias:  # the network has no room for that bias
            move(other, bn, generator)
    assert against(other, exact).verdict is Verdict.SAME_FUNCTION
    model = EfficientDet(CONFIG).double().eval()
    outputs = []
    for state in (exact, other):
        model.load_state_dict(state)
        with torch.no_grad():
            outputs.append(
                torch.cat([x.reshape(-1) for side in model(torch.ones(1, 3, 64, 64).double()) for x in side])
            )
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=0)


def test_a_bias_shared_by_the_levels_of_a_head(exact: State) -> None:
    other = dict(exact)
    bias = torch.linspace(-1, 1, 64).double()
    other["class_net.convs.0.pointwise.bias"] = bias
    for level in range(5):
        other[f"class_net.bns.0.{level}.running_mean"] = exact[f"class_net.bns.0.{level}.running_mean"] + bias
    comparison = against(rounded(other), rounded(exact))
    assert comparison.verdict is Verdict.SAME_FUNCTION
    assert {row.key for row in comparison.differing} == {
        f"class_net.bns.0.{level}.running_mean" for level in range(5)
    }
    other["class_net.bns.0.3.running_mean"] = exact["class_net.bns.0.3.running_mean"]
    comparison = against(rounded(other), rounded(exact))
    assert comparison.verdict is Verdict.DIFFERENT
    (mismatch,) = comparison.mismatches
    assert mismatch.startswith("a bias that only one of them has changes class_net.bns.0.3 (relative ")


def test_a_shared_convolution_shows_the_level_that_differs_most(exact: State) -> None:
    other = dict(exact)
    other["class_net.convs.0.pointwise.weight"] = exact["class_net.convs.0.pointwise.weight"] * 2
    for level in (0, 1, 2, 4):
        bn = f"class_net.bns.0.{level}"
        other[f"{bn}.weight"] = exact[f"{bn}.weight"] / 2
        other[f"{bn}.running_mean"] = exact[f"{bn}.running_mean"] * 2
    comparison = against(rounded(other), rounded(exact))
    (row,) = (row for row in comparison.differing if not row.same_function)
    assert (row.key, row.part) == ("class_net.convs.0.pointwise.weight", "class_net.bns.0.3")
    assert comparison.first is row


@pytest.mark.parametrize(
    "key",
    [
        "backbone.stem.conv.weight",
        "backbone.stem.bn.weight",
        "backbone.stem.bn.bias",
        "backbone.stem.bn.running_mean",
        "backbone.stem.bn.running_var",
        "backbone.blocks.0.se.reduce.bias",
        "bifpn.cells.0.nodes.4.conv.depthwise.weight",
        "bifpn.cells.0.nodes.4.fuse.weights",
        "box_net.predict.pointwise.weight",
    ],
)
@pytest.mark.parametrize("method", ["fastattn", "attn"])
def test_rounding_is_distinguished_from_a_larger_change(exact: State, key: str, method: str) -> None:
    """One tensor rounded to float16 is the same; forty roundings off in one number, it is not."""
    config = CONFIG.replace(fpn_weight_method=method)
    half = exact[key].half()
    assert against({**exact, key: half}, exact, config).verdict is Verdict.SAME_FUNCTION
    off = half.double().reshape(-1).clone()
    off[0] *= 1 + 40 * 2.0**-11
    wrong = {**exact, key: off.reshape(half.shape).half()}
    assert against(wrong, exact, config).verdict is Verdict.DIFFERENT


def test_a_bias_that_fits_no_channels_is_not_folded(exact: State) -> None:
    comparison = against({**exact, "resample.p6.conv.bias": torch.zeros(3)}, exact)
    assert comparison.mismatches == ("b lacks resample.p6.conv.bias",)


def test_a_bias_of_zeros_is_no_difference(exact: State) -> None:
    comparison = against({**exact, "resample.p6.conv.bias": torch.zeros(64)}, exact)
    assert comparison.verdict is Verdict.SAME_FUNCTION
    assert comparison.differing == ()
    assert "biases folded" in comparison.explanation


NODE = "bifpn.cells.0.nodes.4.fuse.weights"


@pytest.mark.parametrize(
    ("method", "ours", "theirs", "same"),
    [
        ("fastattn", [1.0, -0.5, 2.0], [1.0, -0.7, 2.0], True),
        ("fastattn", [1.0, 0.5, 2.0], [1.0, 0.7, 2.0], False),
        ("fastattn", [1.0, 0.5, 2.0], [2.0, 1.0, 4.0], False),  # the 1e-4 in the sum does not scale
        ("attn", [1.0, -0.5, 2.0], [1.0, -0.7, 2.0], False),
        ("attn", [1.0, -0.5, 2.0], [2.0, 0.5, 3.0], True),
    ],
)
def test_fusion_weights_count_as_the_network_uses_them(
    exact: State, method: str, ours: list[float], theirs: list[float], same: bool
) -> None:
    a, b = ({**rounded(exact), NODE: torch.tensor(x)} for x in (ours, theirs))
    assert against(a, b, CONFIG.replace(fpn_weight_method=method)).same_function is same
    assert not against(a, b, None).same_function


# --- different ----------------------------------------------------------------------------------------


def test_differences_are_listed_worst_first_and_the_first_is_named(exact: State) -> None:
    a, b = rounded(exact), rounded(exact)
    factors = {
        "box_net.predict.pointwise.bias": 1.5,
        "backbone.blocks.2.se.reduce.bias": 1.01,
        "class_net.convs.0.pointwise.weight": 3.0,
        "backbone.stem.bn.running_var": 1.001,
    }
    for key, factor in reversed(factors.items()):
        a[key] = a[key] * factor
    comparison = against(a, b)
    assert comparison.verdict is Verdict.DIFFERENT
    assert [row.key for row in comparison.differing] == [
        "class_net.convs.0.pointwise.weight",
        "box_net.predict.pointwise.bias",
        "backbone.blocks.2.se.reduce.bias",
        "backbone.stem.bn.running_var",
    ]
    assert comparison.first is not None
    assert comparison.first.key == "backbone.stem.bn.running_var"
    assert comparison.first.part == "backbone.stem"
    for row in comparison.differing:
        assert row.difference.relative == pytest.approx(factors[row.key] - 1, rel=1e-3)
        assert not row.same_function
    error = math.sqrt(sum(float((a[key] - b[key]).double().square().sum()) for key in factors))
    norm = math.sqrt(sum(float(x.double().square().sum()) for x in b.values()))
    assert comparison.distance == pytest.approx(error / norm)
    for name in ("4 of", "first is backbone.stem.bn.running_var", "worst class_net.convs.0.pointwise.weight"):
        assert name in comparison.explanation


def test_what_only_looks_different_comes_after(exact: State) -> None:
    a = dict(exact)
    move_mean(a, "backbone.stem.bn", torch.Generator())
    a["box_net.predict.pointwise.bias"] = exact["box_net.predict.pointwise.bias"] * 1.0001
    comparison = against(rounded(a), rounded(exact))
    assert [row.same_function for row in comparison.differing] == [False, True, True]
    assert {row.part for row in comparison.differing[1:]} == {"backbone.stem"}
    assert comparison.differing[0].key == "box_net.predict.pointwise.bias"
    assert comparison.first is comparison.differing[0]
    alone = against(rounded({**exact, comparison.first.key: a[comparison.first.key]}), rounded(exact))
    assert comparison.distance == pytest.approx(alone.distance, rel=1e-6)


@pytest.mark.parametrize(
    ("key", "part"),
    [
        ("class_net.convs.0.depthwise.weight", "class_net.bns.0."),
        ("box_net.predict.depthwise.weight", "box_net.predict"),
        ("backbone.blocks.2.se.expand.weight", "backbone.blocks.2.se.expand"),
        ("bifpn.cells.0.nodes.0.fuse.weights", "bifpn.cells.0.nodes.0.fuse"),
    ],
)
def test_tensors_are_counted_to_the_part_they_work_in(exact: State, key: str, part: str) -> None:
    other = {**exact, key: exact[key] + 0.5}
    (row,) = against(other, exact).differing
    assert row.part.startswith(part)


def test_nan_against_a_number_is_different(exact: State) -> None:
    spoilt = exact["backbone.stem.conv.weight"].clone()
    spoilt[3, 1, 0, 0] = math.nan
    comparison = against({**exact, "backbone.stem.conv.weight": spoilt}, exact)
    assert comparison.verdict is Verdict.DIFFERENT
    assert comparison.first is not None
    assert math.isinf(comparison.first.difference.relative)
    assert math.isinf(comparison.distance)


def test_keys_and_shapes_that_do_not_correspond(exact: State) -> None:
    other = {**exact, "extra.weight": torch.ones(3), "class_net.predict.pointwise.bias": torch.ones(7)}
    del other["backbone.stem.bn.weight"], other["backbone.stem.bn.bias"]
    comparison = against(exact, other)
    assert comparison.verdict is Verdict.DIFFERENT
    assert comparison.mismatches == (
        "a lacks extra.weight",
        "b lacks backbone.stem.bn.weight and 1 more that a has",
        "class_net.predict.pointwise.bias is [18] in a, [7] in b",
    )
    assert comparison.differing == ()
    assert "different networks: a lacks extra.weight (and 2 more)" in comparison.explanation


def test_integers_are_not_compared_as_weights(exact: State) -> None:
    key = "backbone.stem.bn.weight"
    comparison = against({**exact, key: exact[key].to(torch.int8)}, exact)
    assert comparison.mismatches == (f"{key} is int8 in a, float64 in b",)


def test_settings_that_change_the_network(exact: State) -> None:
    def configured(**changes: object) -> WeightComparison:
        return compare_weights(
            ComparedWeights("a", exact, CONFIG.replace(**changes)), ComparedWeights("b", exact, CONFIG)
        )

    assert configured(act_type="relu6").mismatches == ("act_type is relu6 in a, swish in b",)
    assert configured(survival_prob=0.8).verdict is Verdict.DIFFERENT
    deeper = dataclasses.replace(CONFIG.backbone, stem_filters=40)
    assert configured(backbone=deeper).mismatches[0] == (
        f"backbone.stem_filters is 40 in a, {CONFIG.backbone.stem_filters} in b"
    )
    other = dataclasses.replace(deeper, name="efficientnet-b3")
    assert configured(backbone=other).mismatches[0] == (
        f"backbone is efficientnet-b3 in a, {CONFIG.backbone.name} in b"
    )
    renamed = dataclasses.replace(CONFIG.backbone, name="efficientnet-mine")
    harmless_changes: list[dict[str, object]] = [
        {"name": "mine"},
        {"act_type": "silu"},
        {"backbone": renamed},
    ]
    for harmless in harmless_changes:
        assert configured(**harmless).notes == ()
        assert configured(**harmless).verdict is Verdict.EXACT
    around = configured(anchor_scale=3.0)
    assert around.verdict is Verdict.EXACT
    assert around.notes == ("anchor_scale is 3.0 in a, 4.0 in b: detections differ",)


def test_without_a_configuration(exact: State) -> None:
    comparison = compare_weights(ComparedWeights("a", exact), ComparedWeights("b", exact, CONFIG))
    assert comparison.verdict is Verdict.EXACT
    assert comparison.notes == ("a has no configuration; the other's is used for both",)
    shuffled = dict(reversed(exact.items()))
    for key in ("backbone.stem.bn.bias", "class_net.predict.pointwise.bias"):
        shuffled[key] = exact[key] + 1
    first = compare_weights(ComparedWeights("a", shuffled), ComparedWeights("b", exact, CONFIG)).first
    assert first is not None
    assert first.key == "backbone.stem.bn.bias"


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(config=configs(), data=st.data())
def test_any_configuration(config: EfficientDetConfig, data: st.DataObject) -> None:
    state = random_state(config)
    assert against(rounded(state), state, config).same_function
    key = data.draw(st.sampled_from([key for key in state if state[key].is_floating_point()]))
    comparison = against({**state, key: state[key] * 2}, state, config)
    assert changed(comparison) == {key}
    assert comparison.first is not None
    assert comparison.first.key == key


# --- against a checkpoint -----------------------------------------------------------------------------

Variables = dict[str, np.ndarray]
LITE = model_config("efficientdet-lite0", num_classes=2, fpn_cell_repeats=1, box_class_repeats=1)


@pytest.fixture(scope="module")
def content() -> Variables:
    return synthetic_checkpoint(LITE)


@pytest.fixture(scope="module")
def checkpoint_folder(content: Variables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_bundle(folder / "model", content)
    return folder


def compared(state: State, folder: Path) -> CheckpointComparison:
    with open_checkpoint(folder) as checkpoint:
        return compare_with_checkpoint(ComparedWeights("mine", state, LITE), checkpoint, LITE)


def ported(folder: Path, raw: bool = False) -> State:
    with open_checkpoint(folder) as checkpoint:
        return convert(checkpoint, LITE, raw).state_dict


def test_the_averaged_values_are_the_default(checkpoint_folder: Path) -> None:
    comparison = compared(ported(checkpoint_folder), checkpoint_folder)
    assert (comparison.match, comparison.default, comparison.passed) == ("EMA", "EMA", True)
    assert comparison.nearest.verdict is Verdict.EXACT


def test_raw_values_are_recognised(checkpoint_folder: Path) -> None:
    comparison = compared(ported(checkpoint_folder, raw=True), checkpoint_folder)
    assert (comparison.match, comparison.default, comparison.passed) == ("raw", "EMA", False)
    assert comparison.nearest.verdict is Verdict.EXACT
    assert not comparison.comparisons["EMA"].same_function
    assert "holds the raw values of" in comparison.explanation


def test_averages_with_raw_statistics_are_recognised(checkpoint_folder: Path, content: Variables) -> None:
    mixed = {
        name: content[name if name.endswith(("moving_mean", "moving_variance")) else name + EMA_SUFFIX]
        for name in content
        if name + EMA_SUFFIX in content
    }
    comparison = compared(apply_rules(rules(LITE), mixed), checkpoint_folder)
    assert comparison.match == "EMA with raw statistics"
    assert not comparison.passed
    assert "EMA with raw statistics values" in comparison.explanation


def test_weights_of_another_run_match_nothing(checkpoint_folder: Path) -> None:
    state = apply_rules(rules(LITE), synthetic_variables(LITE, seed=1))
    comparison = compared(state, checkpoint_folder)
    assert comparison.match is None
    assert not comparison.passed
    assert list(comparison.comparisons) == ["EMA", "raw", "EMA with raw statistics"]
    assert comparison.nearest.distance == min(c.distance for c in comparison.comparisons.values())
    assert comparison.explanation == comparison.nearest.explanation


def test_nearly_averaged_values_are_nearest_to_them(checkpoint_folder: Path) -> None:
    state = ported(checkpoint_folder)
    state["box_net.predict.pointwise.bias"] += 1
    comparison = compared(state, checkpoint_folder)
    assert comparison.match is None
    assert comparison.nearest is comparison.comparisons["EMA"]
    assert changed(comparison.nearest) == {"box_net.predict.pointwise.bias"}


def test_a_checkpoint_without_averages(content: Variables, tmp_path: Path) -> None:
    write_bundle(tmp_path / "model", {k: v for k, v in content.items() if not k.endswith(EMA_SUFFIX)})
    comparison = compared(ported(tmp_path), tmp_path)
    assert (comparison.match, comparison.default, comparison.passed) == ("raw", "raw", True)


def test_averages_alone(content: Variables, tmp_path: Path) -> None:
    write_bundle(tmp_path / "model", {k: v for k, v in content.items() if k.endswith(EMA_SUFFIX)})
    comparison = compared(apply_rules(rules(LITE), synthetic_variables(LITE, seed=1)), tmp_path)
    assert list(comparison.comparisons) == ["EMA"]


def test_a_checkpoint_of_another_model_is_rejected(checkpoint_folder: Path) -> None:
    with open_checkpoint(checkpoint_folder) as checkpoint, pytest.raises(ConversionError):
        compare_with_checkpoint(ComparedWeights("mine", {}), checkpoint, CONFIG)


def opened(path: Path) -> tuple[Checkpoint, EfficientDetConfig]:
    checkpoint = open_checkpoint(path)
    return checkpoint, infer_config(checkpoint.shapes, checkpoint.source).config


def test_the_public_tflite_file_and_the_checkpoint_made_of_it(shared: Path) -> None:
    """Batch norms folded into kernels on one side, re-split on the other. Only the prediction biases differ:
    the TFLite file stores one per level, each rounded on its own, and one of the five had to be taken."""
    states = []
    for name in ("efficientdet_lite0.tflite", "efficientdet-lite0"):
        checkpoint, config = opened(shared / "lite0" / name)
        with checkpoint:
            states.append(ComparedWeights(name, convert(checkpoint, config).state_dict, config))
    comparison = compare_weights(*states)
    assert comparison.mismatches == ()
    assert len(comparison.differing) > 500
    assert changed(comparison) == {f"{kind}_net.predict.pointwise.bias" for kind in ("class", "box")}
    print(f"all in all {comparison.distance:.1e}")
    assert comparison.distance < max(row.difference.relative for row in comparison.differing[:2])
    for row in comparison.differing:
        assert row.part_difference.relative < (2e-5 if not row.same_function else 1e-7)


# --- files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_our_own_files(exact: State, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    write_weights(path, rounded(exact), CONFIG, {})
    weights = read_weight_file(path)
    assert (weights.source, weights.config) == (str(path), CONFIG)
    assert compare_weights(weights, ComparedWeights("b", rounded(exact), CONFIG)).verdict is Verdict.EXACT


def wrap_nothing(state: State) -> object:
    return state


def wrap_state_dict(state: State) -> object:
    return {"epoch": 3, "state_dict": state}


def wrap_model(state: State) -> object:
    return {"model": state, "optimizer": {}}


@pytest.mark.parametrize("wrap", [wrap_nothing, wrap_state_dict, wrap_model])
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_plain_files(exact: State, tmp_path: Path, wrap: Callable[[State], object], suffix: str) -> None:
    path = tmp_path / f"theirs{suffix}"
    torch.save(wrap(exact), path)
    weights = read_weight_file(path)
    assert weights.config is None
    assert compare_weights(weights, ComparedWeights("b", exact, CONFIG)).verdict is Verdict.EXACT


def test_a_plain_safetensors_file(exact: State, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(exact, tmp_path / "theirs.safetensors")
    weights = read_weight_file(tmp_path / "theirs.safetensors")
    assert weights.config is None
    assert compare_weights(weights, ComparedWeights("b", exact, CONFIG)).verdict is Verdict.EXACT


class Malicious:
    def __repr__(self) -> str:
        return "Malicious()"

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.touch, (Path("executed"),)  # type: ignore[return-value]


@pytest.mark.parametrize("content", [{"a": Malicious()}, {"a": 3}, [1, 2], {}, {3: torch.ones(1)}], ids=repr)
def test_a_file_without_weights_is_rejected(
    content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"x\.pth"):
        read_weight_file(tmp_path / "x.pth")
    assert not (tmp_path / "executed").exists()


def test_missing_and_damaged_files_are_rejected(exact: State, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weight file at"):
        read_weight_file(tmp_path / "none.pt")
    path = tmp_path / "cut.pth"
    torch.save(exact, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"cut\.pth is damaged"):
        read_weight_file(path)


def test_a_bad_configuration_is_not_passed_over(exact: State, tmp_path: Path) -> None:
    torch.save({"state_dict": exact, "config": "{}"}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match="unusable configuration"):
        read_weight_file(tmp_path / "bad.pth")
