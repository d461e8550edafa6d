"""``convert``, ``inspect`` and the export to TensorFlow where no PyTorch or TensorFlow can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from parity_tests.helpers.paths import GOLDENS, ROOT
from parity_tests.helpers.small_models import seeded, tiny
from porting.checkpoint import open_checkpoint
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import apply_rules, convert, write_conversion
from porting.errors import ConversionError, WeightsError
from porting.reverse import reverse, with_averages
from porting.rules import rules
from pytorch_model.config import model_config
from pytorch_model.weights.checks import DIGEST
from pytorch_model.weights.files import read_any, read_weights, write_folder, write_weights
from pytorch_model.weights.tensors import DTYPES, as_array

CONFIG = tiny()


def run(
    command: str, *arguments: object, absent: Sequence[str] = ("torch", "tensorflow"), cwd: Path
) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, in which the packages ``absent`` cannot be imported."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules.update(dict.fromkeys({list(absent)})); "
        f"from porting.cli.main import run_command; run_command({command!r})"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return apply_rules(rules(CONFIG), seeded(CONFIG))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_bundle(folder / "model", with_averages(seeded(CONFIG), 7))
    return folder


def test_the_process_of_these_tests_has_no_framework(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """A ``.pth`` is PyTorch's own format, so PyTorch is missed."""
    write_weights(tmp_path / "w.pth", state, CONFIG, {})
    arguments = ("--weights", "w.pth", "--to", "tf-checkpoint", "--out", "out")
    done = run("export", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: reading w.pth needs the package torch: pip install torch\n"
    assert run("export", *arguments, absent=["tensorflow"], cwd=tmp_path).returncode == 0


def test_convert(tmp_path: Path, checkpoint: Path, state: dict[str, torch.Tensor]) -> None:
    done = run("convert", "--ckpt", checkpoint, "--out", "w.safetensors", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, config, metadata = read_weights(tmp_path / "w.safetensors")
    assert config.replace(name=CONFIG.name) == CONFIG
    assert metadata["variables_sha256"] == json.dumps(json.loads(done.stdout)["variables_sha256"])
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def test_convert_to_pth(tmp_path: Path, checkpoint: Path, state: dict[str, torch.Tensor]) -> None:
    done = run("convert", "--ckpt", checkpoint, "--out", "w.pth", absent=["tensorflow"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    assert list(content["state_dict"]) == [rule.target for rule in rules(CONFIG)]
    assert all(torch.equal(content["state_dict"][key], tensor) for key, tensor in state.items())


def test_inspect(tmp_path: Path, checkpoint: Path) -> None:
    """The exported file holds anchors, which are compared with the configuration's."""
    for file in (checkpoint, GOLDENS / "tiny-lite-float32.tflite"):
        done = run("inspect", "--ckpt", file, "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["config"]["num_classes"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.bfloat16])
def test_export(dtype: torch.dtype, tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """NumPy lacks bfloat16: that file is read with PyTorch."""
    given = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items()}
    write_weights(tmp_path / "w.safetensors", given, CONFIG, {"step": "7"})
    arguments = ("--weights", "w.safetensors", "--to", "tf-checkpoint", "--out", "out")
    absent = ["tensorflow"] if dtype == torch.bfloat16 else ["torch", "tensorflow"]
    done = run("export", *arguments, absent=absent, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open_checkpoint(tmp_path / "out") as back:
        assert back.step == 7
        again = convert(back, CONFIG).arrays
    for key, tensor in given.items():
        if tensor.is_floating_point():
            np.testing.assert_array_equal(again[key], tensor.float().numpy())


def test_export_to_keras(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    pytest.importorskip("h5py", reason="needs h5py")
    write_weights(tmp_path / "w.safetensors", state, CONFIG, {})
    done = run("export", "--weights", "w.safetensors", "--to", "h5", "--out", "w.h5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_export_refuses(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    key = "box_net.predict.pointwise.bias"
    arguments = ("--weights", "w.safetensors", "--to", "tf-checkpoint", "--out", "out")
    faults = {
        "lacks tensor box_net.predict.pointwise.bias: it": {k: t for k, t in state.items() if k != key},
        "holds NaN or infinite values": {**state, key: state[key] * torch.nan},
        f"{key} is float16 but other tensors are float32": {**state, key: state[key].half()},
        f"{key} is [1, 36], efficientdet-d0 needs [36]": {**state, key: state[key][None]},
        f"{key} is int64, which this network cannot use": {**state, key: state[key].long()},
    }
    for message, given in faults.items():
        write_weights(tmp_path / "w.safetensors", given, CONFIG, {})
        done = run("export", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


# --- the functions behind the commands ----------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_reading_arrays_gives_what_reading_tensors_gives(
    name: str, tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    dtype = getattr(torch, name)
    given = {key: t.to(dtype) if t.is_floating_point() else t for key, t in state.items()}
    for path in (tmp_path / "w.safetensors", tmp_path / "w.pth"):
        write_weights(path, given, CONFIG, {"step": "7"})
        arrays, config, metadata = read_any(path)
        tensors, *rest = read_weights(path)
        assert [config, metadata] == rest
        assert arrays.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert isinstance(arrays[key], np.ndarray) == (path.suffix != ".pth" and name != "bfloat16")
            np.testing.assert_array_equal(as_array(arrays[key]), as_array(tensor))


def test_a_folder_of_arrays(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    write_folder(tmp_path / "w", state, CONFIG, {"step": "7"})
    arrays, config, metadata = read_any(tmp_path / "w")
    assert (config, metadata) == (CONFIG, {"step": "7"})
    assert all(isinstance(array, np.ndarray) for array in arrays.values())


def test_damaged_arrays(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "w.safetensors"
    write_weights(path, state, CONFIG, {})
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=f"its {DIGEST} does not fit its contents"):
        read_any(path)
    path.write_bytes(data[:1000])
    with pytest.raises(WeightsError, match=r"w\.safetensors is damaged or not a weight file"):
        read_any(path)
    safetensors.torch.save_file({"a\n": torch.ones(2)}, path)
    with pytest.raises(WeightsError, match=r"calls a tensor 'a\\n', which is not a valid name"):
        read_any(path)


def test_the_files_are_those_of_the_safetensors_library(tmp_path: Path) -> None:
    """Same header and same bytes; only the order of the metadata, which the library does not fix, is ours."""
    tensors = {f"{key}.{i}": torch.ones(i, 3).to(getattr(torch, key)) for key in DTYPES for i in (0, 1, 5)}
    tensors["counter"], tensors["z"] = torch.tensor(3), torch.arange(6.0).reshape(2, 3).T
    write_weights(tmp_path / "ours.safetensors", tensors, CONFIG, {"note": "grün"})
    with safetensors.safe_open(tmp_path / "ours.safetensors", "pt") as file:
        metadata = file.metadata()
    plain = {key: tensor.contiguous() for key, tensor in tensors.items()}
    theirs = safetensors.torch.save(plain, metadata)
    ours = (tmp_path / "ours.safetensors").read_bytes()
    headers, bodies = [], []
    for data in (ours, theirs):
        size = int.from_bytes(data[:8], "little")
        headers.append(json.loads(data[8 : 8 + size]))
        bodies.append(data[8 + size :])
        assert size % 8 == 0
    assert headers[0] == headers[1]
    assert list(headers[0])[1:] == [key for key in headers[1] if key != "__metadata__"]
    assert bodies[0] == bodies[1]


def test_a_file_can_be_written_from_its_own_tensors(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    """PyTorch's tensors of a safetensors file are views of it. Writing over them ends the process."""
    path = tmp_path / "w.safetensors"
    write_weights(path, state, CONFIG, {})
    again, config, _ = read_weights(path)
    write_weights(path, again, config, {})
    for key, tensor in read_weights(path)[0].items():
        assert torch.equal(tensor, state[key])


def test_a_link_stays_a_link(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    path, link = tmp_path / "w.safetensors", tmp_path / "link.safetensors"
    write_weights(path, state, CONFIG, {})
    link.symlink_to(path)
    write_weights(link, read_weights(link)[0], CONFIG, {"note": "new"})
    assert link.is_symlink()
    assert read_weights(path)[2]["note"] == "new"


def test_what_is_shared_cannot_be_written_to(checkpoint: Path) -> None:
    """Else a network in training would change the variables that it is compared with."""
    with open_checkpoint(checkpoint) as opened:
        conversion = convert(opened, CONFIG)
    kernel = conversion.variables["efficientnet-b0/stem/conv2d/kernel"]
    array = conversion.arrays["backbone.stem.conv.weight"]
    assert np.shares_memory(kernel, array)
    for shared in (kernel, array):
        with pytest.raises(ValueError, match="read-only"):
            shared[0] = 1
    conversion.state_dict["backbone.stem.conv.weight"].zero_()
    assert array.any()


def test_memory_of_a_conversion(tmp_path: Path) -> None:
    """The weights once, and one of them twice for a moment: at most half more."""
    config = model_config("efficientdet-d0")
    write_bundle(tmp_path / "model", with_averages(seeded(config), 7))
    with open_checkpoint(tmp_path) as opened:
        tracemalloc.start()
        try:
            conversion = convert(opened, config)
            write_conversion(conversion, opened, (), tmp_path / "w.safetensors")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak <= 1.5 * sum(array.nbytes for array in conversion.arrays.values())


def test_float64_arrays_stay_exact(checkpoint: Path) -> None:
    with open_checkpoint(checkpoint) as opened:
        exact = convert(opened, CONFIG, dtype="float64")
    assert exact.arrays["backbone.stem.conv.weight"].dtype == np.float64
    assert exact.variables["efficientnet-b0/stem/conv2d/kernel"].dtype == np.float32
    back = reverse(exact.arrays, CONFIG)
    for name, value in back.items():
        if not name.endswith(("/bias", "/moving_mean")):
            np.testing.assert_array_equal(value, exact.variables[name])


def test_an_overflow_is_told_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    content = seeded(CONFIG)
    name = "efficientnet-b0/stem/tpu_batch_normalization/gamma"
    content[name] = np.full(content[name].shape, 1e300)
    write_bundle(tmp_path / "model", content)
    with open_checkpoint(tmp_path) as opened, pytest.raises(ConversionError, match="overflows float32"):
        convert(opened, CONFIG)
    assert not recwarn.list
