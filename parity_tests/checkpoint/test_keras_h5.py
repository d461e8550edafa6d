"""Keras HDF5 weights: Google's own file, files of every configuration, and hostile ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parity_tests.helpers.configs import configs
from parity_tests.helpers.object_trees import LISTED, keras_names, save_h5
from parity_tests.helpers.recordings import shared_recording
from parity_tests.helpers.small_models import seeded, tiny
from porting.checkpoint import open_checkpoint
from porting.checkpoint.base import read_head
from porting.checkpoint.keras_h5 import KerasH5, is_h5
from porting.convert import convert, variables_digest
from porting.errors import CheckpointError
from porting.infer import infer_config
from pytorch_model.config import EfficientDetConfig, model_config
from tf_reference.variables import variable_shapes

h5py = pytest.importorskip("h5py", reason="needs h5py: pip install -e '.[h5]'")


def h5_paths(config: EfficientDetConfig) -> dict[str, str]:
    """AutoML name → path in the file: the group of the layer, then the name of the variable."""
    return {name: f"{name.split('/')[0]}/{name}:0" for name in variable_shapes(config)}


# --- files that Google wrote ---------------------------------------------------------------------------


def test_google_weights_are_the_ema_values(shared: Path) -> None:
    expected = shared_recording("efficientdet-lite0", 128).variables()
    path = shared / "oracle/checkpoints/keras-lite0/efficientdet-lite0.h5"
    with open_checkpoint(path) as checkpoint:
        assert isinstance(checkpoint, KerasH5)
        assert checkpoint.notes == ()
        assert checkpoint.step is None
        assert checkpoint.keys() == expected.keys()
        for name, array in checkpoint.read_many(checkpoint):
            assert array.dtype == np.float32 == checkpoint.dtypes[name]
            assert array.shape == checkpoint.shapes[name] == expected[name].shape, name
            assert array.tobytes() == expected[name].tobytes(), name
            assert array.flags.owndata, name


def test_google_weights_convert(shared: Path) -> None:
    with open_checkpoint(shared / "oracle/checkpoints/keras-lite0/efficientdet-lite0.h5") as checkpoint:
        config = infer_config(checkpoint.shapes, checkpoint.source).config
        assert config == model_config("efficientdet-lite0")
        conversion = convert(checkpoint, config)
    assert conversion.values_kind == "raw"
    assert conversion.digest == variables_digest(shared_recording("efficientdet-lite0", 128).variables())


@pytest.mark.parametrize("model", LISTED)
def test_listed_datasets_are_the_whole_model(model: str) -> None:
    """The files of the tests below have the same paths and shapes as Google's model."""
    config = model_config(model)
    paths, shapes = h5_paths(config), variable_shapes(config)
    assert {paths[name]: list(shape) for name, shape in shapes.items()} == keras_names()[f"{model}/h5"]


# --- any configuration ----------------------------------------------------------------------------------


@given(configs(), st.sampled_from([3, 50, 10**6]))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_names_and_back(tmp_path: Path, config: EfficientDetConfig, piece: int) -> None:
    """AutoML name → path in the file → AutoML name. The lists of names are in pieces, as D7x needs."""
    values = seeded(config)
    path = tmp_path / "weights.h5"
    save_h5(path, values, piece)
    with h5py.File(path) as file:
        for name, inside in h5_paths(config).items():
            assert file[inside].shape == values[name].shape
    with open_checkpoint(path) as checkpoint:
        assert {name: array.tobytes() for name, array in checkpoint.items()} == {
            name: value.tobytes() for name, value in values.items()
        }


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_float_types(tmp_path: Path, dtype: str) -> None:
    value = np.arange(6).reshape(2, 3).astype(dtype)
    save_h5(tmp_path / "w.h5", {"a/kernel": value})
    with open_checkpoint(tmp_path / "w.h5") as checkpoint:
        array = checkpoint["a/kernel"]
        assert array.dtype == np.dtype(dtype).newbyteorder("=") == checkpoint.dtypes["a/kernel"]
        np.testing.assert_array_equal(array, value)


def test_compressed_and_chunked(tmp_path: Path) -> None:
    values = seeded(tiny())
    save_h5(tmp_path / "w.h5", values)
    name = "box_net/box-0/pointwise_kernel"
    with h5py.File(tmp_path / "w.h5", "r+") as file:
        group = file["box_net"]
        del group[f"{name}:0"]
        group.create_dataset(f"{name}:0", data=values[name], chunks=(1, 1, 10, 10), compression="gzip")
    with open_checkpoint(tmp_path / "w.h5") as checkpoint:
        assert checkpoint[name].tobytes() == values[name].tobytes()


