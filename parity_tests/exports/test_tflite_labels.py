"""Class names in the metadata of a TFLite file."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from parity_tests.helpers.tflite_files import golden
from porting.checkpoint import open_checkpoint
from porting.checkpoint.tflite.around import labels

FLOAT32 = golden("float32").read_bytes()
NAMES = b"ant\nbee\n???\nwasp\nmoth\n"


def with_files(**files: bytes) -> bytes:
    """The golden file with ``files`` appended as a zip, ``.txt`` added to their names."""
    data = io.BytesIO(FLOAT32)
    with zipfile.ZipFile(data, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.txt", content)
    return data.getvalue()


def opened(tmp_path: Path, data: bytes) -> tuple[object, str]:
    """(the class names, all notes)."""
    (tmp_path / "model.tflite").write_bytes(data)
    with open_checkpoint(tmp_path / "model.tflite") as checkpoint:
        return checkpoint.settings.get("class_names"), " ".join(checkpoint.notes)


@pytest.mark.parametrize("name", ["labelmap", "classes"])
def test_class_names(tmp_path: Path, name: str) -> None:
    names, notes = opened(tmp_path, with_files(**{name: NAMES}))
    assert names == ("ant", "bee", "", "wasp", "moth")
    assert f"class names are those of {name}.txt in the file's metadata" in notes


def test_the_public_lite0(shared: Path) -> None:
    with open_checkpoint(shared / "lite0" / "efficientdet_lite0.tflite") as checkpoint:
        names = checkpoint.settings["class_names"]
    assert len(names) == 90
    assert (names[0], names[11], names[16], names[89]) == ("person", "", "cat", "toothbrush")


def damaged(data: bytes) -> bytes:
    """With other compressed bytes of the list."""
    at = data.index(b"labelmap.txt") + len("labelmap.txt")
    return data[:at] + bytes(b ^ 0xFF for b in data[at : at + 8]) + data[at + 8 :]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (with_files(labelmap=b"ant\nbee\n"), "are not used: "),
        (with_files(a=NAMES, b=NAMES), "2 files could be the list"),
        (with_files(labelmap=b"a" * ((1 << 20) + 1)), "the list has more than 1,048,576 bytes"),
        (with_files(**{f"a{i}": NAMES for i in range(65)}), "it holds 65 files"),
        (damaged(with_files(labelmap=NAMES)), "they cannot be unpacked"),
        (FLOAT32 + b"PK\5\6", "they cannot be unpacked"),
    ],
)
def test_lists_that_are_not_used(tmp_path: Path, data: bytes, reason: str) -> None:
    names, notes = opened(tmp_path, data)
    assert names is None
    assert "the class names in the file's metadata are not used: " in notes
    assert reason in notes


def test_files_without_names(tmp_path: Path) -> None:
    assert opened(tmp_path, FLOAT32)[0] is None
    assert labels.read_class_names(b"", 5) == (None, None)
    data = io.BytesIO(FLOAT32)
    with zipfile.ZipFile(data, "a") as archive:
        archive.writestr("about.json", "{}")
    names, notes = opened(tmp_path, data.getvalue())
    assert names is None
    assert "class names" not in notes
