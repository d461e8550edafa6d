"""tools/convert.py as a user runs it: what it prints, what it writes, which input it rejects."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from parity_tests.helpers.paths import GOLDENS, ROOT, TOOLS
from parity_tests.helpers.tflite_files import TINY
from porting.checkpoint.v2.writer import write_bundle
from porting.scopes import EMA_SUFFIX, STATISTICS
from porting.synthetic import synthetic_checkpoint
from pytorch_model import load_model
from pytorch_model.config import model_config
from pytorch_model.weights.files import read_weights
from tf_reference.variables import variable_shapes

TOOL = TOOLS / "convert.py"
MODEL = "efficientdet-lite0"


def convert(
    *arguments: object, cwd: Path, blocked: tuple[str, ...] = (), limit_bytes: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the tool. ``blocked`` modules fail to import; ``limit_bytes`` caps any file it writes."""
    code = f"import sys, runpy; [sys.modules.__setitem__(m, None) for m in {blocked!r}]; "
    code += f"sys.argv[0] = {str(TOOL)!r}; sys.path[0] = {str(TOOL.parent)!r}; "
    code += f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"

    def limit() -> None:
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env, preexec_fn=limit)


@pytest.fixture(scope="module")
def content() -> dict[str, np.ndarray]:
    return synthetic_checkpoint(model_config(MODEL))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, content: dict[str, np.ndarray]) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / MODEL
    write_bundle(folder / "model", content)
    return folder


def test_converts_and_accounts_without_tensorflow(tmp_path: Path, checkpoint: Path) -> None:
    done = convert("--ckpt", checkpoint, cwd=tmp_path, blocked=("tensorflow",))
    assert done.returncode == 0, done.stderr
    assert "1177 TensorFlow variables = 588 used + 589 deliberately unused" in done.stdout
    assert "660 PyTorch tensors, each written once" in " ".join(done.stdout.split())
    assert "3,241,166 bias-free + 2,304 biases removed = 3,243,470" in " ".join(done.stdout.split())
    assert "paper 3.2M, agrees" in " ".join(done.stdout.split())
    assert [path.name for path in tmp_path.iterdir()] == ["efficientdet_lite0.safetensors"]
    assert load_model(tmp_path / "efficientdet_lite0.safetensors").config == model_config(MODEL)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, checkpoint: Path) -> None:
    for name in ("a", "b"):
        assert convert("--ckpt", checkpoint, "--out", f"{name}.safetensors", cwd=tmp_path).returncode == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("out", [".", "new/", "there", "there/"])
