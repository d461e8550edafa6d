"""tools/export.py as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.helpers.paths import ROOT, TOOLS
from porting.checkpoint import open_checkpoint
from pytorch_model import create_model
from pytorch_model.weights.files import write_weights


def export(*arguments: object, cwd: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the tool, ``before`` ahead of it in the same process."""
    tool = TOOLS / "export.py"
    code = f"import sys, runpy; sys.path[0] = {str(ROOT)!r}; import porting.cli.process\n{before}\n"
    code += f"sys.argv[0] = {str(tool)!r}; runpy.run_path({str(tool)!r}, run_name='__main__')"
    command = [sys.executable, "-c", code, *map(str, arguments)]
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
        f"back/{name}" for name in ("checkpoint", "config.yaml", "model.data-00000-of-00001", "model.index")
    ]
    assert "588 variables, as many moving averages of the same values, global_step 123" in summary["facts"]
    with open_checkpoint(tmp_path / "back") as checkpoint:
        assert checkpoint.step == 123
        assert len(checkpoint) == 2 * 588 + 1


def test_rejections_are_one_sentence_and_nothing_is_written(tmp_path: Path, weights: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.index").touch()
    for arguments in (
        ("--weights", weights, "--to", "tf-checkpoint", "--out", "full"),
        ("--weights", weights, "--to", "tf-checkpoint", "--out", "nowhere/x"),
        ("--weights", weights, "--to", "h5", "--out", "x.txt"),
        ("--weights", weights, "--to", "h5", "--out", "nowhere/x.h5"),
        ("--weights", "absent.pth", "--to", "h5", "--out", "x.h5"),
        ("--weights", weights, "--to", "caffe", "--out", "x"),
        ("--weights", weights, "--to", "effdet", "--out", "."),
        ("--weights", weights, "--to", "effdet", "--out", "nowhere/x.pth"),
        ("--weights", weights, "--to", "tf-checkpoint", "--out", "a" * 300),
    ):
        done = export(*arguments, cwd=tmp_path)
        assert done.returncode == 2, arguments
        assert "Traceback" not in done.stderr
        assert "error: " in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "model.index"]


def test_the_current_folder_is_not_replaced(tmp_path: Path, weights: Path) -> None:
    done = export("--weights", weights, "--to", "tf-checkpoint", "--out", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write .: it is the current folder or the root")
    assert not list(tmp_path.iterdir())


def test_the_weights_themselves_are_not_overwritten(tmp_path: Path) -> None:
    model = create_model("efficientdet_lite0")
    write_weights(tmp_path / "mine.pth", model.state_dict(), model.config, {})
    before = (tmp_path / "mine.pth").read_bytes()
    done = export("--weights", "mine.pth", "--to", "effdet", "--out", tmp_path / "mine.pth", cwd=tmp_path)
    assert done.returncode == 2
    assert "is the file that --weights reads" in done.stderr
    assert (tmp_path / "mine.pth").read_bytes() == before


def test_a_failed_check_is_not_bad_input(tmp_path: Path, weights: Path) -> None:
    before = "import porting.reverse as r; f = r.rules\n"
    before += "from porting.transforms import Transform\n"
    before += "wrong = Transform('wrong', lambda a: a, lambda a, n: (a * 2,))\n"
    before += "name = 'resample.p6.bn.weight'\n"
    before += "r.rules = lambda c: [x._replace(transform=wrong) if x.target == name else x for x in f(c)]"
    done = export("--weights", weights, "--to", "h5", "--out", "x.h5", cwd=tmp_path, before=before)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: resample.p6.bn.weight differs after writing")
    assert not list(tmp_path.iterdir())
