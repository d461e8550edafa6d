"""Where outside truth comes from, and what to do without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before TensorFlow is first imported: quiet, and the arithmetic of the recordings.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

GOLDENS = Path(__file__).resolve().parent / "goldens"
SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recordings made by Google's code; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs the recordings in ../shared, which a clone does not carry (goldens/ stand in)")
    return SHARED


@pytest.fixture(scope="session")
def tensorflow() -> object:
    """TensorFlow, or a skip where it is not installed."""
    return pytest.importorskip("tensorflow", reason="needs TensorFlow: pip install -e '.[tensorflow]'")