def test_weights_of_a_whole_model(tmp_path: Path) -> None:
    save_h5(tmp_path / "w.h5", {"a/kernel": np.ones(3, np.float32)})
    with h5py.File(tmp_path / "w.h5") as weights, h5py.File(tmp_path / "model.h5", "w") as whole:
        group = whole.create_group("model_weights")
        for key, value in weights.attrs.items():
            group.attrs[key] = value
        for layer in weights:
            weights.copy(layer, group)
        whole.create_group("optimizer_weights")
    with open_checkpoint(tmp_path / "model.h5") as checkpoint:
        assert list(checkpoint) == ["a/kernel"]
        assert checkpoint.notes == (
            "only the model's weights were taken from a file that holds the whole model",
        )


def test_second_model_in_one_process(tmp_path: Path) -> None:
    values = seeded(tiny())
    counted = {
        name.replace("/stem/conv2d/", "/stem_1/conv2d_1/").replace(
            "/stem/tpu_batch_normalization/", "/stem_1/tpu_batch_normalization_1/"
        ): value
        for name, value in values.items()
    }
    save_h5(tmp_path / "w.h5", counted)
    with open_checkpoint(tmp_path / "w.h5") as checkpoint:
        assert checkpoint.keys() == values.keys()
        assert checkpoint["efficientnet-b0/stem/conv2d/kernel"].tobytes() == (
            values["efficientnet-b0/stem/conv2d/kernel"].tobytes()
        )
        assert checkpoint.notes == (
            "5 variables of the stem were saved by a second model in one process; renamed",
        )


def test_two_stems_stay_two(tmp_path: Path) -> None:
    names = ["efficientnet-b0/stem/conv2d/kernel", "efficientnet-b0/stem_1/conv2d_1/kernel"]
    save_h5(tmp_path / "w.h5", {name: np.ones(3, np.float32) for name in names})
    with open_checkpoint(tmp_path / "w.h5") as checkpoint:
        assert list(checkpoint) == names


def test_values_are_read_only_on_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_h5(tmp_path / "w.h5", {"a/kernel": np.ones(3, np.float32)})

    def never(*_: object) -> None:
        raise AssertionError("read")

    with open_checkpoint(tmp_path / "w.h5") as checkpoint:
        monkeypatch.setattr(h5py.Dataset, "__getitem__", never)
        assert checkpoint.shapes == {"a/kernel": (3,)}
        with pytest.raises(CheckpointError, match="damaged: read"):
            checkpoint["a/kernel"]


def test_closed(tmp_path: Path) -> None:
    save_h5(tmp_path / "w.h5", {"a/kernel": np.ones(3, np.float32)})
    checkpoint = open_checkpoint(tmp_path / "w.h5")
    checkpoint.close()
    checkpoint.close()
    with pytest.raises(CheckpointError, match="is closed; open it again"):
        checkpoint["a/kernel"]


def test_without_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_h5(tmp_path / "w.h5", {"a/kernel": np.ones(3, np.float32)})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(CheckpointError, match=r"needs h5py: pip install 'efficientdet-porting\[h5\]'"):
        open_checkpoint(tmp_path / "w.h5")


# --- files that must be rejected -------------------------------------------------------------------------


