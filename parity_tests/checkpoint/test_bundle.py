"""V2 checkpoints compared with TensorFlow's reader and writer in both directions, bit by bit."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from parity_tests.helpers.paths import GOLDENS, ROOT, SHARED
from porting.checkpoint import open_checkpoint
from porting.checkpoint.v2 import snappy, table
from porting.checkpoint.v2.bundle import TensorBundle
from porting.checkpoint.v2.index import read_index
from porting.checkpoint.v2.writer import write_bundle
from porting.convert import convert
from porting.errors import CheckpointError, ConversionError
from porting.infer import infer_config
from porting.synthetic import synthetic_checkpoint
from pytorch_model.config import model_config
from pytorch_model.formats import wire

BUNDLES = GOLDENS / "bundle"
REAL = [SHARED / "oracle/checkpoints/efficientdet-d0", SHARED / "lite0/efficientdet-lite0"]
REAL_INDEXES = sorted((SHARED / "checkpoint_index").glob("*/*.index"))
FIXED_DTYPES = [
    np.float16,
    np.float32,
    np.float64,
    np.int8,
    np.int16,
    np.int32,
    np.int64,
    np.uint8,
    np.uint16,
    np.uint32,
    np.uint64,
    np.bool_,
]

real_checkpoints = pytest.mark.parametrize(
    "folder",
    [
        pytest.param(p, id=p.name, marks=pytest.mark.skipif(not p.exists(), reason="outside data absent"))
        for p in REAL
    ],
)
real_indexes = pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=f"{p.parent.name}-{p.stem}") for p in REAL_INDEXES]
    or [pytest.param(None, marks=pytest.mark.skip(reason="outside data absent"))],
)


@pytest.fixture(scope="session")
def tf(tensorflow: Any) -> Any:
    return tensorflow


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray, name: str) -> None:
    assert ours.shape == theirs.shape, name
    assert ours.dtype == theirs.dtype, name
    assert ours.tobytes() == theirs.tobytes(), name


def assert_tensorflow_agrees(tf: Any, prefix: str, ours: dict[str, np.ndarray]) -> None:
    reader = tf.train.load_checkpoint(prefix)
    assert sorted(reader.get_variable_to_shape_map()) == sorted(ours)
    for name, array in ours.items():
        assert_same_bits(array, np.asarray(reader.get_tensor(name)), name)


# Reading files that Google's code wrote


@real_checkpoints
def test_every_variable_equals_tensorflows(tf: Any, folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        arrays = dict(checkpoint.read_many(checkpoint))
        assert_tensorflow_agrees(tf, str(folder / "model"), arrays)
        for name, array in arrays.items():
            assert checkpoint.shapes[name] == array.shape
            assert checkpoint.dtypes[name] == array.dtype
            assert array.flags.owndata
        assert checkpoint.step == arrays["global_step"]


@real_checkpoints
def test_rewriting_reproduces_googles_files_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        write_bundle(tmp_path / "model", checkpoint)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["checkpoint", "model.data-00000-of-00001", "model.index"]
    for name in files:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


@real_indexes
def test_real_index_reads_without_its_data(tf: Any, path: Path) -> None:
    index = read_index(path)
    theirs = tf.train.load_checkpoint(index.prefix)
    shapes = theirs.get_variable_to_shape_map()
    assert {name: list(entry.shape) for name, entry in index.entries.items()} == shapes
    for name, dtype in theirs.get_variable_to_dtype_map().items():
        assert index.entries[name].dtype == dtype.as_datatype_enum, name
    with pytest.raises(CheckpointError, match=r"its data file .*\.data-00000-of-0000\d does not"):
        open_checkpoint(path)


def test_golden_compressed_index() -> None:
    """A public index with snappy-compressed blocks (EfficientDet D1 of the Object Detection API)."""
    path = BUNDLES / "snappy.index"
    entries = read_index(path).entries
    assert len(entries) == 877
    assert path.stat().st_size < sum(map(len, entries))
    name = "model/_feature_extractor/_bifpn_stage/node_input_blocks/0/0/1/0/kernel/.ATTRIBUTES/VARIABLE_VALUE"
    assert entries[name].shape == (1, 1, 320, 88)
    # Every entry is right if together they cover the data file without gaps or overlaps.
    position = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        assert entry.offset == position
        position += entry.size


def test_golden_checkpoint_of_tensorflow() -> None:
    """Written by TensorFlow 2.21 (``SaveV2``): every dtype (-2…3), a string, a partitioned variable."""
    with open_checkpoint(BUNDLES / "tensorflow") as checkpoint:
        assert isinstance(checkpoint, TensorBundle)
        assert set(checkpoint) == {
            *(np.dtype(d).name for d in FIXED_DTYPES),
            *("bfloat16", "empty", "global_step", "part", "string"),
        }
        for dtype in FIXED_DTYPES:
            name = np.dtype(dtype).name
            assert_same_bits(checkpoint[name], (np.arange(6) - 2).reshape(2, 3).astype(dtype), name)
        assert_same_bits(checkpoint["bfloat16"], checkpoint["float32"], "bfloat16")
        assert [note.split(" variables")[0] for note in checkpoint.notes] == [
            "values stored as bfloat16: 1",
            "values stored as float16: 1",
        ]
        assert checkpoint["empty"].shape == (0, 3)
        assert checkpoint.step == 7
        assert checkpoint.read_string("string") == b"text" * 40
        with pytest.raises(CheckpointError, match="'part' is split into slices"):
            checkpoint["part"]


def test_object_graph_bytes_equal_tensorflows(tf: Any, tmp_path: Path) -> None:
    checkpoint = tf.train.Checkpoint(weight=tf.Variable([[1.0, 2.0]]), step=tf.Variable(3, dtype=tf.int64))
    prefix = checkpoint.save(str(tmp_path / "ckpt"))
    name = "_CHECKPOINTABLE_OBJECT_GRAPH"
    ours = TensorBundle(read_index(f"{prefix}.index"))
    assert ours.read_string(name) == tf.train.load_checkpoint(prefix).get_tensor(name)
    assert ours["step/.ATTRIBUTES/VARIABLE_VALUE"] == 3
    with pytest.raises(CheckpointError, match=f"{name}' is of type string"):
        ours[name]
    with pytest.raises(CheckpointError, match="not a single string"):
        ours.read_string("step/.ATTRIBUTES/VARIABLE_VALUE")


def test_saver_sharded(tf: Any, tmp_path: Path) -> None:
    v1 = tf.compat.v1
    with tf.Graph().as_default():
        for device in range(2):
            with v1.device(f"/cpu:{device}"):
                v1.get_variable(f"scope/on_{device}", [3, 4])
        with v1.device("/cpu:0"):
            global_step = v1.train.get_or_create_global_step()
        saver = v1.train.Saver(sharded=True)
        with v1.Session(config=v1.ConfigProto(device_count={"CPU": 2})) as session:
            session.run(v1.global_variables_initializer())
            session.run(global_step.assign(70))
            prefix = saver.save(session, str(tmp_path / "model.ckpt"), global_step=70)
    with open_checkpoint(tmp_path) as checkpoint:
        assert isinstance(checkpoint, TensorBundle)
        assert checkpoint.index.num_shards == 2
        assert {entry.shard for entry in checkpoint.index.entries.values()} == {0, 1}
        assert checkpoint.step == 70
        assert_tensorflow_agrees(tf, prefix, dict(checkpoint))


def test_dtypes_and_unusual_entries_of_tensorflow(tf: Any, tmp_path: Path) -> None:
    plain = {
        "scalar": tf.constant(3, tf.int64),
        "empty": tf.zeros([0, 3]),
        **{np.dtype(d).name: tf.constant(np.arange(6).reshape(2, 3).astype(d)) for d in FIXED_DTYPES},
    }
    halves = np.array([1.5, -0.0, np.inf, np.nan, 1e-40, -3e38], np.float32)
    odd = {
        "bfloat16": tf.cast(halves, tf.bfloat16),
        "strings": tf.constant(["a", "", "c" * 300]),
        "complex": tf.constant(1 + 2j),
    }
    tensors = {**plain, **odd}
    prefix = str(tmp_path / "model")
    tf.raw_ops.SaveV2(
        prefix=prefix,
        tensor_names=[*tensors, "part", "part"],
        shape_and_slices=[""] * len(tensors) + ["4 3 0,2:-", "4 3 2,2:-"],
        tensors=[*tensors.values(), tf.zeros([2, 3]), tf.ones([2, 3])],
    )
    with open_checkpoint(prefix) as checkpoint:
        assert set(checkpoint) == {*tensors, "part"}
        for name, tensor in plain.items():
            assert_same_bits(checkpoint[name], tensor.numpy(), name)
        assert_same_bits(checkpoint["bfloat16"], tf.cast(odd["bfloat16"], tf.float32).numpy(), "bfloat16")
        assert checkpoint.dtypes["bfloat16"] == np.float32
        assert checkpoint.shapes["part"] == (4, 3)
        for name, reason in [
            ("strings", "of type string"),
            ("complex", "of type complex128"),
            ("part", "split into slices"),
        ]:
            assert checkpoint.dtypes[name] == np.dtype(object)
            with pytest.raises(CheckpointError, match=f"{name}' is {reason}"):
                checkpoint[name]
        assert isinstance(checkpoint, TensorBundle)
        with pytest.raises(CheckpointError, match="not a single string"):
            checkpoint.read_string("strings")


# Writing


def sample(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for d in FIXED_DTYPES:
        arrays[f"scope/{np.dtype(d).name}"] = (rng.normal(size=(3, 5)) * 50).astype(d)
    arrays["global_step"] = np.array(1234, np.int64)
    arrays["empty"] = np.zeros((0, 7), np.float32)
    arrays["strided"] = rng.normal(size=(6, 8))[::2, ::-1]
    arrays["big_endian"] = np.arange(5, dtype=">i4")
    arrays["naïve/名前"] = np.array([np.nan, -0.0, np.inf], np.float32)
    return arrays


@pytest.mark.parametrize("num_shards", [1, 3])
def test_tensorflow_reads_what_we_write(tf: Any, tmp_path: Path, num_shards: int) -> None:
    arrays = sample()
    write_bundle(tmp_path / "new" / "model.ckpt-7", arrays, num_shards)
    native = {name: a.astype(a.dtype.newbyteorder("=")) for name, a in arrays.items()}
    prefix = tf.train.latest_checkpoint(str(tmp_path / "new"))
    assert prefix == str(tmp_path / "new" / "model.ckpt-7")
    assert_tensorflow_agrees(tf, prefix, native)
    with open_checkpoint(tmp_path / "new") as checkpoint:
        assert checkpoint.step == 1234
        assert_tensorflow_agrees(tf, prefix, dict(checkpoint))


def test_index_of_many_blocks(tf: Any, tmp_path: Path) -> None:
    """Enough names for several blocks: TensorFlow reads our index and writes the same bytes."""
    names = sorted(f"scope_{i % 7}/layer_{i}/" + "long_name_" * 20 for i in range(3000))
    arrays = {name: np.full((2,), i, np.float32) for i, name in enumerate(names)}
    write_bundle(tmp_path / "ours", arrays)
    assert_tensorflow_agrees(tf, str(tmp_path / "ours"), dict(open_checkpoint(tmp_path / "ours")))
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "theirs"),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(arrays[name]) for name in names],
    )
    ours = (tmp_path / "ours.index").read_bytes()
    assert len(ours) > 3 * 262144 / 2
    assert ours == (tmp_path / "theirs.index").read_bytes()


NAMES = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda name: not name.startswith("\0"))
ARRAYS = hnp.arrays(
    st.sampled_from([np.dtype(d) for d in FIXED_DTYPES]), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0)
)
VARIABLES = st.dictionaries(NAMES, ARRAYS, max_size=12)


@given(VARIABLES, st.integers(1, 3))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path: Path, variables: dict[str, np.ndarray], num_shards: int) -> None:
    write_bundle(tmp_path / "model", variables, num_shards)
    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert list(checkpoint) == sorted(variables, key=str.encode)
        for name, array in checkpoint.read_many(variables):
            assert_same_bits(array, variables[name], name)


@given(VARIABLES.filter(bool))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip_through_tensorflow(tf: Any, tmp_path: Path, variables: dict[str, np.ndarray]) -> None:
    write_bundle(tmp_path / "model", variables)
    assert_tensorflow_agrees(tf, str(tmp_path / "model"), variables)


# The mapping


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    write_bundle(tmp_path / "model", sample(), num_shards=2)
    with open_checkpoint(tmp_path) as opened:
        yield opened


def test_the_mapping_reads_values_only_on_lookup(
    checkpoint: TensorBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorBundle, "_read", lambda *_: pytest.fail("read data"))
    assert "strided" in checkpoint
    assert "absent" not in checkpoint
    assert len(checkpoint) == len(sample()) == len(list(checkpoint.keys()))
    assert checkpoint.shapes["strided"] == (3, 8)
    assert checkpoint.get("absent") is None
    with pytest.raises(KeyError):
        list(checkpoint.read_many(["absent"]))


def test_read_many_follows_the_file(checkpoint: TensorBundle) -> None:
    names = [name for name, _ in checkpoint.read_many(reversed(list(checkpoint)))]
    places = [checkpoint.index.entries[name][2:4] for name in names]
    assert places == sorted(places)
    assert len(names) == len(checkpoint)


def test_arrays_own_their_memory(checkpoint: TensorBundle) -> None:
    first = checkpoint["strided"]
    first[:] = 0
    assert checkpoint["strided"].any()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="is closed; open it again"):
        checkpoint["strided"]


@pytest.mark.parametrize("value", [None, np.zeros(2, np.int64), np.array(1.5, np.float32)])
def test_step_is_none_unless_a_scalar_integer(tmp_path: Path, value: np.ndarray | None) -> None:
    write_bundle(tmp_path / "model", {} if value is None else {"global_step": value})
    with open_checkpoint(tmp_path / "model") as checkpoint:
        assert checkpoint.step is None


def second_model(content: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Under the names of a model that is the second of its process."""
    stem = re.compile(r"/stem/(conv2d|tpu_batch_normalization)/")
    return {stem.sub(r"/stem_1/\1_1/", name): value for name, value in content.items()}


