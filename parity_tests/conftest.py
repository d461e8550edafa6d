"""Where outside truth comes from, and what to do without it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from parity_tests import refusals

# Before TensorFlow is first imported: quiet, and the arithmetic of the recordings.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

GOLDENS = Path(__file__).resolve().parent / "goldens"
SHARED = Path(__file__).resolve().parents[2] / "shared"

REFUSALS = pytest.StashKey[Path]()


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


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weight file of an untrained Lite0 for pictures of 64 x 64."""
    import torch

    from pytorch_model import create_model
    from pytorch_model.weights import write_weights

    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    torch.manual_seed(0)
    model = create_model("efficientdet-lite0", image_size=(64, 64))
    write_weights(path, model.state_dict(), model.config, {})
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--refusals",
        action="store_true",
        help="fail if no test brings about a refusal",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("refusals"):
        folder = Path(tempfile.mkdtemp(prefix="refusals-"))
        config.add_cleanup(lambda: shutil.rmtree(folder))
        config.stash[REFUSALS] = folder
        refusals.start(folder)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    folder = session.config.stash.get(REFUSALS, None)
    if folder is not None and exitstatus == 0 and refusals.missing(folder):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    folder = terminalreporter.config.stash.get(REFUSALS, None)
    if folder is None:
        return
    lines, total = refusals.missing(folder), len(list(refusals.refusals()))
    terminalreporter.section("refusals")
    terminalreporter.write_line(f"{total - len(lines)} of {total} refusals in the code were brought about")
    for line in lines:
        terminalreporter.write_line(f"never: {line}", red=True)
