"""The catalogue of AutoML variables equals Google's own lists and the released checkpoints' indexes."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest

from parity_tests.helpers.paths import GOLDENS
from parity_tests.helpers.recordings import RELEASED
from porting.audit import PUBLISHED, audit_parameters
from porting.checkpoint.v2.index import read_index
from porting.scopes import model_name
from pytorch_model.config import MODELS, model_config
from tf_reference.variables import variable_shapes, variables

#: Trainable parameters without the biases that are followed by a batch norm.
BIAS_FREE = {
    "efficientdet-d0": 3_877_763,
    "efficientdet-d1": 6_622_026,
    "efficientdet-d2": 8_091_215,
    "efficientdet-d3": 12_022_376,
    "efficientdet-d4": 20_707_995,
    "efficientdet-d5": 33_633_155,
    "efficientdet-d6": 51_841_062,
    "efficientdet-d7": 51_841_062,
    "efficientdet-d7x": 77_110_302,
    "efficientdet-lite0": 3_241_166,
    "efficientdet-lite4": 15_115_214,
}


@pytest.mark.parametrize("model", MODELS)
def test_names_shapes_and_trainability_equal_googles(model: str) -> None:
    golden = json.loads((GOLDENS / "names.json").read_text())[model]
    ours = list(variables(model_config(model)))
    lines = sorted(f"{v.name} {list(v.shape)} {v.trainable}" for v in ours)
    assert len(ours) == golden["variables"]
    assert sum(math.prod(v.shape) for v in ours if v.trainable) == golden["trainable"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == golden["sha256"]


@pytest.mark.parametrize("model", MODELS)
def test_every_entry_of_googles_checkpoint_is_explained(model: str, shared: Path) -> None:
    content = json.loads((shared / "oracle" / model / "names_tf1_ckpt.json").read_text())["variables"]
    expected = variable_shapes(model_config(model))
    for name, entry in content.items():
        base = model_name(name)
        assert base is None or tuple(entry["shape"]) == expected[base], name
    assert {model_name(name) for name in content} == {*expected, None}


@pytest.mark.parametrize("folder", RELEASED)
def test_released_checkpoints_hold_exactly_these_variables(folder: str, shared: Path) -> None:
    entries = read_index(shared / "checkpoint_index" / folder / "model.index").entries
    expected = variable_shapes(model_config(RELEASED[folder]))
    for suffix in ("", "/ExponentialMovingAverage"):
        found = {
            name.removesuffix(suffix): entry.shape
            for name, entry in entries.items()
            if name.endswith("/ExponentialMovingAverage") == bool(suffix) and name != "global_step"
        }
        assert found == expected


@pytest.mark.parametrize("model", MODELS)
def test_parameter_counts(model: str) -> None:
    audit = audit_parameters(model_config(model))
    assert audit.agrees, f"{audit.automl} parameters, published {PUBLISHED[model].parameters}M"
    if model in BIAS_FREE:
        assert audit.ours == BIAS_FREE[model]


def test_a_custom_model_has_no_published_count() -> None:
    audit = audit_parameters(model_config("efficientdet-d0", num_classes=3))
    assert audit.published is None
    assert audit.agrees is None