def test_second_model_in_one_process(tmp_path: Path) -> None:
    config = model_config("efficientdet-lite0", num_classes=2, fpn_cell_repeats=1, box_class_repeats=1)
    content = synthetic_checkpoint(config, momentum=True)
    write_bundle(tmp_path / "model", second_model(content))
    assert "efficientnet-lite0/stem_1/conv2d_1/kernel/ExponentialMovingAverage" in second_model(content)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.keys() == content.keys()
        assert checkpoint.format == "TensorFlow V2 checkpoint"
        assert checkpoint.notes == (
            "5 variables of the stem were saved by a second model in one process; renamed",
        )
        found = convert(checkpoint, infer_config(checkpoint.shapes).config)
    write_bundle(tmp_path / "plain", content)
    with open_checkpoint(tmp_path / "plain") as checkpoint:
        assert found.digest == convert(checkpoint, found.config).digest


def test_two_models_in_one_checkpoint_stay_two(tmp_path: Path) -> None:
    config = model_config("efficientdet-lite0", num_classes=2, fpn_cell_repeats=1, box_class_repeats=1)
    content = synthetic_checkpoint(config)
    write_bundle(tmp_path / "model", content | second_model(content))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.notes == ()
        with pytest.raises(ConversionError, match=r"two models were built in one graph: .*/stem_1/"):
            infer_config(checkpoint.shapes)


