"""Commands whose disk, folder or neighbour fails them: the old target stays, or the new one is complete."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from parity_tests.robustness import kills, targets
from porting.errors import OutputError
from porting.files import replacing
from pytorch_model import load_model

TOOLS = Path(__file__).resolve().parents[2] / "tools"
LARGEST_FILE = 30_000  # bytes; less than any of the targets

CONVERT = ("convert.py", "--ckpt", "ckpt", "--out", "out.safetensors")
FULL: dict[str, tuple[Sequence[str], str]] = {
    "convert": (CONVERT, "out.safetensors"),
    "convert to .pth": (("convert.py", "--ckpt", "ckpt", "--out", "out.pth"), "out.pth"),
    "export": (
        ("export.py", "--weights", "model.safetensors", "--to", "tf-checkpoint", "--out", "back"),
        "back",
    ),
    "export h5": (
        ("export.py", "--weights", "model.safetensors", "--to", "h5", "--out", "back.h5"),
        "back.h5",
    ),
    "export effdet": (
        ("export.py", "--weights", "d0.safetensors", "--to", "effdet", "--out", "effdet.pth"),
        "effdet.pth",
    ),
    "detect": (
        ("detect.py", "--weights", "model.safetensors", "--images", "picture.png", "--out", "found"),
        "found/picture.png",
    ),
}


def disk_full() -> None:
    """As on a full disk, writing fails in the middle of a file: here beyond :data:`LARGEST_FILE`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    from pytorch_model import create_model
    from pytorch_model.weights import write_weights

    folder = tmp_path_factory.mktemp("inputs")
    kills.prepare_convert(folder)
    targets.weights(".safetensors")(folder)
    model = create_model("efficientdet-d0", image_size=(64, 64))
    write_weights(folder / "d0.safetensors", model.state_dict(), model.config, {})
    Image.effect_noise((200, 200), 80).convert("RGB").save(folder / "picture.png")
    return folder


@pytest.fixture
def work(inputs: Path, tmp_path: Path) -> Path:
    shutil.copytree(inputs, tmp_path / "work")
    return tmp_path / "work"


def run(work: Path, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOLS / command[0], *command[1:]],
        cwd=work,
        capture_output=True,
        text=True,
        preexec_fn=disk_full,
    )


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk(work: Path, name: str) -> None:
    command, target = FULL[name]
    before = {path.relative_to(work) for path in work.rglob("*")}
    old = kills.digest(work / target)
    done = run(work, command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    name = target.split("/")[0]
    assert re.search(rf"error: (cannot write {name}|{name}/model cannot be written)", done.stderr)
    assert kills.digest(work / target) == old
    after = {path.relative_to(work) for path in work.rglob("*")}
    assert after - before <= {Path(target).parent}, "something is left over"


def test_the_folder_vanishes(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    message = r"cannot write .*weights\.pth: .*; free some space or choose another place"

    def write() -> None:
        with replacing(tmp_path / "out" / "weights.pth") as temporary:
            temporary.write_bytes(b"new")
            shutil.rmtree(tmp_path / "out")

    with pytest.raises(OutputError, match=message):
        write()
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(work: Path) -> None:
    (work / "locked").mkdir(mode=0o500)
    done = run(work, ("convert.py", "--ckpt", "ckpt", "--out", "locked/x.safetensors"))
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert not list((work / "locked").iterdir())


def test_two_at_once(work: Path) -> None:
    """Both write the same file; it is complete whoever was last."""
    command = [sys.executable, str(TOOLS / CONVERT[0]), *CONVERT[1:]]
    both = [subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert load_model(work / "out.safetensors").config.num_classes == targets.CONFIG.num_classes
    assert not [path for path in work.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("moment", [0.3, 0.8, 1.0])
def test_interrupts(work: Path, moment: float) -> None:
    """Ctrl-C, at parts of the time the command takes: exit status 130 or done, nothing left over."""
    command = [sys.executable, str(TOOLS / CONVERT[0]), *CONVERT[1:]]
    before = {path.name for path in work.iterdir()}
    old = kills.digest(work / "out.safetensors")
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        used = _cpu_seconds(process.pid)
        if used > moment * 2.0:
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate()
    assert process.returncode in (0, 130), errors
    assert "Traceback" not in errors
    assert (kills.digest(work / "out.safetensors") == old) == (process.returncode == 130)
    assert {path.name for path in work.iterdir()} == before


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
