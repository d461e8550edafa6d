"""The proof of an engine: a right one passes, and a wrong weight, level or detection is found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from parity_tests.engines.models import FAST, installed, network
from parity_tests.helpers.small_models import small
from porting.checkpoint import open_checkpoint
from porting.cli.drawing.engines import print_engines
from porting.convert import convert
from porting.infer import configure
from porting.parity import ParityResult
from porting.parity.engines import proof
from porting.parity.engines.agreement import SCORE_TOLERANCE, Agreement, agreement
from porting.parity.engines.proof import EngineComparison, EngineResult, OutputResult, ReferenceHeads
from porting.parity.inputs import seeded_images
from porting.parity.measure import Difference
from porting.parity.report.content import Report, report_dict
from porting.rules import taps
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import EAGER
from pytorch_model.engines.choose import Network, make_engine

SIZE = (128, 96)
FUSED = [name for name in FAST if name != EAGER]

Fault = Any  # (model, size) → Network


def compared(name: str = "folded", net: EfficientDet | None = None, **reference: Any) -> EngineResult:
    net = net or network(small())
    comparison = EngineComparison(net, seeded_images(net.config, SIZE, 2))
    comparison.run(name)
    (result,) = comparison.results(reference.pop("heads", {}), **reference)
    return result


def printed(result: EngineResult) -> str:
    console = Console(width=200, highlight=False)
    with console.capture() as capture:
        print_engines(console, (result,))
    return capture.get()


def heads(net: EfficientDet, change: float = 0.0) -> dict[str, Tensor]:
    """What a reference shows to :class:`ReferenceHeads`: the outputs of ``net``, the first ones changed."""
    x = torch.from_numpy(seeded_images(net.config, SIZE, 2).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        outputs = dict(zip(("class_net", "box_net"), net(x), strict=True))
    kept = ReferenceHeads()
    for pair in taps(net.config):
        if pair.output is None:
            kept(pair, np.zeros(1), np.zeros(1))
            continue
        expected = outputs[pair.module][pair.output].permute(0, 2, 3, 1).numpy()
        kept(pair, expected, expected * (1 + change) if pair.output == 0 else expected)
    return kept.outputs


@pytest.mark.parametrize("name", FAST)
def test_a_right_engine_passes(name: str) -> None:
    net = network(small())
    result = compared(installed(name), net, heads=heads(net))
    assert result.passed
    assert len(result.outputs) == 2 * len(net.config.levels)
    assert result.detections is not None
    assert result.detections.equal == 200
    assert result.reference_detections is not None
    assert result.reference_detections.equal == 200
    assert "passed" in printed(result)
    assert "are the reference's; measured, not judged" in printed(result)


def _perturbed(model: EfficientDet, size: tuple[int, int]) -> Network:
    """One number of one batch norm, of the second level, is larger by 1 %."""
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["class_net.bns.0.1.weight"][3] *= 1.01
    return make_engine("folded", EfficientDet.from_state_dict(state, model.config), size)


def _changed(change: Any) -> Fault:
    def make(model: EfficientDet, size: tuple[int, int]) -> Network:
        network = make_engine("folded", model, size)

        def run(images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            classes, boxes = network(images)
            return change(list(classes), list(boxes))

        return run

    return make


FAULTS: dict[str, tuple[Fault, str]] = {
    "one weight": (_perturbed, "1 of 10 outputs differ, most class_outputs/4: "),
    "two levels": (
        _changed(lambda classes, boxes: ([classes[1], classes[0], *classes[2:]], boxes)),
        "2 of 10 outputs differ, most class_outputs/3: inf",
    ),
    "the images of a batch": (
        _changed(lambda classes, boxes: ([x.flip(0) for x in classes], [x.flip(0) for x in boxes])),
        "10 of 10 outputs differ",
    ),
    "not a number": (
        _changed(lambda classes, boxes: (classes, [x * np.nan for x in boxes])),
        "no detections: an output is not finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_engine_is_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, said = FAULTS[fault]

    def wrong(name: str, model: EfficientDet, size: tuple[int, int]) -> Network:
        return make_engine(name, model, size) if name == EAGER else make(model, size)

    monkeypatch.setattr(proof, "make_engine", wrong)
    result = compared()
    assert not result.passed
    assert "FAILED folded" in printed(result)
    assert said in printed(result)
    report = Report(small(), (ParityResult((), "float32", judged=False),), engines=(result,))
    assert report_dict(report)["passed"] is False


def test_an_engine_that_differs_from_the_reference_fails() -> None:
    net = network(small())
    result = compared(net=net, heads=heads(net, change=2e-3))
    assert [output.tap for output in result.outputs if not output.passed] == [
        "class_outputs/3",
        "box_outputs/3",
    ]
    assert not result.passed
    coarse = compared(net=net, heads=heads(net, change=2e-3), judged=False)
    assert coarse.passed
    assert "(not judged)" in printed(coarse)


def test_a_reference_without_outputs() -> None:
    result = compared()
    assert result.passed
    assert result.reference_detections is None
    assert "the reference shows none of them" in printed(result)


def test_weights_that_are_not_finite_fail() -> None:
    net = network(small())
    with torch.no_grad():
        net.state_dict()["box_net.predict.pointwise.bias"].fill_(float("nan"))
    result = compared(net=net)
    assert not result.passed
    assert "box_net.predict.pointwise is not finite" in printed(result)
    document = report_dict(Report(small(), (ParityResult((), "float32"),), engines=(result,)))
    assert document["engines"][0]["failure"] == result.failure
    assert document["engines"][0]["outputs"] == []


def test_an_output_as_exact_as_the_eager_one_is_rounding() -> None:
    def output(eager: float, exact: float, eager_exact: float) -> OutputResult:
        first, second, third = (Difference(value, 1.0) for value in (eager, exact, eager_exact))
        return OutputResult("class_outputs/3", first, exact=second, eager_exact=third)

    right = output(4e-5, 3e-5, 2e-5)
    assert right.passed
    assert right.is_rounding
    assert not output(7e-5, 7e-5, 2e-5).passed
    assert not output(4e-5, float("inf"), 2e-5).passed
    found = Agreement(100, 100, 100, 0, 0.0, 0.0, 4e-5)
    assert "rounding, because it is as exact: class_outputs/3" in printed(
        EngineResult("folded", (right,), found)
    )


def test_float64_is_asked_only_if_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(output.exact is None for output in compared().outputs)
    monkeypatch.setattr(proof, "ENGINE_TOLERANCE", 1e-9)
    result = compared()
    assert result.passed
    assert result.worst.is_rounding
    assert result.detections is not None
    assert result.detections.allowed > SCORE_TOLERANCE


# --- detections ------------------------------------------------------------------------------------------


def detections(count: int = 5) -> dict[str, Tensor]:
    corners = torch.arange(count)[:, None] * torch.tensor([10.0, 8, 10, 8])
    boxes = corners + torch.tensor([0.0, 0, 20, 30])
    return {"boxes": boxes, "scores": 0.9 - 0.1 * torch.arange(count), "labels": torch.arange(count) + 1}


def differing(ours: dict[str, Tensor], expected: dict[str, Tensor], most: int = 100) -> tuple[int, int]:
    found = agreement([ours], [expected], (640, 512), NMSConfig(max_output_size=most), SCORE_TOLERANCE)
    assert found.passed == (found.different == 0)
    return found.different, found.at_the_end


@pytest.mark.parametrize(
    ("key", "change", "different"),
    [
        ("scores", 5e-6, 0),
        ("scores", 3e-5, 2),
        ("boxes", 0.05, 0),
        ("boxes", 0.08, 2),
        ("labels", 1, 2),
    ],
)
def test_detections_are_equal_within_the_tolerances(key: str, change: float, different: int) -> None:
    ours = detections()
    ours[key][1] += change
    assert differing(ours, detections()) == (different, 0)


def test_order_plays_no_part_and_each_counts_once() -> None:
    ours = {key: values.flip(0) for key, values in detections().items()}
    assert differing(ours, detections()) == (0, 0)
    twice = {key: torch.cat([values, values[:1]]) for key, values in detections().items()}
    assert differing(twice, detections()) == (1, 0)
    none = {key: values[:0] for key, values in detections().items()}
    assert differing(none, detections()) == (5, 0)
    assert differing(none, none) == (0, 0)


def test_rounding_decides_what_a_full_list_ends_with() -> None:
    ours, expected = detections(), detections()
    ours["labels"][-1], expected["scores"][-1] = 77, ours["scores"][-1] + 5e-6
    assert differing(ours, expected, most=5) == (0, 2)
    assert differing(ours, expected, most=6) == (2, 0)  # not full: it would have room
    expected["scores"][-1] += 1e-4
    assert differing(ours, expected, most=5)[0] == 1


# --- real weights ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0(shared: Path) -> EfficientDet:
    with open_checkpoint(shared / "lite0" / "efficientdet-lite0") as checkpoint:
        config = configure(checkpoint).config
        return EfficientDet.from_state_dict(convert(checkpoint, config).state_dict, config)


@pytest.mark.parametrize("name", FUSED)
def test_real_detections_are_the_eager_ones(name: str, lite0: EfficientDet, shared: Path) -> None:
    files = sorted((shared / "images").glob("*.jpg"))
    assert len(files) == 2
    ours, expected = (Detector(lite0, engine=engine)(files) for engine in (installed(name), EAGER))
    found = agreement(ours, expected, lite0.config.image_size, NMSConfig(), SCORE_TOLERANCE)
    print(f"{name}: {found}")
    assert found.expected > 10
    assert found.passed
