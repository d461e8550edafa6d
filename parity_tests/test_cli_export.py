"""tools/export.py as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from porting.checkpoint import open_checkpoint
from pytorch_model import create_model
from pytorch_model.weights import write_weights

ROOT = Path(__file__).resolve().parents[1]


def export(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "export.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "mine.safetensors"
    model = create_model("efficientdet_lite0", num_classes=7)
    write_weights(path, model.state_dict(), model.config, {"step": "123"})
    return path


def test_writes_a_checkpoint_and_says_what_was_checked(tmp_path: Path, weights: Path) -> None:
    done = export("--weights", weights, "--to", "tf-checkpoint", "--out", "back", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["files"] == [
        f"back/{name}" for name in ("checkpoint", "model.data-00000-of-00001", "model.index")
    ]
    assert "588 variables, as many moving averages of the same values, global_step 123" in summary["facts"]
    with open_checkpoint(tmp_path / "back") as checkpoint:
        assert checkpoint.step == 123
        assert len(checkpoint) == 2 * 588 + 1


def test_refusals_are_one_sentence_and_leave_nothing(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.index").touch()
    for arguments in (
        ("--weights", weights, "--to", "tf-checkpoint", "--out", "full"),
        ("--weights", weights, "--to", "tf-checkpoint", "--out", "nowhere/x"),
        ("--weights", weights, "--to", "h5", "--out", "x.txt"),
        ("--weights", weights, "--to", "h5", "--out", "nowhere/x.h5"),
        ("--weights", "absent.pth", "--to", "h5", "--out", "x.h5"),
        ("--weights", weights, "--to", "caffe", "--out", "x"),
    ):
        done = export(*arguments, cwd=tmp_path)
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr
        assert "error: " in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "model.index"]
