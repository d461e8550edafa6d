"""``tf.train.Example`` without TensorFlow: random ones, Google's own, and those of another schema."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.helpers.paths import GOLDENS
from parity_tests.training.data.written_data import detection_features, tf_example, write_records
from pytorch_model.errors import Reason
from pytorch_model.evaluation.dataset import DatasetError
from pytorch_model.formats import wire
from pytorch_model.training.data.coco import open_coco
from pytorch_model.training.data.example import NO_AREA, NOT_FINITE, Example
from pytorch_model.training.data.loader import decode
from pytorch_model.training.data.records import RecordFile
from pytorch_model.training.data.sources import open_data
from pytorch_model.training.data.tf_example import Values, detection_example, parse_features

VALUES = st.one_of(
    st.lists(st.binary(max_size=40), max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), max_size=30),
    st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=30),
)


def plain(values: Values) -> list[Any]:
    """As JSON has it."""
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


@given(features=st.dictionaries(st.text(max_size=20), VALUES, max_size=6), packed=st.booleans())
@settings(deadline=None)
def test_what_is_written_is_read_back(features: dict[str, Any], packed: bool) -> None:
    found = parse_features(tf_example(features, packed))
    assert {name: plain(values) for name, values in found.items()} == features


def test_only_what_is_wanted_is_read() -> None:
    data = tf_example({"a": [1], "b": [2.0]})
    assert list(parse_features(data, {"b"})) == ["b"]


@pytest.mark.parametrize(
    "feature",
    [
        wire.bytes_field(2, wire.bytes_field(1, b"12345")),  # five bytes are no floats
        wire.bytes_field(3, wire.bytes_field(1, b"\xff")),  # a number that does not end
        wire.int_field(1, 7),
    ],
)
def test_damaged_features_are_malformed(feature: bytes) -> None:
    entry = wire.bytes_field(1, b"x") + wire.bytes_field(2, feature)
    with pytest.raises(wire.Malformed):
        parse_features(wire.bytes_field(1, wire.bytes_field(1, entry)))


# --- detection examples --------------------------------------------------------------------------------


def read(**changes: Any) -> tuple[Example, Counter[str]]:
    features = parse_features(tf_example(detection_features(7, **changes)))
    return detection_example(features, "the place")


def test_a_full_example() -> None:
    example, left_out = read(is_crowd=[0, 1], area=[12.0, 30.0])
    assert not left_out
    np.testing.assert_array_equal(
        example.boxes_yxyx, np.array([[0.1, 0.2, 0.6, 0.7], [0.5, 0.25, 1, 0.75]], np.float32)
    )
    assert example.classes.tolist() == [1, 3]
    assert example.crowd.tolist() == [False, True]
    assert example.area.tolist() == [12, 30]
    assert (example.image_id, example.name) == (7, "7.png")


def test_what_people_leave_out() -> None:
    """The Object Detection API's scripts write no area and no is_crowd, and a file name as the id."""
    example, _ = read(source_id=[b"dog.jpg"], filename=None)
    assert (example.image_id, example.name) == ("dog.jpg", "dog.jpg")
    assert not example.crowd.any()
    np.testing.assert_allclose(example.area, [0.25, 0.25], rtol=1e-6)
    example, _ = read(source_id=None, filename=None)
    assert (example.image_id, example.name) == ("the place", "the place")
    nothing: dict[str, list[int]] = {name: [] for name in ("ymin", "xmin", "ymax", "xmax", "label")}
    for changes in (nothing, dict.fromkeys(nothing)):
        example, left_out = read(**changes)
        assert example.boxes_yxyx.shape == (0, 4)
        assert len(example.classes) == len(example.crowd) == len(example.area) == 0
        assert not left_out


def test_boxes_a_little_outside_stay() -> None:
    example, left_out = read(ymin=[-0.01, 0.5], xmax=[1.02, 0.75])
    assert not left_out
    assert example.boxes_yxyx[0].tolist() == np.array([-0.01, 0.2, 0.6, 1.02], np.float32).tolist()


def test_boxes_that_are_none_are_left_out_and_counted() -> None:
    example, left_out = read(ymax=[0.1, 1.0])
    assert example.classes.tolist() == [3]
    assert left_out == {NO_AREA: 1}
    example, left_out = read(ymax=[0.05, 0.4], xmax=[0.1, 0.1], area=[1.0, 2.0])
    assert not len(example.classes)
    assert left_out == {NO_AREA: 2}
    for value in (float("nan"), float("inf")):
        example, left_out = read(xmin=[value, 0.25], is_crowd=[1, 0], area=[5.0, 6.0])
        assert (example.classes.tolist(), example.crowd.tolist(), example.area.tolist()) == (
            [3],
            [False],
            [6],
        )
        assert left_out == {NOT_FINITE: 1}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "it has no image/encoded, so it is no detection example"),
        ({"label": [0, 1]}, "it has the class label 0, but labels count from 1"),
        ({"label": [-1, 1]}, "it has the class label -1"),
        ({"label": [1]}, "it has 1 image/object/class/label, but 2 image/object/bbox/ymin, 2 "),
        ({"is_crowd": [0]}, "1 image/object/is_crowd"),
        ({"label": [1.0, 3.0]}, "its image/object/class/label holds floats instead of whole numbers"),
        ({"xmin": [3, 4]}, "its image/object/bbox/xmin holds whole numbers instead of floats"),
        ({"image": [1]}, "its image/encoded holds whole numbers instead of bytes"),
        ({"source_id": [5]}, "its image/source_id holds whole numbers instead of bytes"),
        ({"xmax": [100.0, 200.0]}, "the coordinate 200, but boxes are relative to the image"),
    ],
)
def test_another_schema_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(Reason) as raised:
        read(**changes)
    assert words in str(raised.value)


