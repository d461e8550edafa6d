"""Commands killed in the middle, a few times; ``python -m parity_tests.robustness.kills`` does it often."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.robustness import kills
from parity_tests.robustness.kills import AGAIN, BROKEN, COMMANDS, NEW, OLD, Command

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "release"])
def test_a_kill_leaves_the_old_target_or_the_new(name: str) -> None:
    """In a process of its own, for forks of one that runs threads may hang."""
    command = [sys.executable, "-m", "parity_tests.robustness.kills", "--kills", "4", "--commands", name]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


# The runner itself: what must not be is seen.


def nothing(folder: Path) -> None:
    (folder / "target").write_text("old")


def slowly(folder: Path) -> None:
    """Half of the file, a while, the other half."""
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


def _written(folder: Path) -> Path:
    (folder / ".part").write_text("new")
    return folder / ".part"


@pytest.mark.parametrize(
    ("run", "expected"), [(slowly, {BROKEN}), (only_once, {AGAIN, OLD, NEW}), (soundly, {OLD, NEW})]
)
def test_broken_targets_are_seen(run: object, expected: set[str]) -> None:
    tally = kills.kill(Command("sample", nothing, run, "target"), 12, 0)  # type: ignore[arg-type]
    print(tally.counts)
    assert set(tally.counts) <= {*expected, OLD, NEW}
    assert expected <= {*tally.counts, OLD, NEW}
    assert bool(tally.faults) == bool(expected & {BROKEN, AGAIN})
