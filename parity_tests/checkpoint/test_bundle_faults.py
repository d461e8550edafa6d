"""V2 checkpoints that are damaged, incomplete, ambiguous or something else, and writes that fail."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porting.checkpoint import Checkpoint, open_checkpoint
from porting.checkpoint.v2 import index, snappy, table
from porting.checkpoint.v2.bundle import TensorBundle
from porting.checkpoint.v2.index import read_index
from porting.checkpoint.v2.locate import locate
from porting.checkpoint.v2.writer import _Replacement, write_bundle
from porting.errors import CheckpointError, OutputError
from pytorch_model.formats import wire
from pytorch_model.formats.crc32c import masked_crc32c


def sample() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        f"efficientnet-b0/blocks_{i}/conv2d/kernel": rng.normal(size=(1, 1, 4, i + 1)).astype(np.float32)
        for i in range(20)
    }
    arrays["flag"] = np.array([True, False])
    arrays["global_step"] = np.array(7, np.int64)
    return arrays


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_bundle(tmp_path / "model", sample())
    return tmp_path


def read_all(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return dict(checkpoint)


def message(call: Callable[..., object], *arguments: object) -> str:
    """The sentence that ``call`` fails with: what is wrong, where, what to do."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert ";" in text, "says what is wrong but not what to do"
    return text


def flip(path: Path, position: int, bits: int = 0xFF) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= bits
    path.write_bytes(data)


# Damage


def test_flipped_byte_in_a_tensor_names_file_and_variable(folder: Path) -> None:
    name = "efficientnet-b0/blocks_3/conv2d/kernel"
    entry = read_index(folder / "model.index").entries[name]
    data = folder / "model.data-00000-of-00001"
    flip(data, entry.offset + 5, 0x10)
    text = message(read_all, folder)
    assert str(data) in text
    assert name in text
    assert f"at byte {entry.offset})" in text
    assert "CRC32C" in text
    with open_checkpoint(folder) as checkpoint:  # the others are fine
        intact = set(checkpoint) - {name}
        assert {n for n, a in checkpoint.read_many(intact) if a.tobytes() == sample()[n].tobytes()} == intact


def test_every_flipped_bit_of_an_index_is_detected(tmp_path: Path) -> None:
    write_bundle(tmp_path / "model", {"a/b": np.zeros((2, 3), np.float32), "a/c": np.array(1, np.int64)})
    path = tmp_path / "model.index"
    original = path.read_bytes()
    for position in range(len(original)):
        for bit in range(8):
            flip(path, position, 1 << bit)
            message(read_index, path)
            path.write_bytes(original)


def test_every_truncated_index_is_detected(folder: Path) -> None:
    path = folder / "model.index"
    original = path.read_bytes()
    for size in range(len(original)):
        path.write_bytes(original[:size])
        assert str(path) in message(read_index, path)


def test_truncated_data(folder: Path) -> None:
    data = folder / "model.data-00000-of-00001"
    size = data.stat().st_size
    os.truncate(data, size - 1)
    text = message(open_checkpoint, folder)
    assert f"{data} is cut short: it has {size - 1} bytes" in text
    assert "global_step" in text  # the last one