def test_reading_does_not_import_tensorflow(tmp_path: Path) -> None:
    write_bundle(tmp_path / "model", {"a": np.ones(3, np.float32)})
    code = (
        "import sys; from porting.checkpoint import open_checkpoint; "
        f"assert open_checkpoint({str(tmp_path)!r})['a'].sum() == 3; "
        "sys.exit(any(m in sys.modules for m in ('tensorflow', 'h5py', 'keras')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# The small formats inside


@st.composite
def snappy_streams(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """(compressed, plain): random literals and copies of every encoding, expanded by a byte-wise model."""
    plain, stream = bytearray(), bytearray()
    for _ in range(draw(st.integers(0, 12))):
        if not plain or draw(st.booleans()):
            text = draw(st.binary(min_size=1, max_size=70))
            extra = draw(st.sampled_from([n for n in range(5) if len(text) - 1 < (60 if n == 0 else 256**n)]))
            if extra:
                stream += bytes([(59 + extra) << 2]) + (len(text) - 1).to_bytes(extra, "little")
            else:
                stream.append((len(text) - 1) << 2)
            stream += text
            plain += text
            continue
        kind = draw(st.sampled_from([1, 2, 3]))
        size = draw(st.integers(4, 11) if kind == 1 else st.integers(1, 64))
        offset = draw(st.integers(1, min(len(plain), 2047)))
        if kind == 1:
            stream += bytes([(offset >> 8) << 5 | (size - 4) << 2 | 1, offset & 0xFF])
        else:
            stream += bytes([(size - 1) << 2 | kind]) + offset.to_bytes(2 if kind == 2 else 4, "little")
        for _ in range(size):
            plain.append(plain[-offset])
    return wire.write_varint(len(plain)) + bytes(stream), bytes(plain)


@given(snappy_streams())
def test_snappy(case: tuple[bytes, bytes]) -> None:
    compressed, plain = case
    assert snappy.decompress(compressed) == plain


@example({b"az": b"", b"b": b""}, 1)  # there is no shorter key between the two
@given(st.dictionaries(st.binary(max_size=12), st.binary(max_size=40), max_size=80), st.integers(30, 400))
def test_table_round_trip(items: dict[bytes, bytes], block_size: int) -> None:
    ordered = sorted(items.items())
    assert list(table.read_table(table.write_table(ordered, block_size))) == ordered


@given(st.integers(0, 2**64 - 1), st.binary(max_size=3))
def test_varint_round_trip(value: int, rest: bytes) -> None:
    encoded = wire.write_varint(value)
    assert wire.read_varint(encoded + rest, 0) == (value, len(encoded))
