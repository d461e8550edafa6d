"""The parity engine: equal networks pass, and a fault is found in the layer that has it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from parity_tests.helpers.configs import configs
from parity_tests.helpers.recordings import normalise
from porting.convert import apply_rules
from porting.parity import ParityResult, compare, difference, tensorflow_reference
from porting.rules import TapPair, rules, taps
from porting.synthetic import synthetic_image, synthetic_variables
from pytorch_model.config import EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet

pytestmark = pytest.mark.usefixtures("tensorflow")


def run(
    config: EfficientDetConfig,
    dtype: str,
    size: tuple[int, int],
    sabotage: Callable[[EfficientDet], None] = lambda model: None,
) -> ParityResult:
    values = synthetic_variables(config)
    model = EfficientDet(config).to(getattr(torch, dtype)).eval()
    model.load_state_dict(apply_rules(rules(config), values, dtype))
    sabotage(model)
    images = normalise(synthetic_image(*size)[None], config).astype(dtype)
    return compare(model, tensorflow_reference(values, config, images, dtype), images)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_d0_is_equal_at_every_tap(dtype: str) -> None:
    config = model_config("efficientdet-d0")
    result = run(config, dtype, (256, 256))
    assert [tap.pair for tap in result.taps] != []
    assert {tap.pair for tap in result.taps} == set(taps(config))
    assert result.passed
    assert result.first_divergence is None


@pytest.mark.parametrize("size", [(130, 257), (300, 200), (255, 255)], ids=str)
def test_sizes_that_no_power_of_two_divides(size: tuple[int, int]) -> None:
    assert run(model_config("efficientdet-d0"), "float64", size).passed


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs())
def test_any_configuration_is_equal(config: EfficientDetConfig) -> None:
    result = run(config, "float64", config.image_size)
    assert result.passed, result.first_divergence


def scale(name: str, factor: float = 1.01) -> Callable[[EfficientDet], None]:
    def sabotage(model: EfficientDet) -> None:
        with torch.no_grad():
            model.get_parameter(name).mul_(factor)

    return sabotage


FAULTS = {
    "backbone.stem.conv.weight": "efficientnet-b0/stem",
    "backbone.blocks.7.expand.conv.weight": "efficientnet-b0/blocks_7/tpu_batch_normalization",
    "backbone.blocks.7.se.reduce.bias": "efficientnet-b0/blocks_7/se",
    "resample.p6.conv.weight": "resample_p6",
    "bifpn.cells.0.nodes.4.resample.0.bn.weight": "fpn_cells/cell_0/fnode4/resample_0_1_9",
    "bifpn.cells.1.nodes.5.conv.depthwise.weight": "fpn_cells/cell_1/fnode5",
    "class_net.convs.1.pointwise.weight": "class_net/class-1-bn-3",
    "box_net.bns.2.3.bias": "box_net/box-2-bn-6",
    "box_net.predict.pointwise.bias": "box_outputs/3",
}


@pytest.mark.parametrize("parameter", FAULTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_fault_is_found_where_it_is(parameter: str, dtype: str) -> None:
    result = run(model_config("efficientdet-d0"), dtype, (128, 128), scale(parameter))
    assert not result.passed
    assert result.first_divergence is not None
    assert result.first_divergence.pair.tap == FAULTS[parameter]


@pytest.mark.parametrize("cells", [1, 6])
def test_few_activations_are_alive_at_once(cells: int) -> None:
    """Whatever the depth: compared and let go. A head's outputs wait for its last level, one a level."""
    config = model_config("efficientdet-d0", fpn_cell_repeats=cells)
    values = synthetic_variables(config)
    model = EfficientDet(config).eval()
    model.load_state_dict(apply_rules(rules(config), values))
    images = normalise(synthetic_image(128, 128)[None], config)
    inner = tensorflow_reference(values, config, images, "float32")
    theirs, ours = Alive(), Alive()

    def reference(emit: Callable[[str, np.ndarray], None]) -> None:
        def counted(name: str, value: np.ndarray) -> None:
            theirs.add(value)
            emit(name, value)

        inner(counted)

    def observe(pair: TapPair, mine: np.ndarray, expected: np.ndarray) -> None:
        assert mine.base is not None
        ours.add(mine.base)

    result = compare(model, reference, images, observe=observe)
    assert result.passed
    print(
        f"{len(result.taps)} activations; alive at once: {theirs.most} of TensorFlow's, {ours.most} of ours"
    )
    assert theirs.seen == ours.seen == len(result.taps)
    assert theirs.most <= len(config.levels) + 4
    assert ours.most <= 2


class Alive:
    """Counts arrays that have been shown and are still held by someone."""

    def __init__(self) -> None:
        self.seen = self.most = 0
        self._references: list[weakref.ref[np.ndarray]] = []

    def add(self, array: np.ndarray) -> None:
        self.seen += 1
        self._references = [one for one in self._references if one() is not None] + [weakref.ref(array)]
        self.most = max(self.most, len(self._references))


def test_nan_fails() -> None:
    result = run(
        model_config("efficientdet-d0"), "float32", (128, 128), scale("backbone.stem.bn.bias", math.nan)
    )
    assert result.first_divergence is not None
    assert result.first_divergence.pair.tap == "efficientnet-b0/stem"
    assert math.isinf(result.first_divergence.accumulated.relative)


def test_an_error_in_the_reference_reaches_the_caller() -> None:
    config = model_config("efficientdet-d0")
    values = synthetic_variables(config)
    del values["resample_p6/bn/gamma"]
    images = np.zeros((1, 128, 128, 3), np.float32)
    with pytest.raises(KeyError, match="resample_p6/bn/gamma"):
        compare(EfficientDet(config).eval(), tensorflow_reference(values, config, images, "float32"), images)


def test_difference_measures() -> None:
    reference = np.array([3, 4], np.float32)
    assert difference(np.array([3, 4], np.float32), reference).relative == 0
    assert difference(np.array([3, 4.5], np.float32), reference).relative == pytest.approx(0.1)
    assert difference(np.array([3, 4.5], np.float32), reference).maximum == 0.5
    assert math.isinf(difference(np.array([3, np.inf], np.float32), reference).relative)
    assert math.isinf(difference(np.array([3], np.float32), reference).relative)
    assert math.isinf(difference(np.array([1e-30], np.float32), np.array([0], np.float32)).relative)
