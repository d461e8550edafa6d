"""What ``git clone`` without Git LFS leaves in place of a file: recognised by every reader."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity_tests.robustness.samples import bundle
from parity_tests.robustness.targets import TARGETS, Target
from porting.checkpoint import open_checkpoint
from porting.convert import convert
from porting.errors import EfficientDetError
from porting.infer import infer_config
from porting.parity.compared_weights import read_weight_file
from porting.parity.reference.graph import open_meta
from pytorch_model.config import model_config

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'5' * 64}\nsize 15732736\n"
SAID = "a Git LFS pointer, not the file itself: run git lfs pull"

# Text on the command line is no file; kept results are written by the evaluation and never committed; a
# sealed target reads the same files as another one.
NO_FILES = ("hparams text", "kept results")
READERS = [name for name, target in TARGETS.items() if name not in NO_FILES and not target.seal]


def files_of(path: Path) -> list[Path]:
    """The files of a sample, or the file that it is."""
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}.*")
    return sorted(file for file in found if file.is_file())


def result_of(target: Target, sample: Path) -> str:
    """The result, or the text of the error."""
    try:
        return target.use(sample)
    except EfficientDetError as error:
        return str(error)


@pytest.mark.parametrize("name", READERS)
def test_a_pointer_in_place_of_any_file_is_recognised(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    sample = target.make(tmp_path)
    sound = target.use(sample)
    recognised = 0
    for file in files_of(sample):
        kept = file.read_bytes()
        file.write_text(POINTER)
        result = result_of(target, sample)
        file.write_bytes(kept)
        assert result == sound or SAID in result, f"{file.name}: {result}"
        recognised += SAID in result
    assert recognised, "no file of the sample was needed"


def port(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        convert(checkpoint, infer_config(checkpoint.shapes).config)


def test_each_file_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    folder = bundle(tmp_path)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model"\n')
    files = files_of(folder)
    assert len(files) == 3
    for file in files:
        kept = file.read_bytes()
        file.write_text(POINTER)
        with pytest.raises(EfficientDetError, match=rf"{file.name} cannot be read: .*{SAID}"):
            port(folder)
        file.write_bytes(kept)
    port(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.pt"])
def test_weights_to_compare(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(EfficientDetError, match=SAID):
        read_weight_file(tmp_path / name)


@pytest.mark.usefixtures("tensorflow")
def test_the_graph_of_a_reference(tmp_path: Path) -> None:
    path = tmp_path / "model.meta"
    path.write_text(POINTER)
    with pytest.raises(EfficientDetError, match=rf"cannot read .*model\.meta: it is {SAID}"):
        open_meta(path, model_config("efficientdet-d0"), {})


def test_a_file_that_only_quotes_a_pointer_is_read(tmp_path: Path) -> None:
    labels = TARGETS["labels"]
    path = labels.make(tmp_path)
    path.write_text("1: person\n2: " + POINTER.splitlines()[0] + "\n")
    assert "git-lfs" in labels.use(path)