def test_data_truncated_after_opening(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        os.truncate(folder / "model.data-00000-of-00001", 10)
        assert "bytes too early" in message(dict, checkpoint)


def test_bool_that_is_neither_0_nor_1(folder: Path) -> None:
    index = read_index(folder / "model.index")
    entry = index.entries["flag"]
    flip(folder / "model.data-00000-of-00001", entry.offset, 2)
    raw = (folder / "model.data-00000-of-00001").read_bytes()[entry.offset : entry.offset + entry.size]
    forged = entry._replace(crc32c=masked_crc32c(raw))
    checkpoint = TensorBundle(type(index)(index.path, 1, {"flag": forged}))
    assert "it is a bool but holds the byte 3" in message(lambda: checkpoint["flag"])


def test_missing_shard(tmp_path: Path) -> None:
    write_bundle(tmp_path / "model", sample(), num_shards=3)
    (tmp_path / "model.data-00001-of-00003").unlink()
    assert "data file model.data-00001-of-00003 does not" in message(open_checkpoint, tmp_path)


def test_index_without_data_and_data_without_index(folder: Path) -> None:
    data = folder / "model.data-00000-of-00001"
    away = folder / "away"
    data.rename(away)
    assert len(read_index(folder / "model.index").entries) == len(sample())
    for path in (folder, folder / "model", folder / "model.index", data):
        assert "model.data-00000-of-00001 does not" in message(open_checkpoint, path)
    away.rename(data)
    (folder / "model.index").unlink()
    assert "its index model.index does not" in message(open_checkpoint, data)
    assert "there is no model.index" in message(open_checkpoint, folder)
    (folder / "checkpoint").unlink()
    assert "no file in it ends in .index" in message(open_checkpoint, folder)


@pytest.mark.parametrize(
    "content", [b"", b"just some text\n" * 50, b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(range(256)) * 20]
)
def test_not_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    assert "is not a TensorFlow V2 checkpoint" in message(open_checkpoint, path)
    index = path.rename(tmp_path / "photo.index")
    for given_path in (index, tmp_path, tmp_path / "photo"):
        text = message(open_checkpoint, given_path)
        assert f"{index} is not the index of a TensorFlow checkpoint" in text


def test_missing_path(tmp_path: Path) -> None:
    assert "no file in it ends in .index" in message(open_checkpoint, tmp_path)
    assert "neither" in message(open_checkpoint, tmp_path / "absent")
    assert "does not exist" in message(open_checkpoint, tmp_path / "absent.index")
    assert "neither" in message(open_checkpoint, tmp_path / "absent" / "model")
    for impossible in ("x" * 5000, "a\0b"):
        message(open_checkpoint, impossible)


def test_unreadable(folder: Path) -> None:
    data = folder / "model.data-00000-of-00001"
    data.unlink()
    data.symlink_to(data)
    assert f"{data} cannot be read" in message(open_checkpoint, folder)
    (folder / "model.index").unlink()
    (folder / "model.index").symlink_to(folder / "model.index")
    assert "model.index cannot be read" in message(read_index, folder / "model.index")


# Forged: the checksums are right, but the contents are not


HEADER = wire.int_field(1, 1) + wire.bytes_field(3, wire.int_field(1, 1))


def entry(dtype: int = 1, shape: tuple[int, ...] = (2,), size: int = 8, **fields: int) -> bytes:
    dims = b"".join(wire.bytes_field(2, wire.int_field(1, n % (1 << 64))) for n in shape)
    return (
        wire.int_field(1, dtype)
        + wire.bytes_field(2, dims)
        + wire.int_field(3, fields.get("shard", 0) % (1 << 64))
        + wire.int_field(4, fields.get("offset", 0) % (1 << 64))
        + wire.int_field(5, size % (1 << 64))
    )


FORGED: dict[str, tuple[Mapping[bytes, bytes], str]] = {
    "no header": ({b"a": entry()}, "first key is not the header"),
    "nothing": ({}, "holds no header"),
    "big-endian": ({b"": wire.int_field(1, 1) + wire.int_field(2, 1)}, "big-endian"),
    "version": ({b"": HEADER + wire.bytes_field(3, wire.int_field(2, 9))}, "version 9"),
    "shards": ({b"": wire.int_field(1, (1 << 64) - 5)}, "claims -5 data files"),
    "shard": ({b"": HEADER, b"a": entry(shard=1)}, "'a' is wrong: it is in data file 1 of 1"),
    "negative shard": ({b"": HEADER, b"a": entry(shard=-1)}, "data file -1 of 1"),
    "size": ({b"": HEADER, b"a": entry(size=9)}, r"float32 of shape \[2\] does not fill the 9 bytes"),
    "negative size": ({b"": HEADER, b"a": entry(size=-8)}, "claims -8 bytes"),
    "offset": ({b"": HEADER, b"a": entry(offset=-8)}, "at offset -8"),
    "dimension": ({b"": HEADER, b"a": entry(shape=(-2, -1))}, "dimension 0 is -2"),
    "rank": ({b"": HEADER, b"a": entry(shape=(1,) * 33 + (2,))}, "has more than 32 dimensions"),
    "name": ({b"": HEADER, b"\xff": entry()}, "not UTF-8"),
    "type": ({b"": HEADER, b"a": wire.bytes_field(1, b"x")}, "holds bytes instead of a number"),
    "group": ({b"": HEADER, b"a": b"\x0b"}, "unknown wire type 3"),
    "length": ({b"": HEADER, b"a": b"\x12\xff\xff\xff\xff\x0f"}, "runs past the end of its message"),
    "field": ({b"": HEADER, b"a": b"\x00\x01"}, "field number 0 is not allowed"),
    "number for bytes": ({b"": HEADER, b"a": wire.int_field(2, 1)}, "holds a number instead of bytes"),
    "unknown rank": ({b"": HEADER, b"a": wire.bytes_field(2, wire.int_field(3, 1))}, "rank is unknown"),
    "65 bits": ({b"": HEADER, b"a": b"\x08" + b"\xff" * 9 + b"\x02"}, "exceeds 64 bits"),
    "long name": ({b"": HEADER, b"a" * 9999: entry(size=9)}, "'a{200}…' is wrong"),
    "varint": ({b"": HEADER, b"a": b"\x08" + b"\xff" * 11}, "longer than 10 bytes"),
}


@pytest.mark.parametrize(("items", "reason"), FORGED.values(), ids=list(FORGED))
def test_forged_index(tmp_path: Path, items: Mapping[bytes, bytes], reason: str) -> None:
    path = tmp_path / "model.index"
    path.write_bytes(table.write_table(sorted(items.items())))
    with pytest.raises(CheckpointError, match=reason):
        read_index(path)


def test_long_shapes_are_not_kept_in_memory() -> None:
    """A compressed index of a few megabytes could hold a gigabyte of them."""
    shape = wire.bytes_field(2, wire.int_field(1, 2)) + wire.bytes_field(9, bytes(1000))
    before = index._cached_shape.cache_info()
    message = wire.int_field(1, 1) + wire.bytes_field(2, shape) + wire.int_field(5, 8)
    assert index._read_entry(message).shape == (2,)
    assert index._cached_shape.cache_info() == before


def test_huge_claims_allocate_nothing(tmp_path: Path) -> None:
    size = 1 << 62
    items = {b"": HEADER, b"a": entry(shape=(size // 4,), size=size), b"b": entry(shape=(0, size), size=0)}
    (tmp_path / "model.index").write_bytes(table.write_table(sorted(items.items())))
    data = tmp_path / "model.data-00000-of-00001"
    data.write_bytes(b"")
    assert "is cut short: it has 0 bytes" in message(open_checkpoint, tmp_path)
    with open(data, "wb") as file:
        file.truncate(1 << 42)  # sparse
    assert "is cut short" in message(open_checkpoint, tmp_path)
    index = read_index(tmp_path / "model.index")
    checkpoint = TensorBundle(type(index)(index.path, 1, {"b": index.entries["b"]}))
    assert "does not fit in memory" in message(lambda: checkpoint["b"])


@pytest.mark.parametrize("claimed", [3, 5, 1 << 40])
def test_string_of_another_length(tmp_path: Path, claimed: int) -> None:
    fixed = claimed.to_bytes(4 if claimed < 1 << 32 else 8, "little")
    rest = bytes(4) + b"text"
    raw = wire.write_varint(claimed) + rest
    crc = masked_crc32c(fixed + rest)
    string = entry(dtype=7, shape=(), size=len(raw)) + wire.fixed32_field(6, crc)
    (tmp_path / "model.index").write_bytes(table.write_table([(b"", HEADER), (b"s", string)]))
    (tmp_path / "model.data-00000-of-00001").write_bytes(raw)
    with open_checkpoint(tmp_path) as checkpoint:
        assert isinstance(checkpoint, TensorBundle)
        assert f"its string of {claimed} bytes does not fill" in message(checkpoint.read_string, "s")


def test_every_flipped_bit_of_a_string_is_detected(tmp_path: Path) -> None:
    text = b"an object graph, say" * 10
    length = len(text).to_bytes(4, "little")
    length_crc = masked_crc32c(length).to_bytes(4, "little")
    crc = masked_crc32c(length + length_crc + text)
    raw = wire.write_varint(len(text)) + length_crc + text
    string = entry(dtype=7, shape=(), size=len(raw)) + wire.fixed32_field(6, crc)
    (tmp_path / "model.index").write_bytes(table.write_table([(b"", HEADER), (b"s", string)]))
    data = tmp_path / "model.data-00000-of-00001"
    data.write_bytes(raw)
    with open_checkpoint(tmp_path) as checkpoint:
        assert isinstance(checkpoint, TensorBundle)
        assert checkpoint.read_string("s") == text
        for position in range(len(raw)):
            for bit in range(8):
                flip(data, position, 1 << bit)
                assert f"{data} is damaged at variable 's'" in message(checkpoint.read_string, "s")
                data.write_bytes(raw)


def blocks(data: bytes) -> Iterator[tuple[int, int]]:
    """(offset, size) of the blocks of a table that we wrote, found by their checksums."""
    start = 0
    for stop in range(len(data) - 4):
        crc = int.from_bytes(data[stop + 1 : stop + 5], "little")
        if crc == masked_crc32c(data[start : stop + 1]):
            yield start, stop - start
            start = stop + 5


def reseal(data: bytearray, offset: int, size: int) -> None:
    crc = masked_crc32c(bytes(data[offset : offset + size + 1]))
    data[offset + size + 1 : offset + size + 5] = crc.to_bytes(4, "little")


@pytest.mark.parametrize("seed", range(4))
def test_mutated_index_with_good_checksums(folder: Path, seed: int) -> None:
    """Random damage with new, correct checksums reaches the parsers: it is rejected, or read."""
    rng = random.Random(seed)
    path = folder / "model.index"
    original = path.read_bytes()
    layout = list(blocks(original))
    assert len(layout) == 3  # data, metaindex, index
    outcomes = set()
    for _ in range(250):
        data = bytearray(original)
        offset, size = rng.choice(layout)
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[offset + rng.randrange(size + 1)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        reseal(data, offset, size)
        path.write_bytes(data)
        try:
            read_all(folder)
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("rejected")
    assert outcomes == {"read", "rejected"}


@pytest.mark.parametrize("seed", range(2))
def test_mutated_files(folder: Path, seed: int) -> None:
    """Random damage to either file: a CheckpointError or exactly the same arrays."""
    rng = random.Random(seed)
    paths = [folder / "model.index", folder / "model.data-00000-of-00001"]
    originals = [path.read_bytes() for path in paths]
    expected = sample()
    rejected = 0
    for _ in range(200):
        which = rng.randrange(2)
        data = bytearray(originals[which])
        at, length = rng.randrange(len(data)), rng.randrange(1, 9)
        change = rng.choice(["overwrite", "delete", "insert", "truncate"])
        if change == "overwrite":
            data[at : at + length] = rng.randbytes(length)
        elif change == "delete":
            del data[at : at + length]
        elif change == "insert":
            data[at:at] = rng.randbytes(length)
        else:
            del data[at:]
        paths[which].write_bytes(data)
        try:
            arrays = read_all(folder)
        except CheckpointError:
            rejected += 1
        else:
            assert {n: a.tobytes() for n, a in arrays.items()} == {
                n: a.tobytes() for n, a in expected.items()
            }
        paths[which].write_bytes(originals[which])
    assert rejected > 150


@given(st.binary(max_size=200))
def test_snappy_garbage(data: bytes) -> None:
    with suppress(wire.Malformed):
        assert len(snappy.decompress(data)) <= 22 * len(data)


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b"\xff\xff\xff\xff\x0f" + bytes(20), "claims 4294967295 bytes, more than any block"),
        (b"\x01\x08abc", "holds 3 bytes, not the 1"),
        (b"\x05\x02\x01\x00", "reaches back 1 bytes of 0"),
        (b"\x05\x00a\x06\x00\x00", "reaches back 0 bytes of 1"),
        (b"\x01\x08a", "literal runs past the end"),
        (b"\x01\xf4\x01", "element runs past the end"),
        (b"\x05\x00a\x02\x01", "element runs past the end"),
    ],
)
def test_snappy_rejects(stream: bytes, reason: str) -> None:
    with pytest.raises(wire.Malformed, match=reason):
        snappy.decompress(stream)


@given(st.binary(max_size=60))
def test_wire_garbage(data: bytes) -> None:
    with suppress(wire.Malformed):
        assert sum(1 for _ in wire.read_fields(data)) <= len(data)


def raw_block(*entries: tuple[int, bytes, bytes], restarts: tuple[int, ...] = (0,)) -> bytes:
    """A block from (bytes shared with the key before, rest of the key, value) and restart offsets."""
    body = b"".join(bytes([shared, len(rest), len(value)]) + rest + value for shared, rest, value in entries)
    return body + b"".join(n.to_bytes(4, "little") for n in (*restarts, len(restarts)))


EMPTY = raw_block()


def raw_table(
    *data_blocks: tuple[bytes, bytes], metaindex: bytes = EMPTY, kind: int = 0, handle_tail: bytes = b""
) -> bytes:
    """A table of (separator, block) pairs with correct checksums, for any contents of the blocks."""
    output = bytearray()

    def append(contents: bytes, kind: int = 0) -> bytes:
        handle = wire.write_varint(len(output)) + wire.write_varint(len(contents))
        checked = contents + bytes([kind])
        output.extend(checked + masked_crc32c(checked).to_bytes(4, "little"))
        return handle

    index = [(0, separator, append(block, kind) + handle_tail) for separator, block in data_blocks]
    offsets = [sum(3 + len(key) + len(value) for _, key, value in index[:i]) for i in range(len(index))]
    footer = append(metaindex) + append(raw_block(*index, restarts=tuple(offsets)))
    return bytes(output) + footer.ljust(40, b"\0") + table.MAGIC.to_bytes(8, "little")


A, B = (0, b"a", b"1"), (0, b"b", b"2")  # entries of 5 bytes
LYING_TABLES = {
    "order in a block": (raw_table((b"c", raw_block(B, A))), "keys are out of order"),
    "same key twice": (raw_table((b"c", raw_block(A, A))), "keys are out of order"),
    "order of blocks": (raw_table((b"b", raw_block(B)), (b"c", raw_block(A))), "keys are out of order in"),
    "separator": (raw_table((b"a", raw_block(A, B))), "beyond the one its index entry promises"),
    "next separator": (raw_table((b"b", raw_block(A)), (b"c", raw_block(B))), "keys are out of order in"),
    "restart astray": (raw_table((b"c", raw_block(A, B, restarts=(0, 4)))), "not the start of an entry"),
    "restart order": (raw_table((b"c", raw_block(A, B, restarts=(0, 5, 5)))), "restart points are out of"),
    "first restart": (raw_table((b"c", raw_block(A, B, restarts=(5,)))), "restart points are out of"),
    "restart outside": (raw_table((b"c", raw_block(A, restarts=(0, 5)))), "restart point is outside"),
    "restart in nothing": (raw_table((b"c", raw_block(restarts=(0, 1)))), "restart point is outside"),
    "shared at restart": (
        raw_table((b"c", raw_block(A, (1, b"b", b"2"), restarts=(0, 5)))),
        "an entry does not fit",
    ),
    "shared of nothing": (raw_table((b"c", raw_block(A, (2, b"b", b"2")))), "an entry does not fit"),
    "entry too long": (raw_table((b"c", b"\0\x01\x20a" + EMPTY)), "an entry does not fit"),
    "no restarts": (raw_table((b"c", bytes(8))), "claims 0 restart points"),
    "many restarts": (raw_table((b"c", bytes(4) + b"\xff" * 4)), "claims 4294967295 restart points"),
    "short": (raw_table((b"c", b"abc")), "it is 3 bytes long"),
    "compression": (raw_table((b"c", raw_block(A)), kind=7), "unknown compression type 7"),
    "metaindex": (raw_table((b"c", raw_block(A)), metaindex=b"\0\x09\0" + EMPTY), "does not fit"),
    "handle": (raw_table((b"c", raw_block(A)), handle_tail=b"\0"), "not a block address"),
}


def test_correct_raw_table_is_read() -> None:
    honest = raw_table((b"a", raw_block(A)), (b"d", raw_block(B, (1, b"c", b"3"), restarts=(0,))))
    assert list(table.read_table(honest)) == [(b"a", b"1"), (b"b", b"2"), (b"bc", b"3")]


@pytest.mark.parametrize(("data", "reason"), LYING_TABLES.values(), ids=list(LYING_TABLES))
def test_wrong_tables_are_rejected(data: bytes, reason: str) -> None:
    with pytest.raises(wire.Malformed, match=reason):
        list(table.read_table(data))


def test_block_past_the_end_is_rejected() -> None:
    """The last bytes of this metaindex block would be in the footer."""
    block = raw_block(A)
    for size in (len(block) + 1, 1 << 63):
        footer = (b"\0" + wire.write_varint(size) + b"\0\0").ljust(40, b"\0") + table.MAGIC.to_bytes(
            8, "little"
        )
        with pytest.raises(wire.Malformed, match="runs past the end of the table"):
            list(table.read_table(block + bytes(5) + footer))


def test_overlapping_blocks_are_rejected() -> None:
    """Many index entries for one block would make the work quadratic."""
    data = bytearray()
    empty = bytes(4) + (1).to_bytes(4, "little")
    handle = table._append_block(data, empty)
    index = table._BlockBuilder(1)
    for key in (b"a", b"b"):
        index.add(key, handle)
    meta = table._append_block(data, empty)
    footer = (meta + table._append_block(data, index.finish())).ljust(40, b"\0") + table.MAGIC.to_bytes(
        8, "little"
    )
    with pytest.raises(wire.Malformed, match="overlaps the one before"):
        list(table.read_table(bytes(data + footer)))


# Choosing a checkpoint


def touch(folder: Path, *prefixes: str, state: str | None = None) -> None:
    for prefix in prefixes:
        path = folder / f"{prefix}.index"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if state is not None:
        (folder / "checkpoint").write_text(state)


def located(path: Path | str, step: int | None = None) -> str:
    return locate(path, step).name.removesuffix(".index")


def test_state_file_decides(tmp_path: Path) -> None:
    steps = ("model.ckpt-9", "model.ckpt-10", "other-11")
    for named in (
        "model.ckpt-9",
        "/gone/on/this/machine/model.ckpt-9",
        "gone/model.ckpt-9",
        r"C:\\gone\\model.ckpt-9",
    ):
        touch(tmp_path, *steps, state=f'all_model_checkpoint_paths: "x"\nmodel_checkpoint_path: "{named}"\n')
        assert located(tmp_path) == located(tmp_path / "checkpoint") == "model.ckpt-9"
        assert located(tmp_path, step=10) == "model.ckpt-10"


def test_state_file_with_other_paths(tmp_path: Path) -> None:
    touch(tmp_path, "sub/model", "elsewhere/model", state='model_checkpoint_path: "sub/model"')
    assert locate(tmp_path, None) == tmp_path / "sub/model.index"
    touch(tmp_path, state=f"model_checkpoint_path: '{tmp_path}/elsewhere/model'")
    assert locate(tmp_path, None) == tmp_path / "elsewhere/model.index"
    touch(tmp_path, "model")  # a copy in the folder has priority
    assert locate(tmp_path, None) == tmp_path / "model.index"


def test_state_file_with_tensorflows_escapes(tmp_path: Path) -> None:
    name = 'mod"èl-3'
    touch(tmp_path, name, "other", state=r'model_checkpoint_path: "mod\"\303\250l-3"')
    assert located(tmp_path) == name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (r"mo\tdel", "mo\tdel"),  # what TensorFlow writes for a tab
        (r"a\nb\rc\'d\\e", "a\nb\rc'd\\e"),
        (r"\x41\X4a\1018\7\a\b\f\v\?", "AJA8\7\a\b\f\v?"),
        (r"\x41\40z", "A z"),
    ],
)
def test_every_escape_of_the_text_format(tmp_path: Path, written: str, name: str) -> None:
    touch(tmp_path, "other", name, state=f'model_checkpoint_path: "{written}"')
    assert located(tmp_path) == name


