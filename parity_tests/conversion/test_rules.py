"""The rule table covers both sides exactly, and every rule can be inverted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from parity_tests.helpers.configs import configs
from porting.convert import apply_rules, check_targets
from porting.errors import ConversionError
from porting.rules import Rule, rules, taps
from porting.transforms import FOLD_BIAS_INTO_MEAN
from pytorch_model.config import MODELS, EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from tf_reference.variables import variable_shapes


def check_coverage(config: EfficientDetConfig) -> None:
    """Every variable is used once (head biases more often), every tensor is written once, shapes agree."""
    table = list(rules(config))
    shapes = variable_shapes(config)
    assert len({rule.target for rule in table}) == len(table)
    sources = [source for rule in table for source in rule.sources]
    assert set(sources) == shapes.keys()
    for source in set(sources):
        shared = source.endswith("/bias") and source.startswith(("class_net/", "box_net/"))
        times = len(config.levels) if shared and "predict" not in source else 1
        assert sources.count(source) == times, source
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    check_targets(apply_rules(table, values), config)
    for rule in table:
        check_inverse(rule, values)


def check_inverse(rule: Rule, values: dict[str, np.ndarray]) -> None:
    arrays = tuple(values[source] for source in rule.sources)
    back = rule.transform.inverse(rule.transform.forward(*arrays), len(arrays))
    assert [a.shape for a in back] == [a.shape for a in arrays]
    if rule.transform is FOLD_BIAS_INTO_MEAN:
        assert not back[1].any()
        np.testing.assert_allclose(back[0], arrays[0].astype(np.float64) - arrays[1], rtol=1e-15)
        return
    for got, wanted in zip(back, arrays, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("model", MODELS)
def test_every_variant_is_covered(model: str) -> None:
    check_coverage(model_config(model))


@settings(deadline=None, max_examples=60)
@given(configs())
def test_any_configuration_is_covered(config: EfficientDetConfig) -> None:
    check_coverage(config)


@pytest.mark.parametrize("model", MODELS)
def test_taps_name_real_modules_and_every_layer(model: str) -> None:
    config = model_config(model)
    with torch.device("meta"):
        network = EfficientDet(config)
    pairs = list(taps(config))
    assert len({pair.tap for pair in pairs}) == len(pairs)
    for pair in pairs:
        network.get_submodule(pair.module)
    named = {pair.module for pair in pairs}
    blocks = [f"backbone.blocks.{i}" for i in range(len(config.backbone.blocks))]
    nodes = [
        f"bifpn.cells.{c}.nodes.{n}"
        for c in range(config.fpn_cell_repeats)
        for n in range(len(config.bifpn_nodes))
    ]
    resamples = [f"{node}.resample.{i}" for node in nodes for i in range(2)]
    bns = [
        f"{head}_net.bns.{i}.{level}"
        for head in ("class", "box")
        for i in range(config.box_class_repeats)
        for level in range(len(config.levels))
    ]
    extra = [f"resample.p{level}" for level in config.extra_levels]
    parts = [f"{block}.project" for block in blocks] + [f"{node}.fuse" for node in nodes]
    assert {"backbone.stem", *blocks, *parts, *nodes, *resamples, *extra, *bns} <= named
    outputs = {(pair.module, pair.output) for pair in pairs if pair.output is not None}
    levels = range(len(config.levels))
    assert outputs == {(f"{head}_net", level) for head in ("class", "box") for level in levels}


def test_a_rule_with_a_wrong_target_is_caught() -> None:
    config = model_config("efficientdet-d0")
    values = {name: np.zeros(shape, np.float32) for name, shape in variable_shapes(config).items()}
    table = [rule._replace(target=rule.target.replace("cells.0", "cells.9")) for rule in rules(config)]
    with pytest.raises(ConversionError, match=r"leave unwritten bifpn\.cells\.0"):
        check_targets(apply_rules(table, values), config)


def test_folding_a_bias_keeps_more_than_float32() -> None:
    mean, bias = np.array([1.0], np.float32), np.array([1e-9], np.float32)
    assert FOLD_BIAS_INTO_MEAN.forward(mean, bias)[0] == np.float64(mean[0]) - np.float64(bias[0]) != 1.0
