"""Checkpoints in archives: as released, with every byte damaged, and hostile ones."""

from __future__ import annotations

import errno
import gc
import io
import os
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from porting.checkpoint import Checkpoint, archive, open_checkpoint, unpack
from porting.checkpoint.v2.writer import write_bundle
from porting.errors import CheckpointError, EfficientDetError

RNG = np.random.default_rng(0)
VARIABLES: dict[str, np.ndarray] = {
    "stem/kernel": RNG.normal(size=(3, 3, 3, 8)).astype(np.float32),
    "stem/bias": np.zeros(8, np.float32),
    "global_step": np.array(77, np.int64),
}
Pack = Callable[[Path, Path], None]


def tar_gz(folder: Path, target: Path) -> None:
    with tarfile.open(target, "w:gz") as tar:
        tar.add(folder, folder.name)


def tar_dot(folder: Path, target: Path) -> None:
    """With the names that ``tar -C folder/.. -cf target ./folder`` writes."""
    with tarfile.open(target, "w") as tar:
        tar.add(folder, f"./{folder.name}")


def zip_stored(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w") as out:
        for file in sorted(folder.iterdir()):
            out.write(file, f"{folder.name}/{file.name}")


def zip_deflated(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        out.mkdir(folder.name) if hasattr(out, "mkdir") else None
        for file in sorted(folder.iterdir()):
            out.write(file, f"{folder.name}/{file.name}")


PACKINGS: dict[str, Pack] = {
    "m.tar.gz": tar_gz,
    "m.tgz": tar_gz,
    "m.tar": tar_dot,
    "m.zip": zip_stored,
    "deflated.zip": zip_deflated,
    "renamed.bin": tar_gz,
    "unzipped-by-the-browser.tar.gz": tar_dot,
}
every_packing = pytest.mark.parametrize(("name", "pack"), PACKINGS.items(), ids=list(PACKINGS))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A release as in its archive: weights, the graph and a log."""
    folder = tmp_path / "in" / "efficientdet-d0"
    write_bundle(folder / "model", VARIABLES)
    (folder / "model.meta").write_bytes(b"graph" * 100)
    (folder / "d0_coco_val.txt").write_text("AP 0.346")
    return folder


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder where archives are unpacked. It must be empty after every test."""
    place = tmp_path / "tmp"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    gc.collect()
    assert list(place.iterdir()) == []


def check(path: Path, step: int | None = None) -> str:
    """Check that everything in the archive is as packed; returns the checkpoint's source."""
    with open_checkpoint(path, step) as checkpoint:
        assert set(checkpoint) == set(VARIABLES)
        for name, value in checkpoint.read_many(checkpoint):
            assert value.tobytes() == VARIABLES[name].tobytes()
            assert (checkpoint.shapes[name], checkpoint.dtypes[name]) == (value.shape, value.dtype)
        assert checkpoint["stem/bias"].tobytes() == VARIABLES["stem/bias"].tobytes()
        assert checkpoint.step == 77
        assert checkpoint.format == "TensorFlow V2 checkpoint"
        with pytest.raises(KeyError):
            checkpoint["absent"]
        return checkpoint.source


def add(
    tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **more: Any
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in more.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(data))


# Reading


@every_packing
def test_every_variable_and_the_source(name: str, pack: Pack, folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / name)
    assert check(tmp_path / name) == f"{tmp_path / name}:efficientdet-d0/model"


@pytest.mark.parametrize("name", ["r.tar.gz", "r.zip"])
def test_a_real_release_equals_its_folder(name: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "oracle" / "checkpoints" / "efficientdet-d0"
    PACKINGS["m" + name[1:]](folder, tmp_path / name)
    with open_checkpoint(tmp_path / name) as packed, open_checkpoint(folder) as plain:
        assert packed.step == plain.step
        assert dict(packed.shapes) == dict(plain.shapes)
        for key, value in packed.read_many(packed):
            assert value.tobytes() == plain[key].tobytes(), key


@pytest.mark.parametrize(
    ("place", "files"),
    [
        ("oracle/checkpoints/keras-lite0", ["efficientdet-lite0.h5"]),
        ("oracle/checkpoints/keras-lite0", ["checkpoint", "ckpt-1.index", "ckpt-1.data-00000-of-00001"]),
        ("lite0", ["efficientdet_lite0.tflite"]),
    ],
    ids=["h5", "object-based", "tflite"],
)
def test_real_files_of_other_formats(place: str, files: list[str], shared: Path, tmp_path: Path) -> None:
    plain = shared / place / files[0]
    with tarfile.open(tmp_path / "m.tgz", "w:gz", compresslevel=1) as tar:
        for file in files:
            tar.add(shared / place / file, f"weights/{file}")
    with open_checkpoint(tmp_path / "m.tgz") as packed, open_checkpoint(plain) as unpacked:
        assert (packed.format, packed.notes, packed.step) == (unpacked.format, unpacked.notes, unpacked.step)
        assert dict(packed.shapes) == dict(unpacked.shapes)
        assert packed.source.startswith(f"{tmp_path / 'm.tgz'}:weights/")
        theirs = dict(unpacked.read_many(unpacked))
        for key, value in packed.read_many(packed):
            assert value.tobytes() == theirs[key].tobytes(), key


def test_notes_are_passed_on(folder: Path, tmp_path: Path) -> None:
    tar_gz(folder, tmp_path / "m.tar.gz")

    def noting(path: Path, step: int | None) -> Checkpoint:
        checkpoint = open_checkpoint(path, step)
        checkpoint.notes = (f"{checkpoint.source} is odd",)
        return checkpoint

    with archive.open_archive(tmp_path / "m.tar.gz", None, noting) as checkpoint:
        assert checkpoint.notes == (f"{tmp_path / 'm.tar.gz'}:efficientdet-d0/model is odd",)


def test_without_a_folder_inside(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as out:
        for file in folder.iterdir():
            out.write(file, file.name)
    assert check(tmp_path / "flat.zip") == f"{tmp_path / 'flat.zip'}:model"


def test_one_of_several_steps(folder: Path, tmp_path: Path) -> None:
    for file in [*folder.iterdir()]:
        file.unlink()
    write_bundle(folder / "model.ckpt-5", VARIABLES)
    write_bundle(folder / "model.ckpt-9", {"other": np.zeros(3, np.float32)})
    tar_gz(folder, tmp_path / "run.tar.gz")
    assert check(tmp_path / "run.tar.gz", step=5).endswith("model.ckpt-5")
    with open_checkpoint(tmp_path / "run.tar.gz") as newest:
        assert list(newest) == ["other"]
    with pytest.raises(CheckpointError, match=r"run\.tar\.gz:efficientdet-d0 holds no step 6"):
        open_checkpoint(tmp_path / "run.tar.gz", step=6)


def test_of_two_members_of_one_name_the_later_counts(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "appended.tar"
    with tarfile.open(target, "w") as tar:
        add(tar, "efficientdet-d0/model.index", b"an older one")
        tar.add(folder, folder.name)
    check(target)


def test_files_that_macos_adds_are_ignored(folder: Path, tmp_path: Path) -> None:
    zip_deflated(folder, tmp_path / "mac.zip")
    with zipfile.ZipFile(tmp_path / "mac.zip", "a") as out:
        out.writestr("__MACOSX/efficientdet-d0/._model.index", b"resource fork")
        out.writestr("efficientdet-d0/._model.index", b"resource fork")
    check(tmp_path / "mac.zip")


@pytest.mark.parametrize(
    ("members", "opened"),
    [
        (["a/model.h5", "a/model.tflite", "a/README"], "a/model.h5"),
        (
            ["s/saved_model.pb", "s/variables/variables.index", "s/variables/variables.data-00000-of-00001"],
            "s",
        ),
        (["efficientdet-lite0.tflite"], "efficientdet-lite0.tflite"),
        (["a/model.tflite", "a/efficientdet-d0_frozen.pb"], "a/efficientdet-d0_frozen.pb"),
        (["saved_model.pb", "keras_metadata.pb", "variables/variables.index", "m.tflite"], ""),
        (["saved_model.pb", "variables/variables.index", "x.hdf5"], "x.hdf5"),
    ],
)
def test_other_formats_are_opened_the_same_way(
    members: list[str], opened: str, tmp_path: Path, temporary: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as out:
        for member in members:
            out.writestr(member, member)
    seen: list[tuple[Path, int | None]] = []

    def fake(path: Path, step: int | None) -> Checkpoint:
        seen.append((path, step))
        assert path.exists()
        raise CheckpointError(f"{path} was opened")

    with pytest.raises(CheckpointError) as caught:
        archive.open_archive(tmp_path / "m.zip", 3, fake)
    ((path, step),) = seen
    assert Path(*path.relative_to(temporary).parts[2:]) == Path(opened)
    assert step == 3
    spoken = f"{tmp_path / 'm.zip'}:{opened}".removesuffix(":")
    assert str(caught.value) == f"{spoken} was opened"


# The temporary folder


def test_the_folder_is_private_and_is_removed_with_the_checkpoint(
    folder: Path, tmp_path: Path, temporary: Path
) -> None:
    tar_gz(folder, tmp_path / "m.tar.gz")
    checkpoint = open_checkpoint(tmp_path / "m.tar.gz")
    (private,) = temporary.iterdir()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    files = sorted(path.name for path in private.rglob("*") if path.is_file())
    assert files == [
        "checkpoint",
        "model.data-00000-of-00001",
        "model.index",
        "model.meta",
    ]  # no log
    del checkpoint  # never closed
    gc.collect()
    assert list(temporary.iterdir()) == []


def test_reading_after_close_raises(folder: Path, tmp_path: Path) -> None:
    tar_gz(folder, tmp_path / "m.tar.gz")
    checkpoint = open_checkpoint(tmp_path / "m.tar.gz")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match=r"m\.tar\.gz:efficientdet-d0/model is closed"):
        checkpoint["stem/bias"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_nothing_is_left_when_unpacking_stops(
    error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tar_gz(folder, tmp_path / "m.tar.gz")
    real, calls = unpack._copy, []

    def copy(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise error
        real(*args)

    monkeypatch.setattr(unpack, "_copy", copy)
    kind = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(kind, match="No space left on device" if kind is CheckpointError else None):
        open_checkpoint(tmp_path / "m.tar.gz")


def test_no_folder_to_unpack_into(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar_gz(folder, tmp_path / "m.tar.gz")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    with pytest.raises(CheckpointError, match=r"cannot be unpacked into .*absent.*set TMPDIR"):
        open_checkpoint(tmp_path / "m.tar.gz")


# Archives with other contents


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", r"is not an archive: it begins with b'<!DOCTYPE html><'"),
        (b"", "is not an archive"),
        (b"PK\x05\x06" + bytes(18), "holds no weights"),
        (b"\x1f\x8b\x08\x00", "is damaged"),
        (b"PK\x03\x04 and no more", "is damaged"),
    ],
)
def test_files_that_are_not_archives(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "efficientdet-d0.tar.gz"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_gzip_of_something_else(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "model.h5.gz"
    path.write_bytes(gzip.compress(b"\x89HDF\r\n\x1a\n" + bytes(5000)))
    with pytest.raises(CheckpointError, match=r"model\.h5\.gz is damaged"):
        open_checkpoint(path)


def test_no_weights_and_too_many(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "torch.zip", "w") as out:
        out.writestr("archive/data.pkl", b"pickle")
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path / "torch.zip")
    with tarfile.open(tmp_path / "two.tar", "w") as tar:
        tar.add(folder, "run-a")
        tar.add(folder, "run-b")
    with pytest.raises(CheckpointError, match="several checkpoints: run-a, run-b; unpack it"):
        open_checkpoint(tmp_path / "two.tar")


def test_the_error_of_a_missing_data_file_names_the_archive(folder: Path, tmp_path: Path) -> None:
    (folder / "model.data-00000-of-00001").unlink()
    tar_gz(folder, tmp_path / "m.tar.gz")
    with pytest.raises(CheckpointError, match=r"m\.tar\.gz:efficientdet-d0/model\.index exists but"):
        open_checkpoint(tmp_path / "m.tar.gz")


def test_an_error_while_reading_names_the_archive(folder: Path, tmp_path: Path) -> None:
    data = folder / "model.data-00000-of-00001"
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    tar_gz(folder, tmp_path / "m.tar.gz")
    with open_checkpoint(tmp_path / "m.tar.gz") as checkpoint:
        for read in (lambda: dict(checkpoint), lambda: list(checkpoint.read_many(checkpoint))):
            with pytest.raises(CheckpointError, match=r"m\.tar\.gz:efficientdet-d0/model\.data.* is damaged"):
                read()


# Hostile archives

OUTSIDE = [
    "/{outside}/model.index",
    "../{up}/model.index",
    "a/../../../{up}/model.index",
    "..\\x\\model.index",
]


@pytest.mark.parametrize("name", [*OUTSIDE, "C:\\x\\model.index", "C:model.index", "a/" * 40 + "model.index"])
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_no_path_leads_out(name: str, kind: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    name = name.format(outside=str(outside).strip("/"), up="outside")
    path = tmp_path / f"evil.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            add(tar, name, b"evil")
    else:
        with zipfile.ZipFile(path, "w") as out:
            out.writestr(name, b"evil")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        CheckpointError, match=r"evil\.(tar|zip) holds (the path .* which leads out|folders 41)"
    ):
        open_checkpoint(path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE],
)
def test_links_and_devices_are_not_followed(kind: bytes, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.index"
    secret.write_bytes((folder / "model.index").read_bytes())
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folder, folder.name)
        add(tar, "efficientdet-d0/latest", kind=kind, linkname=str(secret))  # not needed, so ignored
    check(path)
    with tarfile.open(path, "w") as tar:
        tar.add(folder / "model.data-00000-of-00001", "d/model.data-00000-of-00001")
        add(tar, "d/model.index", kind=kind, linkname=str(secret))
    with pytest.raises(CheckpointError, match=r"as a link, device|is damaged|not the index"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "names",
    [("d.index", "d.index/e.index"), ("d.index/e.index", "d.index"), ("q" * 300 + ".index",)],
    ids=["a file as folder", "a folder as file", "too long"],
)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_contradict_each_other(names: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    """The message blames the archive, not the disk."""
    path = tmp_path / f"m.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for name in names:
                add(tar, name, b"x")
    else:
        with zipfile.ZipFile(path, "w") as out:
            for name in names:
                out.writestr(name, b"x")
    message = (
        r"m\.(tar|zip) holds '(d|q).*', which cannot be unpacked together with the rest .*; pack it under"
    )
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_a_linked_folder_is_not_written_through(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    with tarfile.open(tmp_path / "l.tar", "w") as tar:
        add(tar, "efficientdet-d0", kind=tarfile.SYMTYPE, linkname=str(outside))
        for file in folder.iterdir():
            tar.add(file, f"efficientdet-d0/{file.name}")
    check(tmp_path / "l.tar")  # a folder was made instead of the link
    assert list(outside.iterdir()) == []


def test_links_in_zip_are_not_followed(folder: Path, tmp_path: Path) -> None:
    zip_stored(folder, tmp_path / "l.zip")
    with zipfile.ZipFile(tmp_path / "l.zip", "a") as out:
        info = zipfile.ZipInfo("efficientdet-d0/other.index")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        out.writestr(info, "/etc/passwd")
    with pytest.raises(CheckpointError, match="as a link, device"):
        open_checkpoint(tmp_path / "l.zip")


@pytest.mark.parametrize("relative", [False, True])
def test_a_state_file_does_not_lead_out(
    relative: bool, folder: Path, tmp_path: Path, temporary: Path
) -> None:
    """The state file in the archive points to a checkpoint on this disk."""
    other = tmp_path / "other" / "secret"
    write_bundle(other, {"secret": np.ones(3, np.float32)})
    named = "../" * 12 + str(other)[1:] if relative else str(other)
    with tarfile.open(tmp_path / "m.tar", "w") as tar:
        tar.add(folder / "model.index", "d/model.index")
        tar.add(folder / "model.data-00000-of-00001", "d/model.data-00000-of-00001")
        add(tar, "d/checkpoint", f'model_checkpoint_path: "{named}"\n'.encode())
    with pytest.raises(CheckpointError, match="which is not in the archive"):
        open_checkpoint(tmp_path / "m.tar")


def test_archives_in_archives_are_not_opened(folder: Path, tmp_path: Path) -> None:
    zip_stored(folder, tmp_path / "inner.zip")
    for name in ("model.index", "model.h5"):
        with zipfile.ZipFile(tmp_path / "outer.zip", "w") as out:
            out.write(tmp_path / "inner.zip", name)
        with pytest.raises(CheckpointError, match=rf"outer\.zip:{name} is an archive in an archive"):
            open_checkpoint(tmp_path / "outer.zip")


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small limits for the tests of bombs: 2 MB are always allowed."""
    monkeypatch.setattr(unpack, "_ALWAYS_ALLOWED", 2_000_000)
    monkeypatch.setattr(unpack, "_HEADER_ROOM", 300_000)
    monkeypatch.setattr(unpack, "_CHUNK", 1 << 14)
    monkeypatch.setattr(unpack, "_MOST_MEMBERS", 500)


def written(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes in the temporary folder, each time that it is removed."""
    sizes: list[int] = []
    real = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        sizes.append(sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file()))
        real(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    return sizes


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("name", ["b.tar.gz", "b.zip"])
def test_a_bomb_is_not_unpacked(
    name: str,
    wanted: bool,
    tmp_path: Path,
    small_limits: None,
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside = "model.h5" if wanted else "events.log"
    if name.endswith("gz"):
        with tarfile.open(tmp_path / name, "w:gz") as tar:
            add(tar, inside, bytes(9_000_000))
    else:
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as out:
            out.writestr(inside, bytes(9_000_000))
    sizes = written(temporary, monkeypatch)
    with pytest.raises(CheckpointError, match="would unpack to more than"):
        open_checkpoint(tmp_path / name)
    assert sizes == [0]


def test_a_zip_that_declares_less_than_it_holds(tmp_path: Path, small_limits: None) -> None:
    path = tmp_path / "b.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("model.h5", bytes(9_000_000))
    data = path.read_bytes()
    assert data.count(struct.pack("<I", 9_000_000)) == 2  # local and central header
    path.write_bytes(data.replace(struct.pack("<I", 9_000_000), struct.pack("<I", 1000)))
    with pytest.raises(CheckpointError, match=r"is damaged: (Bad CRC|.* declares)"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_headers_that_would_fill_the_memory(kind: bytes, tmp_path: Path, small_limits: None) -> None:
    """tarfile reads these completely: megabytes of zeros in a header, from a few compressed kilobytes."""
    with tarfile.open(tmp_path / "h.tar.gz", "w:gz") as tar:
        add(tar, "name", bytes(1_500_000), kind=kind)
        add(tar, "model.h5", b"data")
    with pytest.raises(CheckpointError, match="unpacks to more than it declares"):
        open_checkpoint(tmp_path / "h.tar.gz")


def test_what_follows_the_end_of_a_tar_is_bounded(folder: Path, tmp_path: Path, small_limits: None) -> None:
    import gzip

    tar_dot(folder, tmp_path / "m.tar")
    (tmp_path / "m.tar.gz").write_bytes(gzip.compress((tmp_path / "m.tar").read_bytes() + bytes(50_000_000)))
    with pytest.raises(CheckpointError, match="unpacks to more than it declares"):
        open_checkpoint(tmp_path / "m.tar.gz")


def test_the_size_of_a_sparse_file_is_not_trusted(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("model.h5").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[483:495] = b"%011o\0" % 5000  # the declared size; no bytes are stored
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(CheckpointError, match=r"s\.tar holds 'model\.h5' as a link, device or sparse file"):
        open_checkpoint(tmp_path / "s.tar")


@pytest.mark.parametrize(("name", "message"), [("model.h5", "declares -1 bytes"), ("README", "no weights")])
def test_a_negative_size(name: str, message: str, tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12  # tar's binary form of -1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "n.tar").write_bytes(bytes(header) + bytes(1024))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "n.tar")


def test_a_zip_that_declares_more_than_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "short.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("model.h5", b"abc" * 100)
    path.write_bytes(path.read_bytes().replace(struct.pack("<I", 300), struct.pack("<I", 400)))
    with pytest.raises(CheckpointError, match=r"'model\.h5' declares 400 bytes and has 300"):
        open_checkpoint(path)


def test_a_zip_with_its_directory_before_the_start(folder: Path, tmp_path: Path) -> None:
    zip_stored(folder, tmp_path / "m.zip")
    content = bytearray((tmp_path / "m.zip").read_bytes())
    content[content.rindex(b"PK\x05\x06") + 19] = 255
    (tmp_path / "m.zip").write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"m\.zip is damaged"):
        open_checkpoint(tmp_path / "m.zip")


def test_too_many_members(tmp_path: Path, small_limits: None) -> None:
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as out:
        for index in range(600):
            out.writestr(f"{index}", b"")
    with pytest.raises(CheckpointError, match="holds more than 500 files"):
        open_checkpoint(tmp_path / "many.zip")


def test_an_encrypted_zip(folder: Path, tmp_path: Path) -> None:
    zip_stored(folder, tmp_path / "e.zip")
    data = bytearray((tmp_path / "e.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "e.zip") as out:
        central = out.start_dir
    data[central + 8] |= 1
    (tmp_path / "e.zip").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"e\.zip is encrypted; unpack 'efficientdet-d0/checkpoint'"):
        open_checkpoint(tmp_path / "e.zip")


# Damage: rejected, or nothing was lost


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_stream_of_any_method_is_reported_as_damage(
    folder: Path, tmp_path: Path, method: int
) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w", method) as out:
        out.write(folder / "model.data-00000-of-00001", "model.index")
        size = out.getinfo("model.index").compress_size
    data = bytearray((tmp_path / "m.zip").read_bytes())
    start = data.index(b"model.index") + len("model.index") + 9  # after the header of LZMA
    assert start + 48 < size
    data[start + 3 : start + 40] = b"\xff" * 37
    (tmp_path / "m.zip").write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"m\.zip is damaged: .*; fetch or make the archive again"):
        open_checkpoint(tmp_path / "m.zip")


def read_or_reject(path: Path) -> bool:
    try:
        check(path)
    except EfficientDetError as error:
        message = str(error)
    else:
        return True
    assert str(path.parent / "tmp") not in message
    assert "\n" not in message
    return False


class Contents(dict[str, bytes]):
    """The bytes of each packing. Its own type, so that a failing test does not print them."""

    def __repr__(self) -> str:
        return f"<{len(self)} archives>"


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Contents:
    contents = Contents()
    for name, pack in PACKINGS.items():
        pack(folder, tmp_path / name)
        contents[name] = (tmp_path / name).read_bytes()
    return contents


@pytest.mark.parametrize("name", ["m.tar.gz", "m.tar", "m.zip", "deflated.zip"])
@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_rejected_or_harmless(
    name: str, data: st.DataObject, packed: Contents, tmp_path: Path, temporary: Path
) -> None:
    content = bytearray(packed[name])
    for _ in range(data.draw(st.integers(1, 3), "changes")):
        at = data.draw(st.integers(0, len(content) - 1), "at")
        content[at] = data.draw(st.integers(0, 255), "value")
    (tmp_path / name).write_bytes(bytes(content))
    read_or_reject(tmp_path / name)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("name", ["m.tar.gz", "m.zip", "deflated.zip"])
def test_a_cut_anywhere_is_rejected(name: str, packed: Contents, tmp_path: Path) -> None:
    content = packed[name]
    for length in {*range(0, len(content), max(1, len(content) // 60)), len(content) - 1, len(content) - 9}:
        (tmp_path / name).write_bytes(content[:length])
        assert not read_or_reject(tmp_path / name), length


def test_a_tar_cut_inside_its_members_is_rejected(packed: Contents, tmp_path: Path) -> None:
    """After the last member only padding is lost."""
    content = packed["m.tar"].rstrip(b"\0")
    for length in range(0, len(content), 97):
        (tmp_path / "m.tar").write_bytes(content[:length])
        with tarfile.open(fileobj=io.BytesIO(packed["m.tar"])) as tar:
            last = max(
                i.offset_data + i.size for i in tar if i.name.endswith((".index", "00001", "checkpoint"))
            )
        if length < last:
            assert not read_or_reject(tmp_path / "m.tar"), length


def test_a_broken_header_in_the_middle_is_not_the_end(folder: Path, tmp_path: Path) -> None:
    """tarfile itself would treat it as the end of the archive and lose the newer checkpoint after it."""
    with tarfile.open(tmp_path / "m.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.add(folder / "model.index", "d/model-1.index")
        tar.add(folder / "model.data-00000-of-00001", "d/model-1.data-00000-of-00001")
        tar.add(folder / "model.index", "d/model-2.index")
        tar.add(folder / "model.data-00000-of-00001", "d/model-2.data-00000-of-00001")
    with open_checkpoint(tmp_path / "m.tar") as checkpoint:
        assert checkpoint.source.endswith("model-2")
    content = bytearray((tmp_path / "m.tar").read_bytes())
    content[content.index(b"d/model-2.index") + 130] ^= 1
    (tmp_path / "m.tar").write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="a header in it is broken"):
        open_checkpoint(tmp_path / "m.tar")


@given(st.binary(max_size=3000), st.sampled_from([b"", b"PK\x03\x04", b"\x1f\x8b\x08", b"PK\x05\x06"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_with_the_name_of_an_archive(tmp_path: Path, tail: bytes, head: bytes) -> None:
    path = tmp_path / "x.zip"
    path.write_bytes(head + tail)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


def test_a_pipe_is_not_waited_for(pipe: Path, tmp_path: Path) -> None:
    (tmp_path / "graph.pb").symlink_to(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path / "graph.pb"):
        with pytest.raises(CheckpointError, match="is a pipe or a device, not a file"):
            open_checkpoint(path)


def test_a_folder_with_the_name_of_an_archive(folder: Path, tmp_path: Path) -> None:
    os.rename(folder, tmp_path / "unpacked.tar.gz")
    check(tmp_path / "unpacked.tar.gz")
    with pytest.raises(CheckpointError, match=r"neither .*absent"):
        open_checkpoint(tmp_path / "absent.tar.gz")


@pytest.mark.parametrize(("mode", "packer"), [("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_other_formats_of_archives_are_named(mode: Any, packer: str, tmp_path: Path) -> None:
    write_bundle(tmp_path / "run" / "model", VARIABLES)
    with tarfile.open(tmp_path / "run.packed", mode) as tar:
        tar.add(tmp_path / "run", "run")
    message = rf"run\.packed is packed by {packer}, which is not supported; unpack it, or pack it"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "run.packed")