@pytest.mark.parametrize("escape", [r"\q", r"\xg", r"\0", r"\x00", r"\400", r"\u0041", r"\N"])
def test_escapes_without_a_character(tmp_path: Path, escape: str) -> None:
    touch(tmp_path, "model", "mdel", state=f'model_checkpoint_path: "m{escape}del"')
    text = message(locate, tmp_path, None)
    assert "is not a character of a path; correct the file" in text


def test_state_file_escaped_by_tensorflow(tmp_path: Path) -> None:
    management = pytest.importorskip("tensorflow.python.checkpoint.checkpoint_management")
    for name in ("mo\tdel", "a\nb", 'it\'s "x"', "\x01\x7f8", "m\\odel", "è1"):
        touch(tmp_path, name, "other")
        management.update_checkpoint_state(str(tmp_path), str(tmp_path / name))
        assert located(tmp_path) == name


@pytest.mark.parametrize(
    "state", ["", "garbage\0\xff", "model_checkpoint_path: model", 'model_checkpoint_path: "']
)
def test_not_a_state_file(tmp_path: Path, state: str) -> None:
    touch(tmp_path, "model", state=state)
    assert "no model_checkpoint_path" in message(locate, tmp_path, None)
    assert located(tmp_path / "model") == "model"


def test_state_file_with_a_missing_checkpoint(tmp_path: Path) -> None:
    touch(tmp_path, "model.ckpt-9", state='model_checkpoint_path: "model.ckpt-10"')
    text = message(locate, tmp_path, None)
    assert "names 'model.ckpt-10'" in text
    assert "it holds model.ckpt-9" in text
    inner = tmp_path / "inner"
    touch(tmp_path, "inner")  # an empty name must not lead to this neighbour
    touch(inner, "model", state='model_checkpoint_path: ""')
    assert "names ''" in message(locate, inner, None)


