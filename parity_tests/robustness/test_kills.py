"""Commands killed while they run, a few times; ``python -m parity_tests.robustness.kills`` does it often."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from parity_tests.helpers.paths import ROOT
from parity_tests.robustness import kills
from parity_tests.robustness.kill_commands import COMMANDS, Command, fork
from parity_tests.robustness.kills import AGAIN, BROKEN, BY_CALL, HIDDEN, LEFT, NEW, OLD
from parity_tests.robustness.moments import Calls, Moment, load


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run in a separate process, because forks of a process with threads may hang."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_leaves_the_old_target_or_the_new(name: str) -> None:
    if name == "release":
        pytest.importorskip("tensorflow", reason="a release is verified with TensorFlow")
    done = run("-m", "parity_tests.robustness.kills", "--kills", "12", "--commands", name)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


IN_PLACE = """
import contextlib, sys
from pathlib import Path
import pytorch_model.files

@contextlib.contextmanager
def replacing(path):
    yield Path(path)

pytorch_model.files.replacing = replacing
from parity_tests.robustness import kills
sys.exit(kills.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), [("convert", 12), ("eval again", 20)])
def test_writing_in_place_is_seen(name: str, kills: int) -> None:
    """The same commands, but they write their targets in place."""
    done = run("-c", IN_PLACE, "--kills", str(kills), "--commands", name, "--json")
    print(done.stdout)
    assert done.returncode == 1, done.stdout + done.stderr
    assert json.loads(done.stdout)[name][BY_CALL][BROKEN], done.stderr


# The runner itself sees each kind of fault.


def nothing(folder: Path) -> None:
    (folder / "target").write_text("old")


def slowly(folder: Path) -> None:
    """Writes half of the file, waits, and writes the other half."""
    (folder / "target").write_text("ne")
    subprocess.run(["sleep", "0.3"], check=True)
    (folder / "target").write_text("new")


def only_once(folder: Path) -> None:
    subprocess.run(["sleep", "0.2"], check=True)
    if (folder / "started").exists():
        raise SystemExit(1)
    (folder / "started").touch()
    subprocess.run(["sleep", "0.2"], check=True)
    os.replace(_written(folder), folder / "target")


def soundly(folder: Path) -> None:
    subprocess.run(["sleep", "0.2"], check=True)
    os.replace(_written(folder), folder / "target")


def untidily(folder: Path) -> None:
    """Uses a different visible temporary name each time."""
    temporary = folder / f"{os.getpid()}.tmp"
    temporary.write_text("new")
    os.replace(temporary, folder / "target")


def forgetfully(folder: Path) -> None:
    """Uses a different hidden temporary name each time."""
    temporary = folder / f".{os.getpid()}.tmp"
    temporary.write_text("new")
    os.replace(temporary, folder / "target")


def _written(folder: Path) -> Path:
    (folder / ".part").write_text("new")
    return folder / ".part"


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (slowly, {BROKEN}),
        (only_once, {AGAIN}),
        (soundly, set()),
        (untidily, {LEFT}),
        (forgetfully, {HIDDEN}),
    ],
)
def test_every_fault_is_seen(run: Callable[[Path], None], expected: set[str]) -> None:
    tally = kills.kill(Command("sample", nothing, run, "target"), 16, 0)
    print(tally.by)
    assert expected <= set(tally.counts) <= {*expected, OLD, NEW}
    assert bool(tally.faults) == bool(expected & {BROKEN, AGAIN, LEFT})


def in_many_ways(folder: Path) -> None:
    (folder / "folder").mkdir()
    with open(folder / "folder" / "text", "w") as file:
        file.write("four")
        file.truncate(2)
    (folder / "folder" / "text").rename(folder / "target")
    (folder / "folder").rmdir()


def test_each_phase_of_each_call_is_reached(tmp_path: Path) -> None:
    found = {}
    for number, moment in enumerate([None, *_moments_of(in_many_ways, tmp_path / "listed")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        nothing(folder)
        pid = fork(in_many_ways, folder, Calls(folder, moment))
        assert os.waitpid(pid, 0)[1] == (signal.SIGKILL if moment else 0)
        text = folder / "folder" / "text"
        old = (folder / "target").read_text()
        found[f"{moment.phase} {moment.what}" if moment else ""] = (
            (folder / "folder").exists(),
            text.read_text() if text.exists() else None,
            old,
        )
    assert found == {
        "": (False, None, "fo"),
        "before mkdir folder": (False, None, "old"),
        "after mkdir folder": (True, None, "old"),
        "before open text": (True, None, "old"),
        "after open text": (True, "", "old"),
        "before write text": (True, "", "old"),
        "in the middle of write text": (True, "fo", "old"),
        "after write text": (True, "four", "old"),
        "before truncate text": (True, "four", "old"),
        "after truncate text": (True, "fo", "old"),
        "before rename target": (True, "fo", "old"),
        "after rename target": (True, None, "fo"),
        "before rmdir folder": (True, None, "fo"),
        "after rmdir folder": (False, None, "fo"),
    }


def _moments_of(run: Callable[[Path], None], folder: Path) -> list[Moment]:
    folder.mkdir()
    assert os.waitpid(fork(run, folder, Calls(folder), folder / "seen"), 0)[1] == 0
    return load(folder / "seen")[1]
