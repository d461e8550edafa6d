"""Fixtures for all tests, the option ``--refusals``, and the options that choose models for the proof."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

# Several processes with several threads each would only wait for each other.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when a worker starts: glibc gives large blocks back as soon as they are free. Otherwise a worker
# keeps gigabytes of one test's activations during all later tests.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
# Set before TensorFlow is imported: no log, and the same arithmetic as in the recordings.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

from parity_tests.helpers import refusals
from parity_tests.helpers.paths import SHARED
from pytorch_model.config import MODELS

REFUSALS = pytest.StashKey[Path]()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recordings made by Google's code; without it, the test is skipped."""
    if not SHARED.is_dir():
        pytest.skip("needs the recordings in ../shared, which a clone does not carry (goldens/ stand in)")
    return SHARED


@pytest.fixture(scope="session")
def tensorflow() -> object:
    """TensorFlow; if it is not installed, the test is skipped."""
    return pytest.importorskip("tensorflow", reason="needs TensorFlow: pip install -e '.[tensorflow]'")


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weight file of an untrained Lite0 for images of 64×64."""
    import torch

    from pytorch_model import create_model
    from pytorch_model.weights.files import write_weights

    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    torch.manual_seed(0)
    model = create_model("efficientdet-lite0", image_size=(64, 64))
    write_weights(path, model.state_dict(), model.config, {})
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--refusals",
        action="store_true",
        help="fail if there is an error in the code that no test triggers",
    )
    group = parser.getgroup("parity", "the proof on chosen models; with any of these, only it runs")
    group.addoption("--models", metavar="NAMES", help="d0,d7x,lite0,… or all (default: all 15)")
    group.addoption("--resolution", metavar="SIZE", help="native, N or HxW (default: 128, D7x 256)")
    group.addoption("--dtype", metavar="TYPE", help="float32 or float64 (default: both)")
    group.addoption("--image", metavar="FILE", help="a photograph (default: a seeded image)")
    group.addoption("--ckpt", metavar="PATH", help="your own checkpoint (default: seeded weights)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


def pytest_configure(config: pytest.Config) -> None:
    cases(config)  # a bad option ends the run before anything is collected
    # The workers of pytest-xdist inherit the environment that `start` sets.
    if config.getoption("refusals") and not hasattr(config, "workerinput"):
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
    terminalreporter.write_line(f"{total - len(lines)} of {total} refusals in the code were triggered")
    for line in lines:
        terminalreporter.write_line(f"never: {line}", red=True)


# --- the proof on chosen models, size, image and checkpoint ------------------------------------------

OPTIONS = ("models", "resolution", "dtype", "image", "ckpt")
DTYPES = ("float64", "float32")
SMALL_SIZE, SMALL_SIZE_P8 = 128, 256  # the smallest images whose coarsest level is one pixel


@dataclass(frozen=True)
class Case:
    """One run of the proof. ``model``: None for that of ``ckpt``. ``size``: (height, width); None: native."""

    model: str | None
    dtype: str
    size: tuple[int, int] | None
    image: Path | None
    ckpt: str | None

    def __str__(self) -> str:
        size = "x".join(map(str, self.size)) if self.size else "native"
        return f"{self.model or 'ckpt'}-{self.dtype}-{size}"


def cases(config: pytest.Config) -> list[Case]:
    """The runs that the options ask for. Raises ``pytest.UsageError``."""
    models, size, dtype, image, ckpt = (config.getoption(f"--{name}") for name in OPTIONS)
    if dtype not in (None, *DTYPES):
        raise pytest.UsageError(f"--dtype {dtype} is not a type; say float32 or float64")
    if image and not Path(image).is_file():
        raise pytest.UsageError(f"--image {image} is not a file; check the path")
    if ckpt and models:
        raise pytest.UsageError("--ckpt says which model it is; leave out --models")
    return [
        Case(model, kind, _size(size, model), Path(image) if image else None, ckpt)
        for model in ([None] if ckpt else _models(models))
        for kind in ([dtype] if dtype else DTYPES)
    ]


def _models(names: str | None) -> list[str]:
    if names in (None, "all"):
        return list(MODELS)
    known = {model.removeprefix("efficientdet-"): model for model in MODELS}
    chosen = [known.get(name.strip().removeprefix("efficientdet-"), "") for name in (names or "").split(",")]
    if not all(chosen):
        raise pytest.UsageError(f"--models {names} names no model; say some of {','.join(known)}, or all")
    return chosen


def _size(text: str | None, model: str | None) -> tuple[int, int] | None:
    if text == "native":
        return None
    if not text:
        side = SMALL_SIZE_P8 if model in (None, "efficientdet-d7x") else SMALL_SIZE
        return side, side
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) >= 1 for side in sides):
        raise pytest.UsageError(
            f"--resolution {text} is not a size; say native, 512 or 384x640 (height x width)"
        )
    return int(sides[0]), int(sides[-1])


def _chosen(config: pytest.Config) -> bool:
    return any(config.getoption(f"--{name}") for name in OPTIONS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames and metafunc.module.__name__.endswith("test_models"):
        metafunc.parametrize("case", [pytest.param(case, id=str(case)) for case in cases(metafunc.config)])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _chosen(config):
        wanted = [item for item in items if "/test_models.py::test_parity[" in f"/{item.nodeid}"]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A named pipe without a writer. Opening it for reading blocks; the test fails after five minutes."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def end(*_: object) -> None:
        raise AssertionError("the pipe was opened, which blocks")

    former = signal.signal(signal.SIGALRM, end)
    signal.alarm(300)  # a loaded machine needs many seconds without a fault
    yield path
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)