# --- Google's own -------------------------------------------------------------------------------------


def test_examples_by_google_without_images() -> None:
    """The parts of Google's records that are not pictures, as recorded by Google's own reader."""
    for golden in json.loads((GOLDENS / "training" / "examples.json").read_text()):
        found = parse_features(base64.b64decode(golden["serialized"]))
        assert {name: _as_recorded(values) for name, values in found.items()} == golden["features"]


def _as_recorded(values: Values) -> list[Any]:
    return [each.decode() if isinstance(each, bytes) else each for each in plain(values)]


def recorded(shared: Path) -> list[dict[str, Any]]:
    path = shared / "train_truth" / "tfrecord" / "expected.json"
    if not path.is_file():
        pytest.skip("needs the recordings of training in ../shared/train_truth")
    content: list[dict[str, Any]] = json.loads(path.read_text())["examples"]
    return content


def test_every_feature_of_googles_records(shared: Path) -> None:
    expected = recorded(shared)
    files = {
        name: RecordFile(shared / "train_truth" / "tfrecord" / name) for name in {e["file"] for e in expected}
    }
    records = {
        hashlib.sha256(data).hexdigest(): data
        for file in files.values()
        for data in (file.read(index) for index in range(len(file)))
    }
    assert set(records) == {each["sha256"] for each in expected}
    assert len(expected) == 6
    for each in expected:
        found = parse_features(records[each["sha256"]])
        assert set(found) == set(each["features"])
        for name, feature in each["features"].items():
            values = plain(found[name])
            assert len(values) == len(feature["values"])
            for value, stated in zip(values, feature["values"], strict=True):
                if isinstance(stated, dict):
                    assert (len(value), hashlib.sha256(value).hexdigest()) == (
                        stated["bytes"],
                        stated["sha256"],
                    )
                else:
                    assert (value.decode() if isinstance(value, bytes) else value) == stated, name


def test_googles_records_as_examples(shared: Path) -> None:
    """What Google's decoder returns: boxes, classes, crowds, areas, and with the fast DCT the pixels."""
    pytest.importorskip("simplejpeg")
    decoded = {each["decoded"]["source_id"]: each["decoded"] for each in recorded(shared)}
    for pattern in ("coco-*.tfrecord", "pascal-*.tfrecord"):
        examples = open_data(shared / "train_truth" / "tfrecord" / pattern).examples
        for index in range(len(examples)):
            example = examples[index]
            stated = decoded.pop(str(example.image_id))
            assert example.boxes_yxyx.tolist() == stated["groundtruth_boxes"]
            assert example.classes.tolist() == stated["groundtruth_classes"]
            assert example.crowd.tolist() == stated["groundtruth_is_crowd"]
            assert example.area.tolist() == stated["groundtruth_area"]
            pixels = decode(example, "fast-dct")
            assert list(pixels.shape) == stated["image_shape"]
            assert int(pixels.sum(dtype=np.int64)) == stated["image_sum"]
    assert not decoded


def test_a_coco_folder_equals_googles_records_of_it(shared: Path) -> None:
    """create_coco_tfrecord.py made the records from the same annotations."""
    recorded(shared)
    from_coco = open_coco(shared / "coco").examples
    by_id = {(example := from_coco[index]).image_id: example for index in range(len(from_coco))}
    records = open_data(shared / "train_truth" / "tfrecord" / "coco-*").examples
    for index in range(len(records)):
        example = records[index]
        same = by_id[example.image_id]
        assert same.image == example.image
        if not len(example.classes):
            continue  # the annotations of this picture were taken away before it was recorded
        for name in ("boxes_yxyx", "classes", "crowd", "area"):
            np.testing.assert_array_equal(getattr(same, name), getattr(example, name))


def test_damage_in_an_example_is_named(tmp_path: Path) -> None:
    good = tf_example(detection_features(0))
    path = write_records(tmp_path / "x.tfrecord", [good, b"\x0a\x7f"])
    with pytest.raises(
        DatasetError, match=r"x.tfrecord, record 2 at byte 2,\d+, is not what AutoML's .* runs past"
    ):
        open_data(path)
