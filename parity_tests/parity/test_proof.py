"""The proof as a library call: what it returns, what its listener hears, and that it prints nothing."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import porting.parity
from parity_tests.helpers.tflite_files import TINY
from porting.convert import Conversion, Coverage, port_arrays, variables_digest
from porting.errors import EfficientDetError, WeightsError
from porting.parity.inputs import seeded_images, verification_size
from porting.parity.lockstep import TapResult
from porting.parity.proof import about_assumed
from porting.parity.report.content import report_dict
from porting.parity.report.from_proof import build_report
from porting.parity.report.html import render
from porting.rules import rules, taps
from porting.synthetic import synthetic_variables

FAULTY = "bifpn.cells.0.nodes.2.conv.pointwise.weight"


class Recorder:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.stages: list[object] = []
        self.compared_taps: list[str] = []

    def started(self, reference: str, image_size: tuple[int, int]) -> None:
        self.stages.append((reference, image_size))

    def run_started(self, dtype: str, activations: int) -> None:
        self.stages.append((dtype, activations))

    def compared(self, result: TapResult) -> None:
        self.compared_taps.append(result.pair.tap)

    def diagnosing(self) -> None:
        self.stages.append("diagnosing")


@pytest.fixture(scope="module")
def conversion() -> Conversion:
    variables = synthetic_variables(TINY)
    arrays = port_arrays(rules(TINY), variables)
    coverage = Coverage(len(variables), {}, len(arrays), 0)
    return Conversion(TINY, arrays, variables, "raw", coverage, variables_digest(variables))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return seeded_images(TINY, (64, 64))


@pytest.mark.usefixtures("tensorflow")
def test_a_right_port_passes_and_nothing_is_printed(
    conversion: Conversion, images: np.ndarray, capfd: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder()
    proof = porting.parity.prove(conversion, images, listener=recorder)
    names = [pair.tap for pair in taps(TINY)]
    assert proof.passed
    assert proof.diagnosis is None
    assert [result.dtype for result in proof.results] == ["float64", "float32"]
    assert recorder.stages == [
        ("the TensorFlow reference", (64, 64)),
        ("float64", len(names)),
        ("float32", len(names)),
    ]
    assert sorted(recorder.compared_taps) == sorted(2 * names)
    assert json.loads(json.dumps(proof.figures()))["float32"]["passed"]
    assert capfd.readouterr() == ("", "")
    assert proof.about_assumed is None  # all settings of the network are known
    report = build_report(proof, conversion, origin={"source": "x"}, environment={"torch": "y"})
    assert list(report.metadata) == ["source", "values", "variables_sha256", "picture", "torch"]
    assert report.metadata["picture"] == "64×64, seeded"
    assert report.passed


@pytest.mark.usefixtures("tensorflow")
def test_a_fault_is_diagnosed(conversion: Conversion, images: np.ndarray) -> None:
    recorder = Recorder()
    state = dict(conversion.state_dict)
    state[FAULTY] = state[FAULTY].transpose(0, 1).contiguous()
    proof = porting.parity.prove(conversion, images, None, recorder, state_dict=state)
    assert proof.passed is False
    assert proof.diagnosis is not None
    assert proof.diagnosis.kind == "kernel layout transposed"
    assert recorder.stages[-1] == "diagnosing"
    report = build_report(proof, conversion, origin={}, environment={})
    assert report.diagnosis == (
        f"{proof.diagnosis.module} ({proof.diagnosis.tap}): {proof.diagnosis.kind}: {proof.diagnosis.detail}"
    )


@pytest.mark.usefixtures("tensorflow")
def test_weights_of_another_model_are_rejected(conversion: Conversion, images: np.ndarray) -> None:
    state = {key: tensor for key, tensor in conversion.state_dict.items() if key != FAULTY}
    with pytest.raises(WeightsError, match=FAULTY):
        porting.parity.prove(conversion, images, state_dict=state)


def test_the_size_of_a_verification() -> None:
    large = dataclasses.replace(TINY, image_size=(768, 256))
    assert verification_size(large) == (512, 256)
    assert verification_size(large, "native") == (768, 256)
    assert verification_size(large, "96") == (96, 96)
    assert verification_size(large, "96x64") == (96, 64)
    for text in ("0", "-5", "big", "1x2x3", "96X64"):
        with pytest.raises(EfficientDetError, match=f"--size {text} is not a size"):
            verification_size(large, text)


ASSUMED = ("activation swish", "no residual in the heads")


@pytest.mark.parametrize(
    ("passed", "original", "sentence"),
    [
        (
            True,
            None,
            "proven for these assumed settings: activation swish, no residual in the heads; only the "
            "original graph or config can confirm them",
        ),
        (False, None, None),
        (None, None, None),
        (True, "model.meta", "confirmed by model.meta: activation swish, no residual in the heads"),
        (
            False,
            "model.meta",
            "these settings are assumed, and may be the cause: activation swish, no residual in the heads; "
            "--hparams sets them",
        ),
        (
            None,
            "model.tflite",
            "still assumed, because this reference is too coarse to confirm them: activation swish, no "
            "residual in the heads",
        ),
    ],
)
def test_what_a_verdict_says_of_assumed_settings(
    passed: bool | None, original: str | None, sentence: str | None
) -> None:
    assert about_assumed(ASSUMED, passed, original) == sentence
    assert about_assumed((), passed, original) is None


@pytest.mark.usefixtures("tensorflow")
def test_assumed_settings_stand_with_the_verdict(conversion: Conversion, images: np.ndarray) -> None:
    """In the figures for --json and in both forms of the report."""
    proof = porting.parity.prove(conversion, images, assumed=ASSUMED)
    assert proof.figures()["assumed"] == list(ASSUMED)
    assert proof.figures()["about_assumed"].startswith("proven for these assumed settings: activation swish")
    report = build_report(proof, conversion, origin={}, environment={})
    assert report_dict(report)["about_assumed"] == proof.about_assumed
    assert "proven for these assumed settings: activation swish" in render(report)
