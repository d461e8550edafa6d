"""The proof, model by model: ``pytest parity_tests --models d0,d7x --resolution native --dtype float64``.

float64: the structure, every tap within 1e-10. float32: the user's weights, within the tolerances of
:mod:`porting.parity.measure`. ``--image`` and ``--ckpt`` take your own image and weights.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from parity_tests.conftest import Case
from parity_tests.helpers.recordings import normalise
from porting.convert import apply_rules, convert
from porting.errors import EfficientDetError
from porting.infer import infer_config
from porting.parity import ParityResult, compare, tensorflow_reference
from porting.rules import rules, taps
from porting.sources.open import open_source
from porting.synthetic import synthetic_image, synthetic_variables
from pytorch_model.config import EfficientDetConfig, model_config
from pytorch_model.detection.preprocess import preprocess
from pytorch_model.efficientdet import EfficientDet

Variables = dict[str, np.ndarray]


@lru_cache(maxsize=1)  # both float types in turn, then the next model
def network(model: str | None, ckpt: str | None) -> tuple[EfficientDetConfig, Variables]:
    if ckpt is None:
        assert model is not None
        config = model_config(model)
        return config, synthetic_variables(config)
    with tempfile.TemporaryDirectory() as folder, open_source(ckpt, Path(folder)) as checkpoint:
        config = infer_config(checkpoint.shapes, checkpoint.source).config
        return config, convert(checkpoint, config).variables


def network_input(case: Case, config: EfficientDetConfig) -> np.ndarray:
    size = case.size or config.image_size
    if case.image is None:
        return normalise(synthetic_image(*size)[None], config)
    return preprocess([case.image], config, size).images.permute(0, 2, 3, 1).contiguous().numpy()


def proof(case: Case) -> ParityResult:
    config, variables = network(case.model, case.ckpt)
    images = network_input(case, config).astype(case.dtype)
    with torch.device("meta"):
        model = EfficientDet(config)
    model.load_state_dict(apply_rules(rules(config), variables, case.dtype), assign=True)
    result = compare(model.eval(), tensorflow_reference(variables, config, images, case.dtype), images)
    assert {tap.pair for tap in result.taps} == set(taps(config))
    return result


@pytest.mark.usefixtures("tensorflow")
def test_parity(case: Case) -> None:
    try:
        result = proof(case)
    except EfficientDetError as error:
        pytest.fail(str(error), pytrace=False)
    accumulated, isolated = result.worst("accumulated"), result.worst("isolated")
    print(
        f"{case}: {len(result.taps)} activations, accumulated ≤ {accumulated.accumulated.relative:.1e} "
        f"({accumulated.pair.tap}), isolated ≤ {isolated.isolated.relative:.1e} ({isolated.pair.tap})"
    )
    if not result.passed:
        pytest.fail(f"{case}: {result.divergence}", pytrace=False)


# --- the options ----------------------------------------------------------------------------------------


def pytest_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "-p",
        "no:cacheprovider",
        "parity_tests",
        *arguments,
    ]
    return subprocess.run(command, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--models", "d0,d9", "--models d0,d9 names no model; say some of d0,d1,"),
        ("--resolution", "big", "--resolution big is not a size; say native, 512 or 384x640"),
        ("--resolution", "0", "--resolution 0 is not a size"),
        ("--dtype", "int8", "--dtype int8 is not a type; say float32 or float64"),
        ("--image", "nowhere.jpg", "--image nowhere.jpg is not a file; check the path"),
    ],
)
def test_a_bad_option_is_one_sentence(option: str, value: str, message: str) -> None:
    done = pytest_run(option, value, "--collect-only")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stdout.strip() == ""
    assert done.stderr.strip().startswith(f"ERROR: {message}")
    assert len(done.stderr.strip().splitlines()) == 1


def test_options_choose_what_runs() -> None:
    options = ("--models", "d0,lite3x", "--resolution", "96x160", "--dtype", "float32")
    done = pytest_run(*options, "--collect-only")
    assert done.returncode == 0, done.stderr
    listed = [line for line in done.stdout.splitlines() if "::" in line]
    assert listed == [
        f"parity_tests/test_models.py::test_parity[{model}-float32-96x160]"
        for model in ("efficientdet-d0", "efficientdet-lite3x")
    ]


@pytest.mark.usefixtures("tensorflow")
def test_a_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in a weight: the message is the first divergence, on both sides."""
    right = apply_rules

    def wrong(*arguments: object) -> dict[str, torch.Tensor]:
        state = right(*arguments)  # type: ignore[arg-type]
        state["backbone.blocks.3.se.reduce.bias"] *= 1.01
        return state

    monkeypatch.setattr(sys.modules[__name__], "apply_rules", wrong)
    with pytest.raises(pytest.fail.Exception) as caught:
        test_parity(Case("efficientdet-d0", "float64", (128, 128), None, None))
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert not caught.value.pytrace
    assert (
        "efficientdet-d0-float64-128x128: first divergence: backbone.blocks.3.se in PyTorch, "
        "efficientnet-b0/blocks_3/se in TensorFlow: isolated " in message
    )