def test_without_state_file(tmp_path: Path) -> None:
    touch(tmp_path, "model.ckpt-9")
    assert located(tmp_path) == "model.ckpt-9"
    touch(tmp_path, "model.ckpt-10")
    assert located(tmp_path) == "model.ckpt-10"  # by number, not by letter
    assert located(tmp_path, step=9) == "model.ckpt-9"
    touch(tmp_path, "emackpt-3")
    text = message(locate, tmp_path, None)
    assert "several checkpoints: emackpt-3, model.ckpt-9, model.ckpt-10" in text
    assert "--step" in text
    assert "no step 11" in message(locate, tmp_path, 11)
    touch(tmp_path, "emackpt-9")
    assert "step 9 as emackpt-9, model.ckpt-9" in message(locate, tmp_path, 9)
    assert located(tmp_path / "model.ckpt") == "model.ckpt-10"
    assert located(tmp_path / "model.ckpt", step=9) == "model.ckpt-9"


def test_prefix_with_the_name_of_the_state_file(tmp_path: Path) -> None:
    touch(tmp_path, "checkpoint", "model", state='model_checkpoint_path: "model"')
    assert located(tmp_path / "checkpoint") == "checkpoint"
    assert located(tmp_path) == "model"


def test_prefix_and_files(tmp_path: Path) -> None:
    touch(tmp_path, "model.ckpt-9", "model.ckpt-10", "model.ckpt-9.data-00000-of-00001")
    for suffix in ("", ".index", ".data-00000-of-00002", ".meta"):
        assert located(tmp_path / f"model.ckpt-9{suffix}") == "model.ckpt-9"
    assert located(tmp_path / "model.ckpt-9", step=9) == "model.ckpt-9"
    assert "is not step 10" in message(locate, tmp_path / "model.ckpt-9", 10)