def external_link(file: Any, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["x"] = np.ones(3, np.float32)
    del file["a"]["a/kernel:0"]
    file["a"]["a/kernel:0"] = h5py.ExternalLink("other.h5", "x")


def external_group(file: Any, folder: Path) -> None:
    del file["a"]
    file["a"] = h5py.ExternalLink("other.h5", "/")


def soft_link(file: Any, folder: Path) -> None:
    del file["a"]["a/kernel:0"]
    file["a"]["a/kernel:0"] = h5py.SoftLink("/b/b/kernel:0")


def external_storage(file: Any, folder: Path) -> None:
    (folder / "raw").write_bytes(bytes(64))
    del file["a"]["a/kernel:0"]
    file["a"].create_dataset(
        "a/kernel:0", (3,), "f4", external=[(str(folder / "raw"), 0, h5py.h5f.UNLIMITED)]
    )


def virtual_dataset(file: Any, folder: Path) -> None:
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", (3,))
    del file["a"]["a/kernel:0"]
    file["a"].create_virtual_dataset("a/kernel:0", layout)


def huge(file: Any, folder: Path) -> None:
    del file["a"]["a/kernel:0"]
    file["a"].create_dataset("a/kernel:0", (1 << 40,), "f4", chunks=(1 << 16,))


def unwritten_chunks(file: Any, folder: Path) -> None:
    del file["a"]["a/kernel:0"]
    file["a"].create_dataset("a/kernel:0", (4,), "f4", chunks=(2,))[:2] = 1


def unwritten(file: Any, folder: Path) -> None:
    del file["a"]["a/kernel:0"]
    file["a"].create_dataset("a/kernel:0", (4,), "f4")


def integers(file: Any, folder: Path) -> None:
    del file["a"]["a/kernel:0"]
    file["a"]["a/kernel:0"] = np.arange(3)


def nothing_in_it(file: Any, folder: Path) -> None:
    del file["a"]["a/kernel:0"]
    file["a"]["a/kernel:0"] = h5py.Empty("f4")


def named_type(file: Any, folder: Path) -> None:
    del file["a"]["a/kernel:0"]
    file["a"]["a/kernel:0"] = np.dtype("f4")


def twice(file: Any, folder: Path) -> None:
    file["b"]["a/kernel:0"] = np.ones(3, np.float32)


def outside_layers(file: Any, folder: Path) -> None:
    file["kernel:0"] = np.ones(3, np.float32)


def no_layers(file: Any, folder: Path) -> None:
    del file.attrs["layer_names"]


def no_weights(file: Any, folder: Path) -> None:
    for layer in file:
        file[layer].clear()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (external_link, "has a link at a/a/kernel:0 instead of data"),
        (external_group, "has a link at a instead of data"),
        (soft_link, "has a link at a/a/kernel:0 instead of data"),
        (external_storage, "keeps the values of a/a/kernel:0 in other files"),
        (virtual_dataset, "keeps the values of a/a/kernel:0 in other files"),
        (huge, "a/a/kernel:0 claims 4398046511104 bytes, more than the whole file has"),
        (unwritten_chunks, "some values of a/a/kernel:0 were never written"),
        (unwritten, "some values of a/a/kernel:0 were never written"),
        (integers, "holds a/a/kernel:0 as int64, but weights are floating point"),
        (nothing_in_it, "holds a/a/kernel:0 as float32, but weights are floating point"),
        (named_type, "something other than values at a/a/kernel:0"),
        (twice, "has b/a/kernel:0, which is not a variable of a layer, or is there twice"),
        (outside_layers, "has kernel:0, which is not a variable of a layer"),
        (no_layers, "not of Keras 2's save_weights: it has no attribute layer_names"),
        (no_weights, "holds no weights"),
    ],
)
def test_rejected(tmp_path: Path, change: Callable[[Any, Path], None], reason: str) -> None:
    path = tmp_path / "w.h5"
    save_h5(path, {"a/kernel": np.ones(3, np.float32), "b/kernel": np.ones(3, np.float32)})
    with h5py.File(path, "r+") as file:
        change(file, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_groups_in_circles_end(tmp_path: Path) -> None:
    path = tmp_path / "w.h5"
    save_h5(path, {"a/kernel": np.ones(3, np.float32)})
    with h5py.File(path, "r+") as file:
        for name in "xyz":
            file["a"][name] = file["a"]  # hard links: the group holds itself three times
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint) == ["a/kernel"]


def test_not_hdf5(tmp_path: Path) -> None:
    (tmp_path / "w").write_bytes(b"PK\x03\x04")
    assert not is_h5(read_head(tmp_path / "w"), tmp_path / "w")
    assert not is_h5(read_head(tmp_path), tmp_path)
    (tmp_path / "folder.h5").mkdir()
    assert not is_h5(read_head(tmp_path / "folder.h5"), tmp_path / "folder.h5")
    (tmp_path / "page.h5").write_text("<html>404</html>")  # a failed download
    for name in ("page.h5", "nothing.h5"):
        with pytest.raises(CheckpointError, match=rf"{name} (cannot be read as HDF5|.*exists)"):
            open_checkpoint(tmp_path / name)
    (tmp_path / "cut.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(CheckpointError, match=r"cut\.h5 cannot be read as HDF5: .*; fetch the file again"):
        open_checkpoint(tmp_path / "cut.h5")


def test_no_steps(tmp_path: Path) -> None:
    save_h5(tmp_path / "w.h5", {"a/kernel": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match="has no steps; leave out the step"):
        open_checkpoint(tmp_path / "w.h5", step=3)


@given(st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_reported_in_one_sentence(tmp_path: Path, data: st.DataObject) -> None:
    """Changed bytes and cut ends give other values or a CheckpointError, never a different exception."""
    path = tmp_path / "w.h5"
    save_h5(path, {f"a/{i}/kernel": np.ones((3, 4), np.float32) for i in range(3)})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    try:
        with open_checkpoint(path) as checkpoint:
            for name in checkpoint:
                checkpoint[name]
    except CheckpointError as error:
        message = str(error)
        assert message.startswith(str(path)), message
        assert "\n" not in message
