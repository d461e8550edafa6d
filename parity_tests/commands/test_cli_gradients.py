"""tools/verify.py --gradients: what it prints and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from parity_tests.helpers.paths import TOOLS
from parity_tests.helpers.small_models import one_of_each_layer as tiny
from porting.cli.commands import verify as command
from porting.cli.drawing.gradients import print_gradients
from porting.cli.main import execute
from porting.convert import Conversion, Coverage, port_arrays, variables_digest
from porting.parity import gradients as gradients_module
from porting.parity.gradients import (
    PARTS,
    GradientResult,
    TensorResult,
    gradient_size,
    part_of,
    prove_gradients,
)
from porting.parity.measure import Difference
from porting.rules import rules
from porting.synthetic import synthetic_variables
from pytorch_model.bifpn import Fuse
from pytorch_model.config import MODELS, model_config

TOOL = TOOLS / "verify.py"


def verify(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def conversion() -> Conversion:
    config, variables = tiny(), synthetic_variables(tiny())
    arrays = port_arrays(rules(config), variables)
    coverage = Coverage(len(variables), {}, len(arrays), 0)
    return Conversion(config, arrays, variables, "raw", coverage, variables_digest(variables))


@pytest.mark.usefixtures("tensorflow")
def test_from_the_command_line(tmp_path: Path) -> None:
    arguments = ("--ckpt", "synthetic:efficientdet-lite0", "--size", "128", "--gradients", "--json")
    done = verify(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["passed"]
    for mode, statistics in (("evaluation", 0), ("training", 216)):
        figures = summary["gradients"][mode]
        assert (figures["passed"], figures["gradients"], figures["statistics"]) == (True, 373, statistics)
        assert 0 < figures["worst"] <= 1e-9
    assert "passed training: 589 tensors" in done.stderr


@pytest.mark.usefixtures("tensorflow")
@pytest.mark.parametrize(("activations", "gradients", "status"), [(1, 1, 0), (1, 0, 1), (0, 1, 1)])
def test_either_failure_is_the_exit_status(
    activations: int,
    gradients: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = Difference(0.0 if gradients else 1.0, 0.0)
    result = GradientResult((TensorResult("images", (), 1.0, 1.0, found),), ())
    monkeypatch.setattr(command, "_prove", lambda *arguments: (bool(activations), {}))
    monkeypatch.setattr(gradients_module, "compare_gradients", lambda *arguments: result)
    arguments = ["--ckpt", "synthetic:efficientdet-lite0", "--size", "128", "--gradients", "--json"]
    monkeypatch.chdir(tmp_path)
    assert execute("verify", arguments) == status
    summary = json.loads(capsys.readouterr().out)
    assert summary["passed"] is (status == 0)
    assert summary["gradients"]["training"]["passed"] is bool(gradients)


def test_two_files_have_no_gradients(tmp_path: Path) -> None:
    done = verify("--weights", "a.pth", "--against", "b.pth", "--gradients", cwd=tmp_path)
    assert done.returncode == 2
    assert "--against runs no network" in done.stderr


@pytest.mark.usefixtures("tensorflow")
def test_a_fault_is_named(conversion: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every node stops its second input's gradient; nothing changes on the way forward."""
    forward = Fuse.forward

    def stopped(self: Fuse, inputs: list[torch.Tensor]) -> torch.Tensor:
        return forward(self, [inputs[0], inputs[1].detach(), *inputs[2:]])

    monkeypatch.setattr(Fuse, "forward", stopped)
    console = Console(width=120, record=True)
    results = prove_gradients(conversion)
    print_gradients(console, results)
    text = console.export_text()
    print(text)
    assert not any(result.passed for result in results.values())
    assert "FAILED training" in text
    last = results["training"].last_failure
    assert last is not None
    assert f"nearest to the fault: {last.name} in PyTorch, {last.sources[0]} in TensorFlow" in text
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 4}
    assert {part: "✓" in row for part, row in rows.items()} == {
        "images": False,
        "backbone": False,
        "resample": False,
        "bifpn": False,
        "class_net": True,
        "box_net": True,
    }


@pytest.mark.usefixtures("tensorflow")
def test_every_tensor_belongs_to_a_part(conversion: Conversion) -> None:
    modes: list[str] = []
    results = prove_gradients(conversion, modes.append)
    assert modes == list(results) == ["evaluation", "training"]
    for result in results.values():
        parts = {part_of(tensor) for tensor in (*result.gradients, *result.statistics)}
        assert parts == set(PARTS)


def test_the_last_level_has_several_pixels() -> None:
    for config in map(model_config, MODELS):
        rows, columns = config.feature_sizes(gradient_size(config))[config.max_level]
        assert 2 * rows * columns >= 4
