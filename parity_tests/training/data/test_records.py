"""TFRecord files: what our writer writes is read back; every damaged byte is named."""

from __future__ import annotations

import errno
import gzip
import os
import pickle
import random
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.training.data.written_data import record, write_records
from pytorch_model.evaluation.dataset import DatasetError
from pytorch_model.formats.crc32c import masked_crc32c
from pytorch_model.training.data.records import RecordFile, holds_records


def read_all(path: Path) -> list[bytes]:
    file = RecordFile(path)
    return [file.read(index) for index in range(len(file))]


def refusal(path: Path) -> str:
    with pytest.raises(DatasetError) as raised:
        read_all(path)
    return str(raised.value)


@given(records=st.lists(st.binary(max_size=300), max_size=8), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_records_are_read_back_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes], order: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("records")
    for name in ("plain.tfrecord", "packed.tfrecord.gz"):
        file = RecordFile(write_records(folder / name, records))
        indices = list(range(len(records)))
        order.shuffle(indices)
        assert len(file) == len(records)
        assert [file.read(index) for index in indices] == [records[index] for index in indices]


def test_every_flipped_byte_is_named(tmp_path: Path) -> None:
    records = [b"", b"ant", bytes(range(40))]
    starts = [0, len(record(records[0])), len(record(records[0]) + record(records[1]))]
    path = write_records(tmp_path / "x.tfrecord", records)
    good = path.read_bytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        number = sum(start <= position for start in starts)
        assert f"{path}, record {number} at byte {starts[number - 1]}, is damaged: " in refusal(path)


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    path = write_records(tmp_path / "x.tfrecord", [b"ant", b"bee"])
    good = path.read_bytes()
    whole = len(record(b"ant"))
    for size in range(1, len(good)):
        path.write_bytes(good[:size])
        if size != whole:
            assert f"record {1 + (size > whole)} at byte {whole * (size > whole)}, is damaged" in refusal(
                path
            )


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    records = [os.urandom(200), b"bee" * 100]
    path = write_records(tmp_path / "x.tfrecord.gz", records)
    good = path.read_bytes()
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with suppress(DatasetError) if position < 10 else pytest.raises(DatasetError) as raised:
            assert read_all(path) == records  # a byte of the header may mean nothing, such as the time
        if raised is not None:
            message = str(raised.value)
            assert str(path) in message
            assert "is a damaged GZIP file: " in message or "is damaged: " in message
    path.write_bytes(good[:-10])
    assert "is a damaged GZIP file: " in refusal(path)
    path.write_bytes(gzip.compress(record(b"ant") + record(b"bee")[:-1]))
    assert (
        f"record 2 at byte {len(record(b'ant'))} of the unpacked data, is damaged: the file ends"
        in refusal(path)
    )


def test_a_record_is_not_longer_than_its_limit(tmp_path: Path) -> None:
    length = struct.pack("<Q", (1 << 31) + 1)
    path = tmp_path / "x.tfrecord"
    path.write_bytes(length + struct.pack("<I", masked_crc32c(length)))
    os.truncate(path, (1 << 31) + 100)  # sparse
    assert "it has 2,147,483,649 bytes, protocol buffers may have 2,147,483,648" in refusal(path)


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = write_records(tmp_path / "x.tfrecord", [b"ant", b"bee"])
    file = RecordFile(path)
    write_records(path, [b"other", b"bee"])
    with pytest.raises(DatasetError, match=r"record 1 at byte 0, is damaged: the file has changed since"):
        file.read(0)
    path.unlink()
    with pytest.raises(DatasetError, match="cannot be read: No such file"):
        file.read(0)


def test_what_cannot_hold_records(tmp_path: Path, pipe: Path) -> None:
    assert "it is a pipe or a device" in refusal(pipe)
    assert not holds_records(pipe)
    assert "Is a directory" in refusal(tmp_path)
    assert "cannot be read: " in refusal(tmp_path / ("x" * 300))
    text = tmp_path / "x.txt"
    text.write_text("a text of more than twelve bytes")
    assert "record 1 at byte 0, is damaged: the checksum of its length is wrong" in refusal(text)
    assert not holds_records(text)
    (tmp_path / "cut.gz").write_bytes(gzip.compress(record(b"ant"))[:12])
    assert not holds_records(tmp_path / "cut.gz")
    for name in ("x.tfrecord", "x.tfrecord.gz"):
        assert holds_records(write_records(tmp_path / name, [b"ant"]))


def test_a_plain_file_may_begin_like_gzip(tmp_path: Path) -> None:
    data = bytes(0x088B1F)
    assert record(data).startswith(b"\x1f\x8b\x08")
    assert read_all(write_records(tmp_path / "x.tfrecord", [data])) == [data]


def test_a_gzip_file_is_read_by_processes_of_their_own(tmp_path: Path) -> None:
    file = RecordFile(write_records(tmp_path / "x.tfrecord.gz", [b"ant", b"bee"]))
    assert pickle.loads(pickle.dumps(file)).read(1) == b"bee"


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "let TMPDIR name another folder"), (errno.EIO, "Input")]
)
def test_no_space_to_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    path = write_records(tmp_path / "x.tfrecord.gz", [b"ant"])
    monkeypatch.setattr(shutil, "copyfileobj", refuse)
    assert words in refusal(path)