# Writes that fail


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


class Interrupted(Mapping[str, np.ndarray]):
    """A lazy mapping that the user interrupts while its last variable is read."""

    def __iter__(self) -> Iterator[str]:
        return iter(["a", "b"])

    def __len__(self) -> int:
        return 2

    def __getitem__(self, name: str) -> np.ndarray:
        if name == "b":
            raise KeyboardInterrupt
        return np.zeros(3, np.float32)


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "new" / "deep" / "model", Interrupted())
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["^C", "full"]
)
@pytest.mark.parametrize("exists", [False, True])
def test_failure_at_any_rename_restores_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, exists: bool
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    if exists:
        write_bundle(tmp_path / "model", {"old": np.ones(2, np.float32)})
    before = snapshot(tmp_path)
    replace = os.replace
    for after in (False, True):  # the signal may arrive before or after the rename
        for failing_call in range(6 if exists else 3):
            calls = 0

            def failing(
                source: Any, target: Any, after: bool = after, failing_call: int = failing_call
            ) -> None:
                nonlocal calls
                if not Path(source).exists():
                    raise FileNotFoundError(source)
                calls += 1
                if calls - 1 == failing_call and not after:
                    raise failure
                replace(source, target)
                if calls - 1 == failing_call:
                    raise failure

            monkeypatch.setattr(os, "replace", failing)
            with pytest.raises((OutputError, KeyboardInterrupt)):
                write_bundle(tmp_path / "model", sample())
            assert calls > failing_call
            monkeypatch.undo()
            assert snapshot(tmp_path) == before, (after, failing_call)
    write_bundle(tmp_path / "model", sample())
    assert set(read_all(tmp_path)) == set(sample())
    assert len(snapshot(tmp_path)) == 4


