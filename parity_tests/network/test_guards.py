"""Rejections that a whole command rarely or never reaches, because an earlier check finds the problem."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from parity_tests.helpers.paths import GOLDENS, TOOLS
from parity_tests.helpers.tflite_files import TINY, golden
from parity_tests.robustness import samples
from porting import reverse as reversing
from porting.checkpoint import frozen_graph, open_checkpoint
from porting.checkpoint.frozen_graph import FrozenGraph
from porting.checkpoint.objects import graph as object_graph
from porting.checkpoint.tflite import checkpoint as tflite
from porting.checkpoint.tflite import flatbuffer
from porting.checkpoint.v2.bundle import TensorBundle
from porting.checkpoint.v2.index import read_index
from porting.checkpoint.v2.table import MAGIC, read_table
from porting.convert import check_targets
from porting.errors import CheckFailedError, CheckpointError, ConversionError, EfficientDetError, OutputError
from porting.export import Weights, h5, onnx_detector
from porting.parity.lockstep import _Stream
from porting.sources import download
from pytorch_model import ConfigError, WeightsError
from pytorch_model.config import backbone_config, model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.files import check_new_folder, check_writable, new_folder, replacing
from pytorch_model.formats.wire import Malformed
from pytorch_model.hub import load_variant
from pytorch_model.weights.files import read_weights, write_weights
from tf_reference.variables import variable_shapes


def test_a_folder_is_not_a_frozen_graph(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read: Is a directory; check the path"):
        FrozenGraph(tmp_path)


def test_a_tflite_file_too_large_for_its_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tflite, "_MOST_BYTES", 1000)
    (tmp_path / "a.tflite").write_bytes(golden("float32").read_bytes())
    with pytest.raises(CheckpointError, match=r"a\.tflite cannot be read: it has more than 1,000 bytes"):
        tflite.open_tflite(tmp_path / "a.tflite", None)


def test_a_tensor_of_another_shape() -> None:
    state_dict = EfficientDet(TINY).state_dict()
    check_targets(state_dict, TINY)
    key = next(iter(state_dict))
    with pytest.raises(ConversionError, match=rf"the rules make {key} of shape \[1, .*the model needs \["):
        check_targets({**state_dict, key: state_dict[key][None]}, TINY)


def test_a_variable_of_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    state_dict = EfficientDet(TINY).state_dict()
    reversing.reverse(state_dict, TINY)
    shapes = dict(variable_shapes(TINY))
    name = next(iter(shapes))
    monkeypatch.setattr(reversing, "variable_shapes", lambda config: {**shapes, name: (7, *shapes[name])})
    with pytest.raises(ConversionError, match=rf"the rules make {name} of shape .* AutoML has \[7, .*; fix"):
        reversing.reverse(state_dict, TINY)


def test_a_tap_that_the_reference_does_not_have() -> None:
    with (
        _Stream(lambda tap: tap("stem", torch.zeros(1).numpy())) as stream,
        pytest.raises(EfficientDetError, match=r"names the tap stern, which the reference does not have"),
    ):
        stream.take("stern")


def test_hdf5_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    weights = Weights(EfficientDet(TINY).state_dict(), TINY, {})
    with pytest.raises(OutputError, match=r"x\.h5: HDF5 needs h5py: pip install"):
        h5.write(weights, tmp_path / "x.h5")
    assert not list(tmp_path.iterdir())


def test_safetensors_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_weights(tmp_path / "x.safetensors", EfficientDet(TINY).state_dict(), TINY, {})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(WeightsError, match=r"x\.safetensors needs the package safetensors: pip install"):
        read_weights(tmp_path / "x.safetensors")


def test_scores_that_an_exported_program_gets_wrong() -> None:
    class Network(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
            return [images], [images / 3]

    class Postprocessing(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tensors

    network: Any = Network()
    postprocessing: Any = Postprocessing()
    inputs = {"images": torch.rand(2, 5), "image_scales": torch.ones(2)}
    right = [inputs["images"], inputs["images"] / 3, inputs["image_scales"]]
    assert onnx_detector._check(network, postprocessing, inputs, right) < 1e-7
    wrong = [right[0], right[1] + 1e-5, *right[2:]]
    with pytest.raises(CheckFailedError, match=r"scores are off by 1\.0e-05.*nothing was written"):
        onnx_detector._check(network, postprocessing, inputs, wrong)


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    attempts: list[tuple[Callable[[], object], str]] = [
        (lambda: replacing(folder).__enter__(), "folder: it is a folder; give a file name"),
        (lambda: check_writable(folder), "folder: it is a folder; give a file name"),
        (lambda: check_new_folder(file), "file: there is a file of that name; choose another folder"),
    ]
    for attempt, message in attempts:
        with pytest.raises(OutputError, match=message):
            attempt()
    with (
        pytest.raises(OutputError, match=r"cannot write /.*new: bad"),
        new_folder(tmp_path / "new") as at,
    ):
        raise OutputError(f"cannot write {at}: bad")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown backbone 'efficientnet-b9'; known: efficientnet-b0,"):
        backbone_config("efficientnet-b9")
    with pytest.raises(WeightsError, match=r"cannot write x\.bin: use a name that ends in \.safetensors or"):
        write_weights(tmp_path / "x.bin", {}, TINY, {})


def test_an_address_of_a_different_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save([1, 2], tmp_path / "list.pth")
    digest = hashlib.sha256((tmp_path / "list.pth").read_bytes()).hexdigest()
    file = (tmp_path / "list.pth").rename(tmp_path / f"list-{digest[:8]}.pth")
    with pytest.raises(WeightsError, match=r"list-.*\.pth holds no state_dict entry"):
        load_variant("efficientdet-lite0", file.as_uri())
    write_weights(tmp_path / "whole.pth", {}, model_config("efficientdet-lite0"), {})
    with pytest.raises(
        WeightsError, match=r"whole\.pth is more than a state dict; give the address of one that"
    ):
        load_variant("efficientdet-lite0", (tmp_path / "whole.pth").as_uri())


def test_files_larger_than_any_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "model.index", "wb") as file:  # zeros, then the end of a table
        file.truncate(1 << 25)
        file.seek(0, 2)
        file.write(bytes(40) + MAGIC.to_bytes(8, "little"))
    with pytest.raises(
        CheckpointError, match="cannot be read: it has more than 16,777,216 bytes; check the path"
    ):
        read_index(tmp_path / "model.index")
    for name in ("frozen", "objects"):
        (tmp_path / name).mkdir()
    graph, objects = samples.frozen_graph(tmp_path / "frozen"), samples.object_based(tmp_path / "objects")
    monkeypatch.setattr(frozen_graph, "MOST_VARIABLES", 3)
    with pytest.raises(CheckpointError, match="it has more than 3 constants, which no EfficientDet has"):
        open_checkpoint(graph)
    monkeypatch.setattr(object_graph, "_LONGEST_PATH", 10)
    with pytest.raises(CheckpointError, match="has a variable more than 10 characters of attributes deep"):
        open_checkpoint(objects)


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tool = TOOLS / "verify.py"
    command = [sys.executable, str(tool), "--ckpt", "synthetic:efficientdet-lite0", "--report", "file/out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "error: cannot create the folder file/out: Not a directory; choose another folder" in done.stderr


def test_a_string_of_an_impossible_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_index(GOLDENS / "bundle" / "tensorflow.index")
    opened = TensorBundle(bundle)
    entry = next(iter(bundle.entries.values()))._replace(dtype=7, shape=(), size=12, offset=0)
    bundle = dataclasses.replace(bundle, entries={"text": entry})
    opened.index = bundle
    monkeypatch.setattr(opened, "_read_bytes", lambda *more: np.full(12, 255, np.uint8))
    with pytest.raises(CheckpointError, match=r"is damaged at variable 'text' \(12 bytes at byte 0\)"):
        opened.read_string("text")


def test_a_disk_that_fails_while_a_tensor_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def seek(self, place: int) -> None:
            raise OSError(5, "Input/output error")

    opened = TensorBundle(read_index(GOLDENS / "bundle" / "tensorflow.index"))
    monkeypatch.setattr(opened, "_files", dict.fromkeys(opened._files, Failing()))
    with pytest.raises(CheckpointError, match=r"cannot be read: Input/output error; check the path"):
        dict(opened)


def test_bytes_that_are_not_a_table() -> None:
    with pytest.raises(Malformed, match="its last 48 bytes are not the footer of a LevelDB table"):
        list(read_table(bytes(100)))


def test_options_of_an_impossible_width() -> None:
    with pytest.raises(Malformed, match="its options claim numbers of 3 bytes"):
        flatbuffer._uint(bytes(16), 0, 3)


def test_servers_that_cannot_be_trusted_or_reached() -> None:
    untrusted = ssl.SSLCertVerificationError()
    untrusted.verify_message = "self-signed certificate"
    with pytest.raises(download._Fatal, match=r"certificate is not trusted \(self-signed certificate\)"):
        download._unreachable(untrusted)
    with pytest.raises(download._Transient, match="the connection failed"):
        download._unreachable(ConnectionResetError())


def test_a_connection_that_breaks_while_it_is_read() -> None:
    class Response:
        def read(self, count: int) -> bytes:
            raise http.client.IncompleteRead(b"")

    with pytest.raises(download._Transient, match=r"the connection broke off \(IncompleteRead\)"):
        download._read(Response())
