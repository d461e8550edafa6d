"""``--ckpt`` given something that is not a checkpoint: what it is and where it goes, in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from parity_tests.robustness.samples import bundle, keras_h5
from porting.checkpoint import open_checkpoint
from porting.checkpoint.messages import rounding_notes
from porting.cli.main import execute
from porting.errors import CheckpointError
from porting.sources.google_releases import BASE_URL, GOOGLE_RELEASES, google_release_named
from porting.sources.open import open_source

RELEASES = list(GOOGLE_RELEASES.values())


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.name)
def test_a_release_by_its_address(release: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EFFICIENTDET_RELEASES_URL", raising=False)
    path = release.path  # type: ignore[attr-defined]
    for address in (
        f"{BASE_URL}/{path}",
        f"{BASE_URL}/{path}?authuser=0".replace("https:", "http:"),
        f"gs://cloud-tpu-checkpoints/efficientdet/{path}",
        f"https://storage.cloud.google.com/cloud-tpu-checkpoints/efficientdet/{path}",
        f"https://cloud-tpu-checkpoints.storage.googleapis.com/efficientdet/{path}",
    ):
        assert google_release_named(address) is release
    monkeypatch.setenv("EFFICIENTDET_RELEASES_URL", "http://mirror.example/models/")
    assert google_release_named(f"http://mirror.example/models/{path}") is release


@pytest.mark.parametrize(
    "spec",
    [
        "https://storage.googleapis.com/cloud-tpu-checkpoints/efficientdet/coco2/efficientdet-d9.tar.gz",
        "https://example.org/model.tar.gz",
        "gs://my-bucket/run/model.ckpt-1000",
        "s3://bucket/key",
        "file:///tmp/model",
    ],
)
def test_other_addresses(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError, match=r"is an address, and --ckpt reads local files; .*by name"):
        open_source(spec, tmp_path)
    with pytest.raises(CheckpointError, match="is an address"):
        execute("inspect", ["--ckpt", spec])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", r"holds PyTorch weights, .* converted already: give it as --weights"),
        ("model.pth", r"holds PyTorch weights"),
        ("model.pt", r"holds PyTorch weights"),
        ("model.pt2", r"holds a program of torch\.export"),
        ("model.onnx", r"holds an ONNX graph, .* give the checkpoint, SavedModel or frozen graph"),
        ("model.keras", r"holds a whole model in Keras 3's format"),
    ],
)
def test_files_of_other_programs(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\3\4")
    with pytest.raises(CheckpointError, match=rf"{name} {said}"):
        open_source(str(tmp_path / name), tmp_path)
    (tmp_path / "config.json").touch()  # as in a release folder
    with pytest.raises(CheckpointError, match=rf"holds no TensorFlow checkpoint; {name} in it {said}"):
        open_source(str(tmp_path), tmp_path)
    with pytest.raises(CheckpointError, match="check the path"):
        open_source(str(tmp_path / f"absent{name}"), tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="a Git LFS pointer, not the file itself"):
        open_source(str(tmp_path / name), tmp_path)


def test_a_checkpoint_beside_such_a_file_is_read(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    (folder / "model.onnx").touch()
    with open_source(str(folder), tmp_path) as checkpoint:
        assert len(checkpoint)


@pytest.mark.parametrize("group", ["layers", "_layer_checkpoint_dependencies"])
def test_keras_3_weights(group: str, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        file.create_group("vars")
        file.create_group(group).create_group("dense/vars").create_dataset("0", data=[1.0])
    with pytest.raises(CheckpointError, match=r"Keras 3's format, .* under a name that ends in \.h5 only"):
        open_source(str(tmp_path / "model.weights.h5"), tmp_path)


def test_keras_2_weights_may_have_that_name(tmp_path: Path) -> None:
    pytest.importorskip("h5py", reason="needs h5py")
    keras_h5(tmp_path).rename(tmp_path / "model.weights.h5")
    with open_source(str(tmp_path / "model.weights.h5"), tmp_path) as checkpoint:
        assert len(checkpoint)


def test_a_model_dir_with_only_the_best_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AutoML's evaluation copies it to archive/; the trainer may have removed its own since."""
    (tmp_path / "run/archive").mkdir(parents=True)
    bundle(tmp_path / "run/archive")
    with open_checkpoint(tmp_path / "run") as checkpoint:
        assert len(checkpoint)
        assert checkpoint.notes[-1] == (
            "read from archive/, where AutoML's evaluation keeps the best checkpoint; "
            f"{tmp_path / 'run'} itself holds none"
        )
    execute("inspect", ["--ckpt", str(tmp_path / "run"), "--json"])
    assert "read from archive/" in json.loads(capsys.readouterr().out)["notes"][-1]
    with open_checkpoint(tmp_path / "run/archive") as checkpoint:
        assert checkpoint.notes == ()
    (tmp_path / "run/checkpoint").write_text('model_checkpoint_path: "model.ckpt-9"\n')
    with pytest.raises(CheckpointError, match=r"no file in it ends in \.index, archive/ holds model"):
        open_checkpoint(tmp_path / "run")


def test_short_floats_have_a_note() -> None:
    found = rounding_notes(["float32", "bfloat16", "float16", "bfloat16", "int64"])
    assert [note.split(" of each value")[0] for note in found] == [
        "values stored as bfloat16: 2 variables, rounded by up to 2^-8 (0.4 %)",
        "values stored as float16: 1 variables, rounded by up to 2^-11 (0.05 %)",
    ]
    assert rounding_notes(["float32", "float64"]) == []