def test_failure_to_create_a_file_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "model", {"old": np.ones(2, np.float32)})
    before = snapshot(tmp_path)

    def temporary(self: _Replacement, name: str) -> Path:
        return tmp_path / ("absent" if name.endswith(".index") else "") / f"{name}.new"

    monkeypatch.setattr(_Replacement, "_temporary", temporary)
    with pytest.raises(OutputError, match="No such file"):
        write_bundle(tmp_path / "model", sample())
    assert snapshot(tmp_path) == before


def test_full_disk(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="needs a limit on file sizes")
    write_bundle(tmp_path / "model", {"old": np.ones(2, np.float32)})
    before = snapshot(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match=r"model cannot be written: .*; free some space"):
            write_bundle(tmp_path / "model", {"big": np.zeros(100_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("", np.zeros(1), "'' is not a variable name"),
        ("\0x", np.zeros(1), "is not a variable name"),
        ("\ud800", np.zeros(1), "not valid Unicode"),
        ("x", np.array(["text"]), "variable 'x' has dtype <U4"),
        ("x", np.array([{}], object), "variable 'x' has dtype object"),
        ("x", np.zeros(1, np.complex64), "variable 'x' has dtype complex64"),
    ],
)
def test_unwritable(tmp_path: Path, name: str, array: np.ndarray, reason: str) -> None:
    with pytest.raises(OutputError, match=reason):
        write_bundle(tmp_path / "model", {name: array})
    assert snapshot(tmp_path) == {}


def test_impossible_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "model.index").mkdir()
    for prefix in (tmp_path / "file" / "model", tmp_path / "model", Path("/")):
        before = snapshot(tmp_path)
        with pytest.raises(OutputError):
            write_bundle(prefix, sample())
        assert snapshot(tmp_path) == before


def test_a_checkpoint_may_replace_itself(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        write_bundle(folder / "model", checkpoint)
    assert set(read_all(folder)) == set(sample())


def test_a_damaged_source_is_reported(folder: Path, tmp_path: Path) -> None:
    flip(folder / "model.data-00000-of-00001", 3)
    copy = tmp_path / "copy"
    with open_checkpoint(folder) as checkpoint, pytest.raises(CheckpointError, match="CRC32C"):
        write_bundle(copy / "model", checkpoint)
    assert not copy.exists()


def test_base_class_closes_and_describes(folder: Path) -> None:
    checkpoint: Checkpoint
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.source == str(folder / "model")
        assert checkpoint.format == "TensorFlow V2 checkpoint"
        assert f"{len(sample())} variables" in repr(checkpoint)
    shutil.rmtree(folder)  # nothing is held open
