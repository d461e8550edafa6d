"""Data sets as people have them are opened for what they are; the others are refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from parity_tests.training.data.written_data import (
    coco_folder,
    detection_features,
    detection_records,
    picture,
    tf_example,
    write_records,
)
from pytorch_model.evaluation.dataset import DatasetError
from pytorch_model.training.data.example import NO_AREA, OUTSIDE, TrainingData
from pytorch_model.training.data.sources import open_data


def names_of(data: TrainingData) -> list[str]:
    return [data.examples[index].name for index in range(len(data.examples))]


# --- finding ------------------------------------------------------------------------------------------


def test_every_way_to_name_records(tmp_path: Path) -> None:
    for number in range(3):
        detection_records(tmp_path / f"x.record-{number:05}-of-00003", 2, first=2 * number)
    wanted = [f"{number}.png" for number in range(6)]
    for path in (
        tmp_path,
        tmp_path / "x.record",
        tmp_path / "x.record-*",
        tmp_path / "x.record-?????-of-00003",
    ):
        data = open_data(path)
        assert names_of(data) == wanted
        assert not any("shards" in note for note in data.notes)
    assert names_of(open_data(tmp_path / "x.record-00001-of-00003")) == wanted[2:4]
    (tmp_path / "x.record-00001-of-00003").unlink()
    data = open_data(tmp_path / "x.record")
    assert names_of(data) == wanted[:2] + wanted[4:]
    assert any("only 2 of the 3 shards" in note for note in data.notes)


def test_an_empty_shard_holds_no_example(tmp_path: Path) -> None:
    detection_records(tmp_path / "x.record-00000-of-00002", 2)
    (tmp_path / "x.record-00001-of-00002").touch()
    assert len(open_data(tmp_path).examples) == 2
    with pytest.raises(DatasetError, match=r"x.record-00001-of-00002 holds no records"):
        open_data(tmp_path / "x.record-00001-of-00002")


def test_gzip_and_any_name(tmp_path: Path) -> None:
    assert names_of(open_data(detection_records(tmp_path / "a.gz", 2))) == ["0.png", "1.png"]
    assert names_of(open_data(detection_records(tmp_path / "data", 2))) == ["0.png", "1.png"]


def test_training_records_are_chosen(tmp_path: Path) -> None:
    detection_records(tmp_path / "train-00000-of-00001.tfrecord", 2)
    detection_records(tmp_path / "val-00000-of-00001.tfrecord", 3)
    (tmp_path / "train.record.txt").write_text("how these records were made")
    assert len(open_data(tmp_path).examples) == 2
    assert len(open_data(tmp_path, split="val").examples) == 3
    detection_records(tmp_path / "pretrain.tfrecord", 1)
    with pytest.raises(
        DatasetError, match=r"holds several kinds of TFRecords \(pretrain.tfrecord, train-\*-of-00001"
    ):
        open_data(tmp_path)


def test_two_series_of_the_same_records_are_not_mixed(tmp_path: Path) -> None:
    for count in (1, 2):
        for number in range(count):
            detection_records(tmp_path / f"train.record-{number:05}-of-{count:05}", 2)
    with pytest.raises(DatasetError, match=r"several kinds of TFRecords \(train.record-\*-of-00001, train"):
        open_data(tmp_path)


def test_a_damaged_file_is_not_passed_over(tmp_path: Path) -> None:
    detection_records(tmp_path / "x.record-00000-of-00002", 2)
    (tmp_path / "x.record-00001-of-00002").write_text("something else, and of some length")
    (tmp_path / "model.data-00000-of-00001").write_text("a checkpoint that was kept here")
    with pytest.raises(DatasetError, match=r"x.record-00001-of-00002, record 1 at byte 0, is damaged"):
        open_data(tmp_path)


def test_every_way_to_name_a_coco_data_set(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "x")
    file = folder / "annotations" / "instances_train.json"
    wanted = [str(folder / "train" / f"{number}.png") for number in range(6)]
    assert names_of(open_data(folder)) == wanted
    assert names_of(open_data(file)) == wanted
    assert names_of(open_data(tmp_path, annotations=file, images=folder / "train")) == wanted
    (folder / "annotations" / "instances_val.json").write_text("not read")
    assert names_of(open_data(folder)) == wanted
    (folder / "flat").mkdir()
    file.rename(folder / "train" / "my.json")
    assert names_of(open_data(folder / "train")) == wanted


@pytest.mark.parametrize("name", ["nothing", "x" * 300, "nothing-*.tfrecord"])
def test_nothing_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=r"there is nothing at .*give a folder in COCO's format"):
        open_data(tmp_path / name)


def test_something_else(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="holds neither COCO annotations nor TFRecords; give a folder"):
        open_data(tmp_path)
    (tmp_path / "x.png").write_bytes(picture(0))
    with pytest.raises(DatasetError, match=r"x.png is neither a JSON file nor TFRecords; give a folder"):
        open_data(tmp_path / "x.png")
    (tmp_path / "x.tfrecord").write_bytes(picture(0))
    with pytest.raises(DatasetError, match="record 1 at byte 0, is damaged"):
        open_data(tmp_path / "x.tfrecord")
    detection_records(coco_folder(tmp_path / "both") / "x.tfrecord")
    with pytest.raises(DatasetError, match="holds both TFRecords and COCO annotations"):
        open_data(tmp_path / "both")


# --- facts and classes of TFRecords --------------------------------------------------------------------


def test_facts_of_records(tmp_path: Path) -> None:
    nothing: dict[str, list[int]] = {name: [] for name in ("ymin", "xmin", "ymax", "xmax", "label")}
    changes: list[dict[str, Any]] = [{}, nothing, {"is_crowd": [1, 0]}, {"ymax": [0.1, 1.0]}]
    records = [tf_example(detection_features(number, **change)) for number, change in enumerate(changes)]
    data = open_data(write_records(tmp_path / "x.tfrecord", records))
    facts = data.facts
    assert (facts.examples, facts.boxes, facts.without_boxes, facts.crowds, facts.most_boxes) == (
        4,
        5,
        1,
        1,
        2,
    )
    assert facts.per_class == {1: 2, 3: 3}
    assert facts.left_out == {NO_AREA: 1}
    assert facts.lines(data.classes) == [
        "4 images, 5 boxes of 2 classes, at most 2 in one image",
        "3 classes in all, names from nowhere",
        "images without boxes: 1",
        "boxes of crowds: 1",
        "boxes left out, without width or height: 1",
    ]


def test_the_digest_tells_data_sets_apart(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {}, {"label": [1, 2]}, {"image": [picture(5, (5, 5))]}]
    digests = [
        open_data(detection_records(tmp_path / f"{number}.tfrecord", 2, **change)).digest
        for number, change in enumerate(changes)
    ]
    assert len(set(digests)) == 3
    assert digests[0] == digests[1]


def test_classes_of_records(tmp_path: Path) -> None:
    """As many as the largest id: K, and not K + 1."""
    path = detection_records(tmp_path / "x.tfrecord", text=[b"ant", b"cow"])
    data = open_data(path)
    assert data.classes.names == ("ant", "", "cow")
    assert any("3 classes: the largest label" in note for note in data.notes)
    label_map = tmp_path / "label_map.pbtxt"
    label_map.write_text(
        "".join(f"item {{ id: {i} name: '{n}' }}\n" for i, n in enumerate(["ant", "bee", "Cow", "dog"], 1))
    )
    data = open_data(path)
    assert data.classes.names == ("ant", "bee", "Cow", "dog")
    assert not data.notes
    assert data.facts.lines(data.classes)[-1] == "2 classes have a name but no box: bee, dog"
    label_map.write_text("item { id: 1 name: 'pig' }")
    data = open_data(path)
    assert data.classes.names == ("pig", "", "")
    assert data.notes == (
        "the label map contradicts the texts of 1 classes: 1 is 'pig', its objects say 'ant'",
    )


def test_label_maps_that_are_not_used(tmp_path: Path, pipe: Path) -> None:
    path = detection_records(tmp_path / "x.tfrecord", text=[b"ant", b"cow"])
    for name in ("a.pbtxt", "b.pbtxt"):
        (tmp_path / name).write_text("item { id: 1 name: 'bee' }")
    data = open_data(path)
    assert data.classes.names == ("ant", "", "cow")
    assert "a.pbtxt, b.pbtxt are all label maps: none is used" in data.notes[0]
    (tmp_path / "a.pbtxt").write_bytes(b"\xff")
    (tmp_path / "b.pbtxt").unlink()
    pipe.rename(tmp_path / "c.pbtxt")
    first, second, _ = open_data(path).notes
    assert "a.pbtxt is not used, because it is not a label map: byte 0 is not UTF-8" in first
    assert "c.pbtxt is not used: it is a pipe" in second


def test_records_without_objects(tmp_path: Path) -> None:
    path = detection_records(tmp_path / "x.tfrecord", ymax=[0.0, 0.0])
    with pytest.raises(
        DatasetError, match=r"6 images, but no boxes.*12 boxes without width or height are left out"
    ):
        open_data(path)


def test_a_class_id_beyond_reason(tmp_path: Path) -> None:
    path = detection_records(tmp_path / "x.tfrecord", label=[1, 100_001])
    with pytest.raises(DatasetError, match="has the class id 100,001, but a model may have 100,000"):
        open_data(path)


def test_a_record_of_another_schema_is_named(tmp_path: Path) -> None:
    records = [tf_example(detection_features(0)), tf_example({"image/class/label": [1]})]
    with pytest.raises(
        DatasetError, match=r"x.tfrecord, record 2 at byte 2,\d+, is not .* has no image/encoded"
    ):
        open_data(write_records(tmp_path / "x.tfrecord", records))


# --- facts and classes of COCO -------------------------------------------------------------------------


def objects_at(*boxes: list[float], **fields: Any) -> list[dict[str, Any]]:
    return [
        {"id": number + 1, "image_id": 0, "category_id": 1, "bbox": box, **fields}
        for number, box in enumerate(boxes)
    ]


def test_boxes_that_create_coco_tfrecord_skips(tmp_path: Path) -> None:
    """The five cases that were recorded: right edge, past it, zero width, negative height, negative x."""
    boxes = objects_at([22, 4, 10, 8], [22.01, 4, 10, 8], [4, 4, 0, 8], [4, 4, 8, -1], [-3, 4, 8, 8])
    data = open_data(coco_folder(tmp_path / "x", 1, annotations=boxes))
    assert data.facts.left_out == {OUTSIDE: 1, NO_AREA: 2}
    boxes_yxyx = data.examples[0].boxes_yxyx
    expected = [[4 / 24, 22 / 32, 12 / 24, 1], [4 / 24, -3 / 32, 12 / 24, 5 / 32]]
    np.testing.assert_array_equal(boxes_yxyx, np.array(expected, np.float32))


def test_create_coco_tfrecord_skips_as_recorded(shared: Path, tmp_path: Path) -> None:
    path = shared / "train_truth" / "input_pipeline.json"
    if not path.is_file():
        pytest.skip("needs the recordings of training in ../shared/train_truth")
    skipped = json.loads(path.read_text())["create_coco_tfrecord_skips"]
    boxes: dict[str, list[float]] = {
        "touches the right edge exactly": [22, 4, 10, 8],
        "one hundredth past it": [22.01, 4, 10, 8],
        "zero width": [4, 4, 0, 8],
        "negative height": [4, 4, 8, -1],
        "negative x": [-3, 4, 8, 8],
    }
    for number, (name, box) in enumerate(boxes.items()):
        data = open_data(coco_folder(tmp_path / str(number), 1, annotations=objects_at(box, [1, 1, 2, 2])))
        assert sum(data.facts.left_out.values()) == skipped[name], name
    assert set(skipped) == set(boxes)


def test_classes_of_coco(tmp_path: Path) -> None:
    data = open_data(coco_folder(tmp_path / "x"))
    assert data.classes.names == ("ant", "bee")
    assert data.classes.source == "instances_train.json"
    assert data.facts.per_class == {1: 3, 2: 3}
    gaps = [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}, {"id": 7, "name": "cow"}]
    data = open_data(coco_folder(tmp_path / "y", categories=gaps))
    assert data.classes.names == ("ant", "bee", "", "", "", "", "cow")
    assert any("3 categories, but 7 classes" in note for note in data.notes)


def test_category_0(tmp_path: Path) -> None:
    """Without objects it stands for no class; with objects the ids count from 0."""
    three = [{"id": 0, "name": "ants"}, {"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}]
    data = open_data(coco_folder(tmp_path / "x", categories=three))
    assert data.classes.names == ("ant", "bee")
    assert any("category 'ants' is no class" in note for note in data.notes)
    data = open_data(
        coco_folder(tmp_path / "y", categories=three, annotations=objects_at([4, 4, 8, 8], category_id=0))
    )
    assert data.classes.names == ("ants", "ant", "bee")
    assert data.examples[0].classes.tolist() == [1]
    assert any("count from 0: the class ids are one larger" in note for note in data.notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"annotations": []}, "6 images, but no boxes"),
        ({"annotations": None}, "lists images without annotations"),
        ({"annotations": objects_at([4, 4, float("nan"), 8])}, "the bbox of annotation 1 is"),
        (
            {
                "categories": [{"id": -1, "name": "ant"}],
                "annotations": objects_at([4, 4, 8, 8], category_id=-1),
            },
            "has objects of category -1",
        ),
        ({"categories": [{"id": 0, "name": "ant"}], "annotations": []}, "no category with an id from 1 on"),
        ({"categories": [{"id": 100_001, "name": "ant"}]}, "has the class id 100,001"),
    ],
)
def test_annotations_that_do_not_train(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = coco_folder(tmp_path / "x", **changes)
    file = folder / "annotations" / "instances_train.json"
    if changes.get("annotations", 0) is None:
        file.write_text(
            json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "annotations"})
        )
    with pytest.raises(DatasetError) as raised:
        open_data(folder)
    assert words in str(raised.value)


def test_images_that_are_missing(tmp_path: Path) -> None:
    folder = coco_folder(tmp_path / "x", 20)
    for number in (3, 4):
        (folder / "train" / f"{number}.png").unlink()
    data = open_data(folder)
    assert (len(data.examples), data.facts.boxes) == (18, 18)
    assert "images left out, not readable: 2 (the first is " in data.facts.lines(data.classes)[-1]
    (folder / "train" / "5.png").unlink()
    with pytest.raises(DatasetError, match=r"3 of the 20 images of .* cannot be read, too many to leave out"):
        open_data(folder)


def test_sizes_that_are_not_stated(tmp_path: Path) -> None:
    sized = open_data(coco_folder(tmp_path / "x", 2))
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(2)]
    data = open_data(coco_folder(tmp_path / "y", 2, images=images))
    assert data.digest == sized.digest
    (tmp_path / "y" / "train" / "0.png").write_bytes(b"no image")
    assert "not an image" in next(iter(open_data(tmp_path / "y").facts.missing.values()))
