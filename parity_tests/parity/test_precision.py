"""Other ways of running the same weights: what is measured is what was run."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from parity_tests.helpers.recordings import golden_recording, normalise
from parity_tests.helpers.small_models import SHALLOW, tiny
from porting.convert import apply_rules
from porting.parity import ParityResult, compare, difference
from porting.parity.lockstep import Reference, tf32
from porting.parity.measure import FLOAT32_ACCUMULATED_TOLERANCE, FLOAT64_TOLERANCE
from porting.parity.precision import (
    COMPILED,
    QUICK_PRECISIONS,
    PrecisionCost,
    fuse_batch_norms,
    measure_precisions,
)
from porting.parity.report.content import Report, report_dict
from porting.rules import rules
from porting.synthetic import synthetic_image, synthetic_variables
from pytorch_model.config import BackboneConfig, EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet

State = dict[str, torch.Tensor]


ALONE = "PORTING_COMPILED_ALONE"  # environment variable


def small(**changes: object) -> EfficientDetConfig:
    return tiny(backbone=BackboneConfig("efficientnet-b0", 8, SHALLOW), **changes)


def weights(config: EfficientDetConfig, dtype: str = "float32") -> tuple[State, np.ndarray]:
    images = normalise(synthetic_image(128, 96)[None], config)
    return apply_rules(rules(config), synthetic_variables(config), dtype), images


def test_d0_in_every_way_but_the_compiler() -> None:
    recording = golden_recording("efficientdet-d0")
    state = apply_rules(rules(recording.config), recording.variables())
    costs = {cost.name: cost for cost in measure_precisions(recording.config, state, recording.images[:1])}
    assert tuple(costs) == QUICK_PRECISIONS
    for name in QUICK_PRECISIONS:
        cost = costs[name]
        if name.startswith("GPU") and not torch.cuda.is_available():
            assert cost == PrecisionCost(name, skipped="no GPU here")
            continue
        assert cost.classes is not None
        assert cost.boxes is not None
        print(f"{name}: {cost.classes.relative:.1e} {cost.boxes.relative:.1e} score {cost.score:.1e}")
        if "16" not in name and "TF32 on" not in name:
            assert max(cost.classes.relative, cost.boxes.relative) <= FLOAT32_ACCUMULATED_TOLERANCE
    # A float of fewer bits: 2⁻²⁴, 2⁻¹¹ and 2⁻⁸ are the roundings, and the costs go in their order.
    by_bits = [costs[name].classes for name in ("float32", "float16", "bfloat16")]
    assert all(a and b and 2 * a.relative < b.relative for a, b in pairwise(by_bits))


@pytest.mark.parametrize(
    "changes",
    [{}, {"conv_bn_act_pattern": True}, {"fpn_num_filters": 20, "conv_after_downsample": True}],
    ids=str,
)
def test_fused_batch_norms_are_the_same_function(changes: dict[str, object]) -> None:
    config = small(**changes)
    state, images = weights(config, "float64")
    model = EfficientDet(config).double().eval()
    model.load_state_dict(state)
    x = torch.from_numpy(images.astype(np.float64)).permute(0, 3, 1, 2)
    with torch.no_grad():
        before = [level.numpy() for head in model(x) for level in head]
        norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
        fused = fuse_batch_norms(model)
        left = [name for name, module in model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
        after = [level.numpy() for head in model(x) for level in head]
    assert fused == norms - len(left)
    assert all(name.startswith(("class_net.bns", "box_net.bns")) for name in left)
    worst = max(difference(a, b).relative for a, b in zip(after, before, strict=True))
    print(f"{fused} of {norms} fused, worst {worst:.1e}")
    assert worst <= FLOAT64_TOLERANCE


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: object) -> None:
        raise RuntimeError("no compiler found\nand a long trace")

    monkeypatch.setattr(torch, "compile", fail)
    config = small()
    costs = list(measure_precisions(config, *weights(config), names=["float32", COMPILED]))
    assert costs[1] == PrecisionCost(COMPILED, skipped="not possible here: no compiler found")
    assert costs[0].skipped is None


def test_the_compiled_network() -> None:
    """In a process of its own: after what other tests trace, sizes are symbols and tracing takes hours."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", f"{__file__}::test_compiled_alone"]
    done = subprocess.run(
        command, env={**os.environ, ALONE: "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "1 passed" in done.stdout


@pytest.mark.skipif(ALONE not in os.environ, reason="run by the test above")
def test_compiled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for the compiler, but run operation by operation: compiling itself takes minutes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", dynamic=False))
    config = small()
    (cost,) = measure_precisions(config, *weights(config), names=[COMPILED])
    assert cost.skipped is None
    assert cost.boxes is not None
    print(f"{cost.boxes.relative:.1e}")
    assert cost.boxes.relative <= FLOAT32_ACCUMULATED_TOLERANCE


def test_the_weights_are_left_as_they_were() -> None:
    config = small()
    state, images = weights(config)
    before = {key: tensor.clone() for key, tensor in state.items()}
    list(measure_precisions(config, state, images))
    assert all(torch.equal(state[key], tensor) for key, tensor in before.items())


def test_overflow_is_infinite_and_the_report_holds_it() -> None:
    config = small()
    state, images = weights(config)
    state["box_net.predict.pointwise.bias"] += 1e5  # float16 ends at 65504
    costs = tuple(measure_precisions(config, state, images, names=["float16"]))
    assert costs[0].boxes is not None
    assert math.isinf(costs[0].boxes.relative)
    result = ParityResult((), "float32", ("a", "b"))
    document = report_dict(Report(config, (result,), precisions=costs))
    assert document["variants"][0]["boxes"] == {"relative": "Infinity", "maximum": "Infinity"}
    assert document["runs"][0]["absent"] == ["a", "b"]
    assert document["passed"] is False
    assert report_dict(Report(config, (replace(result, judged=False),)))["passed"] is None


def test_the_proof_runs_without_tf32() -> None:
    """On a GPU, PyTorch rounds a convolution's factors to 10 bits unless that is switched off."""
    config = small()
    state, images = weights(config)
    model = EfficientDet(config).eval()
    model.load_state_dict(state)
    seen = []

    def reference(emit: object) -> None:
        raise ValueError("enough")

    def flags() -> tuple[bool, bool]:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    model.backbone.register_forward_pre_hook(lambda *_: seen.append(flags()))
    before = flags()
    with tf32(True):
        stopped: Reference = reference
        with pytest.raises(ValueError, match="enough"):
            compare(model, stopped, images)
        assert flags() == (True, True)
    assert flags() == before
    assert seen == [(False, False)]