def test_a_folder_gets_a_file_of_the_default_name(out: str, tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "there").mkdir()
    done = convert("--ckpt", checkpoint, "--out", out, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written == [tmp_path / out / "efficientdet_lite0.safetensors"]
    assert load_model(written[0]).config == model_config(MODEL)


def test_json_is_all_there_is_on_stdout(tmp_path: Path, checkpoint: Path) -> None:
    done = convert("--ckpt", checkpoint / "model.index", "--json", "--raw", "--out", "x.pth", cwd=tmp_path)
    summary = json.loads(done.stdout)
    assert summary["weights"] == "raw"
    assert summary["parameters"] == {"ours": 3_241_166, "automl": 3_243_470, "published_millions": "3.2"}
    assert summary["coverage"]["used"] == 588
    assert load_model(tmp_path / summary["weights_file"]).config.to_dict() == model_config(MODEL).to_dict()
    assert "read" in done.stderr


def test_partial_averages_are_taken_if_asked_for(tmp_path: Path) -> None:
    config = model_config(MODEL)
    content = synthetic_checkpoint(config)
    statistics = [name for name in variable_shapes(config) if name.endswith(STATISTICS)]
    for name in statistics:  # as in AutoML's Keras trainer, which averages what it trains
        del content[name + EMA_SUFFIX]
    (tmp_path / "run").mkdir()
    write_bundle(tmp_path / "run/model", content)
    refused = convert("--ckpt", "run", cwd=tmp_path)
    assert refused.returncode == 2
    assert "--ema-or-raw" in refused.stderr
    done = convert("--ckpt", "run", "--ema-or-raw", "--json", "--out", "x.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kind = f"EMA ({588 - len(statistics)} of 588, the rest raw)"
    assert json.loads(done.stdout)["weights"] == kind
    assert kind in " ".join(done.stderr.split())
    assert json.loads(read_weights(tmp_path / "x.safetensors")[2]["weights"]) == kind
    assert convert("--ckpt", "run", "--ema-or-raw", "--raw", cwd=tmp_path).returncode == 2


def test_settings_of_the_file_are_written_with_the_weights(tmp_path: Path) -> None:
    """A TFLite file has its image size, anchors and input range; none of these is assumed."""
    done = convert("--ckpt", GOLDENS / "tiny-lite-int8.tflite", "--out", "x.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    settings = [line for line in done.stdout.splitlines() if line.startswith("from the file")]
    assert len(settings) == 1
    assert f"image_size {TINY.image_size[0]}×{TINY.image_size[1]}" in settings[0]
    found = load_model(tmp_path / "x.safetensors").config
    for field in ("image_size", "act_type", "aspect_ratios", "anchor_scale", "mean_rgb", "stddev_rgb"):
        assert getattr(found, field) == getattr(TINY, field)
    done = convert(
        "--ckpt", GOLDENS / "tiny-lite-int8.tflite", "--out", "x.safetensors", "--hparams", "anchor_scale=7",
        cwd=tmp_path,
    )  # fmt: skip
    assert load_model(tmp_path / "x.safetensors").config.anchor_scale == 7
    row = next(line for line in done.stdout.splitlines() if line.startswith("from the file"))
    assert "anchor_scale" not in row


@pytest.mark.usefixtures("tensorflow")
def test_verify_prints_every_layer_and_passes(tmp_path: Path) -> None:
    done = convert("--ckpt", f"synthetic:{MODEL}", "--verify", "--size", 128, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in ("backbone.stem", "bifpn.cells.2.nodes.7.resample.1", "class_net.bns.2.4", "box_outputs/7"):
        assert line in done.stdout
    assert "passed float64: 211 activations" in done.stdout
    assert "passed float32: 211 activations" in done.stdout
    assert (tmp_path / "synthetic" / MODEL / "model.index").exists()
    assert (tmp_path / "efficientdet_lite0.safetensors").exists()


def test_verify_without_tensorflow_says_what_to_install(tmp_path: Path, checkpoint: Path) -> None:
    done = convert("--ckpt", checkpoint, "--verify", cwd=tmp_path, blocked=("tensorflow",))
    check_rejected(done, tmp_path, r"pip install -e '.[tensorflow]'")


def check_rejected(done: subprocess.CompletedProcess[str], folder: Path, message: str) -> None:
    """One sentence, status 2, no traceback, nothing written."""
    assert done.returncode == 2, done.stdout + done.stderr
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith("error: ")
    assert message in errors[0]
    assert not [p for p in folder.iterdir() if p.suffix in (".safetensors", ".pth") or p.name.startswith(".")]


def lose_data(folder: Path) -> None:
    (folder / "model.data-00000-of-00001").unlink()


def truncate(folder: Path) -> None:
    data = folder / "model.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1000])


def flip(folder: Path) -> None:
    data = folder / "model.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def second(folder: Path) -> None:
    (folder / "checkpoint").unlink()
    for path in list(folder.glob("model.*")):
        shutil.copy(path, folder / path.name.replace("model", "other"))


def foreign(folder: Path) -> None:
    write_bundle(folder / "model", {"resnet/conv1/kernel": np.zeros((7, 7, 3, 64), np.float32)})


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no data file": (lose_data, "model.data-00000-of-00001"),
    "truncated data file": (truncate, "model.data-00000-of-00001"),
    "flipped byte in a tensor": (flip, "CRC32C"),
    "truncated index": (
        lambda f: (f / "model.index").write_bytes((f / "model.index").read_bytes()[:-9]),
        "model.index",
    ),
    "several checkpoints": (second, "other"),
    "something else": (foreign, "not an AutoML EfficientDet"),
    "a text file": (lambda f: (f / "model.index").write_text("hello"), "model.index"),
    "an empty folder": (empty, "checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_checkpoints_are_rejected(fault: str, tmp_path: Path, checkpoint: Path) -> None:
    damage, message = FAULTS[fault]
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    damage(copy)
    work = tmp_path / "work"
    work.mkdir()
    check_rejected(convert("--ckpt", copy, cwd=work), work, message)


def test_nan_is_rejected(tmp_path: Path, content: dict[str, np.ndarray]) -> None:
    name = f"resample_p6/bn/beta{EMA_SUFFIX}"
    write_bundle(tmp_path / "c" / "model", {**content, name: np.full(64, np.nan, np.float32)})
    work = tmp_path / "work"
    work.mkdir()
    check_rejected(convert("--ckpt", tmp_path / "c", cwd=work), work, "resample_p6/bn/beta holds 64 NaN")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "efficientdet-d0"], "these are the variables of efficientdet-lite0"),
        (["--out", "weights.bin"], "use a name that ends in .safetensors or .pth"),
        (["--out", "nowhere/w.pth"], "there is no folder nowhere"),
        (["--size", "128"], "--size is the image size at which --verify compares; add --verify"),
        (["--verify", "--size", "-5"], "--size -5 is not a size"),
        (["--verify", "--size", "0"], "--size 0 is not a size"),
    ],
    ids=str,
)
def test_bad_arguments_are_rejected(
    arguments: list[str], message: str, tmp_path: Path, checkpoint: Path
) -> None:
    check_rejected(convert("--ckpt", checkpoint, *arguments, cwd=tmp_path), tmp_path, message)


def test_a_rule_that_does_not_fit_is_a_failed_check(tmp_path: Path, checkpoint: Path) -> None:
    code = "import sys; from porting import convert; from porting.cli.main import run_command\n"
    code += "right = convert.rules; convert.rules = lambda config: list(right(config))[1:]\n"
    code += "run_command('convert')"
    command = [sys.executable, "-c", code, "--ckpt", str(checkpoint), "--out", str(tmp_path / "x.pth")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: porting/rules.py uses efficientnet-lite0/stem/")
    assert done.stderr.endswith(" 0 times instead of 1; fix that rule\n")
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    check_rejected(convert("--ckpt", "no/such/thing", cwd=tmp_path), tmp_path, "no/such/thing")
    check_rejected(convert("--ckpt", "synthetic:resnet", cwd=tmp_path), tmp_path, "unknown model 'resnet'")
    done = convert("--ckpt", f"synthetic:{MODEL}", "--step", 5, cwd=tmp_path)
    check_rejected(done, tmp_path, f"synthetic:{MODEL} has one step; leave out --step")


def test_a_name_too_long_to_write(tmp_path: Path, checkpoint: Path) -> None:
    done = convert("--ckpt", checkpoint, "--out", "x" * 300 + ".pth", cwd=tmp_path)
    check_rejected(done, tmp_path, ".pth: File name too long; choose")


def test_a_full_disk_leaves_nothing(tmp_path: Path, checkpoint: Path) -> None:
    done = convert("--ckpt", checkpoint, cwd=tmp_path, limit_bytes=1_000_000)
    check_rejected(done, tmp_path, "cannot write efficientdet_lite0.safetensors")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, checkpoint: Path) -> None:
    target = tmp_path / "old.safetensors"
    target.write_text("precious")
    done = convert("--ckpt", checkpoint, "--out", target, cwd=tmp_path, limit_bytes=1_000_000)
    assert done.returncode == 2
    assert target.read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["old.safetensors"]


@pytest.fixture
def readonly_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder nobody may write to: root ignores permissions, so for root it is a read-only file system."""
    folder = tmp_path / "readonly"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("root may write anywhere here, and may not mount a read-only file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_no_write_permission(readonly_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    done = convert("--ckpt", checkpoint, "--out", readonly_folder / "w.pth", cwd=tmp_path)
    check_rejected(done, readonly_folder, "choose a folder you may write to")


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--ckpt", f"synthetic:{MODEL}"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()  # it has begun
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    if process.returncode == 0:
        pytest.skip("it had finished already")
    assert process.returncode == 130
    assert errors.strip() == "error: interrupted; nothing was left half-written"
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("seconds", [0.05, 0.4, 1.0])
def test_ctrl_c_while_starting_is_quiet(tmp_path: Path, checkpoint: Path, seconds: float) -> None:
    command = [sys.executable, str(TOOL), "--ckpt", str(checkpoint)]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    if seconds > 0.1:  # before that Python itself is starting and answers for itself
        assert process.returncode in (0, 130)
        assert "Traceback" not in errors
    assert not list(tmp_path.rglob(".*"))


def test_a_full_standard_output_is_one_sentence(tmp_path: Path, checkpoint: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(TOOL), "--ckpt", str(checkpoint), "--json"]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1]
        == "error: cannot print: No space left on device; check where the output goes"
    )


def test_a_terminal_without_the_signs_gets_the_rest(tmp_path: Path, checkpoint: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, str(TOOL), "--ckpt", str(checkpoint)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr


def test_help_has_examples(tmp_path: Path) -> None:
    done = convert("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert (
        "exit status: 0 done; 1 a check failed; 2 bad usage or input; 130 interrupted; 141 pipe closed"
        in done.stdout
    )
