"""Both our networks against Google's, at every activation Google's code recorded.

float64: the structure, to 1e-10. float32: what a user gets, no further from Google's float64 than three
times Google's own float32, plus 1e-6.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.helpers.recordings import (
    GOLDEN_MODELS,
    Recording,
    golden_recording,
    native_size,
    shared_recording,
    tap_of,
)
from porting.convert import apply_rules
from porting.parity import tapped
from porting.rules import TapPair, rules, taps
from pytorch_model.config import MODELS
from pytorch_model.efficientdet import EfficientDet

EXTRA_SIZES = [("efficientdet-d0", 512), ("efficientdet-lite0", 320), ("efficientdet-lite2", 448)]


FAST = {"efficientdet-d0", "efficientdet-lite0", "efficientdet-d2"}
CASES = [
    *(pytest.param(("golden", model), id=f"golden-{model}") for model in GOLDEN_MODELS),
    *(
        pytest.param((model, size), id=f"{model}-{size}", marks=[] if model in FAST else pytest.mark.slow)
        for model, size in [*((model, native_size(model)) for model in MODELS), *EXTRA_SIZES]
    ),
]


@lru_cache(maxsize=1)
def _load(source: str, which: Any) -> Recording:
    return golden_recording(which) if source == "golden" else shared_recording(source, which)


@pytest.fixture(params=CASES)
def recording(request: pytest.FixtureRequest) -> Recording:
    source, which = request.param
    if source != "golden":
        request.getfixturevalue("shared")
    return _load(source, which)


def pytorch_taps(recording: Recording, dtype: str) -> dict[str, np.ndarray]:
    config = recording.config
    model = EfficientDet(config).to(getattr(torch, dtype)).eval()
    model.load_state_dict(apply_rules(rules(config), recording.variables(), dtype))
    found: dict[str, np.ndarray] = {}

    def visit(pair: TapPair, x: torch.Tensor) -> torch.Tensor:
        found[pair.tap] = x.permute(0, 2, 3, 1).numpy()
        return x

    images = torch.from_numpy(recording.images.astype(dtype)).permute(0, 3, 1, 2)
    with torch.no_grad(), tapped(model, visit):
        model(images)
    return found


def tensorflow_taps(recording: Recording, dtype: str) -> dict[str, np.ndarray]:
    from tf_reference.efficientdet import as_tensors, efficientdet

    found: dict[str, np.ndarray] = {}

    def tap(name: str, x: Any) -> Any:
        found[name] = x.numpy()
        return x

    tensors = as_tensors(recording.variables(), dtype)
    efficientdet(tensors, recording.config, recording.images.astype(dtype), tap)
    return found


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("network", ["pytorch_model", "tf_reference"])
def test_every_recorded_activation(
    recording: Recording, network: str, dtype: str, request: pytest.FixtureRequest
) -> None:
    if network == "tf_reference":
        request.getfixturevalue("tensorflow")
    found = (pytorch_taps if network == "pytorch_model" else tensorflow_taps)(recording, dtype)
    assert found.keys() == {pair.tap for pair in taps(recording.config)}
    worst, where = 0.0, ""
    for endpoint, (expected, stride) in recording.endpoints.items():
        ours = found[tap_of(endpoint, recording.config)]
        sample = ours.reshape(-1)[::stride].astype(np.float64)
        relative = float(np.linalg.norm(sample - expected) / np.linalg.norm(expected))
        norm = float(np.linalg.norm(ours.astype(np.float64).reshape(-1)))
        bound = 1e-10 if dtype == "float64" else 3 * recording.google_error[endpoint] + 1e-6
        assert relative <= bound, f"{endpoint}: relative L2 {relative:.2e}, allowed {bound:.2e}"
        assert abs(norm / recording.norms[endpoint] - 1) <= bound, f"{endpoint}: L2 of the whole activation"
        worst, where = max((worst, where), (relative, endpoint))
    print(f"{recording.name} {network} {dtype}: worst relative L2 {worst:.2e} at {where}")
