"""COCO's figures: data sets, average precision, resuming, several processes, the command line."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from parity_tests.helpers.paths import GOLDENS, TOOLS
from parity_tests.helpers.small_models import small
from porting.cli import process
from porting.cli.drawing.evaluation import print_parity
from porting.cli.main import execute
from porting.errors import EfficientDetError, OutputError
from porting.hparams import nms_and_size, read_hparams
from pytorch_model import load_model
from pytorch_model.config import Resizer, model_config
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.results import server_file_name, server_results, to_results
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import ENGINES
from pytorch_model.errors import ConfigError
from pytorch_model.evaluation import dataset as dataset_module
from pytorch_model.evaluation.classes import class_to_category, left_out
from pytorch_model.evaluation.dataset import DatasetError, read_dataset
from pytorch_model.evaluation.detection_parity import compare_detections
from pytorch_model.evaluation.figures import FIGURES, evaluate
from pytorch_model.evaluation.metrics import Metrics, read_metrics
from pytorch_model.evaluation.processes import Processes, joined
from pytorch_model.evaluation.run import EvaluationOptions, evaluate_dataset
from pytorch_model.evaluation.shards import ShardError, Shards
from pytorch_model.evaluation.streams import settings as settings_of
from pytorch_model.labels.known import COCO_NAMES
from pytorch_model.weights.files import write_weights

EVAL_COCO = str(TOOLS / "eval_coco.py")

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
pytest.importorskip("pycocotools", reason="needs pycocotools")

# --- a small data set ---------------------------------------------------------------------------------

COUNT = 7
CATEGORIES = [{"id": index, "name": COCO_NAMES[index - 1]} for index in (1, 2, 90)]


def content(count: int = COUNT) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    annotations = [
        {
            "id": number,
            "image_id": 10 * (number % count),
            "category_id": (1, 2, 90)[number % 3],
            "bbox": [*rng.uniform(0, 30, 2), *rng.uniform(5, 40, 2)],
            "area": 300.0,
            "iscrowd": int(number == 3),
        }
        for number in range(1, 3 * count)
    ]
    images = [{"id": 10 * i, "file_name": f"{i}.png", "height": 60, "width": 80} for i in range(count)]
    return {"images": images, "annotations": annotations, "categories": copy.deepcopy(CATEGORIES)}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return make_coco(tmp_path / "coco")


def make_coco(folder: Path) -> Path:
    """A folder as COCO's are: annotations/instances_val2017.json and val2017/."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content()))
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(folder / f"val2017/{i}.png")
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    file = folder / "annotations/instances_val2017.json"
    changed = content()
    change(changed)
    file.write_text(json.dumps(changed))
    return file


def run(weights: Path, coco: Path, out: Path, *more: str) -> int:
    """The command's exit status."""
    arguments = ["--weights", weights, "--coco", coco, "--out", out, "--batch-size", "2", *more]
    try:
        process.run(lambda: execute("eval", [str(argument) for argument in arguments]))
    except SystemExit as end:
        status = end.code
    assert isinstance(status, int)
    return status


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_images_that_make_inputs_of_several_sizes(coco: Path, tmp_path: Path) -> None:
    """A model whose resizer does not pad: every image is evaluated as it is detected alone."""
    Image.fromarray(np.full((80, 60, 3), 99, np.uint8)).save(coco / "val2017/1.png")
    resizer = Resizer("keep_aspect_ratio", pad=False)
    config = small(resizer=resizer, image_size=(128, 128), anchor_stride="power_of_two", num_classes=90)
    torch.manual_seed(0)
    model = EfficientDet(config).eval()
    weights = tmp_path / "varying.safetensors"
    write_weights(weights, model.state_dict(), config, {})
    assert run(weights, coco, tmp_path / "out", "--batch-size", "3") == 0
    rows = read(tmp_path / "out" / "detections.json")
    for number in range(3):
        [alone] = Detector(model)([coco / f"val2017/{number}.png"])
        counted = torch.isin(alone["labels"], torch.tensor([1, 2, 90]))  # the data set's categories
        corners = [row["bbox"][:2] for row in rows if row["image_id"] == 10 * number]
        assert len(corners) == counted.sum() > 0
        np.testing.assert_allclose(corners, alone["boxes"][counted][:, :2], atol=0.01)  # pixels, rounded


# --- figures ------------------------------------------------------------------------------------------


def box(x: float, y: float, category: int = 1, image: int | str = 0, **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": [x, y, 50.0, 50.0], **more}


def truth(*boxes: dict[str, Any]) -> dict[str, Any]:
    annotations = [{**b, "id": i, "area": 2500.0, "iscrowd": 0} for i, b in enumerate(boxes, start=1)]
    return {
        "images": [{"id": 0}, {"id": 1}],
        "categories": [{"id": 1}, {"id": 2}],
        "annotations": annotations,
    }


def test_figures_by_hand() -> None:
    """COCO averages precision over 101 recalls and ten IoUs, 0.5 to 0.95."""
    right = box(0, 0, score=0.9)
    half = evaluate(truth(box(0, 0), box(100, 100)), [right], [0])
    assert half.figures["AP"] == pytest.approx(51 / 101)
    assert half.figures["ARmax100"] == pytest.approx(0.5)
    assert half.figures["APs"] == -1
    # 45 of 50 pixels: overlap 45 / 55 = 0.818, which seven of the ten thresholds accept.
    shifted = evaluate(truth(box(0, 0)), [box(5, 0, score=0.9)], [0])
    assert shifted.figures["AP"] == pytest.approx(0.7)
    assert shifted.figures["AP50"] == pytest.approx(1)
    assert shifted.per_class == pytest.approx({1: 0.7, 2: -1})
    both_found = [right, box(100, 100, score=0.8)]
    assert evaluate(truth(box(0, 0), box(100, 100)), both_found, [0]).per_class[1] == pytest.approx(1)
    # A better-scored mistake ahead halves the precision.
    mistaken = evaluate(truth(box(0, 0)), [box(200, 200, score=0.95), right], [0])
    assert mistaken.figures["AP"] == pytest.approx(0.5)


def test_only_chosen_images_count() -> None:
    boxes = truth(box(0, 0), box(0, 0, image=1))
    found = [box(0, 0, score=0.9), box(200, 200, image=1, score=0.95)]
    assert evaluate(boxes, found, [0]).figures["AP"] == pytest.approx(1)
    assert evaluate(boxes, found, [0, 1]).figures["AP"] < 0.6


@pytest.mark.parametrize("ids", [("a", "b"), (1, "1"), (7, "a"), (-1, 2**63), (2**60, 2**60 + 1)], ids=str)
def test_any_ids_give_the_same_figures(ids: tuple[int | str, int | str]) -> None:
    """Numbers mixed with names, and numbers that a double cannot distinguish."""
    first, second = ids
    boxes = truth(box(0, 0, image=first), box(100, 100, image=second))
    boxes["images"] = [{"id": first}, {"id": second}]
    found = [box(0, 0, image=first, score=0.9), box(100, 100, image=second, score=0.8)]
    kept = copy.deepcopy(boxes)
    assert evaluate(boxes, found, ids).figures["AP"] == pytest.approx(1)
    assert evaluate(boxes, found[1:], ids).figures["ARmax100"] == pytest.approx(0.5)
    assert boxes == kept


def test_without_pycocotools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(EfficientDetError, match="pip install pycocotools"):
        evaluate(truth(box(0, 0)), [], [0])


def test_no_detection_gives_zero() -> None:
    figures = evaluate(truth(box(0, 0)), [], [0]).figures
    assert set(figures) == set(FIGURES)
    assert figures["AP"] == figures["ARmax100"] == 0


# AP, AP50, AP75, by size; AR at 1, 10, 100, by size: computed by Google's code on these images.
GOOGLE = {
    "fast-dct": (
        "detections_tf_158.json",
        (0.3159, 0.4984, 0.3464, 0.0896, 0.3295, 0.5486, 0.2755, 0.4049, 0.4163, 0.1218, 0.4516, 0.6758),
    ),
    "pillow": (
        "detections_tf_158_accurate_dct.json",
        (0.3167, 0.4965, 0.3449, 0.0902, 0.3330, 0.5487, 0.2779, 0.4052, 0.4162, 0.1179, 0.4498, 0.6773),
    ),
}


@pytest.mark.parametrize("decoder", GOOGLE)
def test_googles_detections_have_googles_figures(shared: Path, decoder: str) -> None:
    file, expected = GOOGLE[decoder]
    dataset = read_dataset(shared / "coco")
    results = read(shared / "lite0" / file)
    figures = evaluate(dataset.content, results, [image.id for image in dataset.images]).figures
    assert tuple(round(value, 4) for value in figures.values()) == expected


@pytest.fixture(scope="module")
def trained_lite0(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from porting.checkpoint import open_checkpoint
    from porting.convert import convert

    conversion = convert(
        open_checkpoint(shared / "lite0/efficientdet-lite0"), model_config("efficientdet-lite0")
    )
    path = tmp_path_factory.mktemp("lite0") / "lite0.safetensors"
    write_weights(path, conversion.state_dict, conversion.config, {})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("decoder", GOOGLE)
def test_trained_lite0_on_158_images(
    shared: Path, trained_lite0: Path, tmp_path: Path, decoder: str, tensorflow: object
) -> None:
    """From JPEG files: all twelve figures equal Google's and those of our reference, to 4 decimals."""
    if decoder == "fast-dct":
        pytest.importorskip("simplejpeg", reason="needs simplejpeg for the fast DCT")
    reference = ["--reference", "ops", "--ckpt", str(shared / "lite0/efficientdet-lite0")]
    status = run(trained_lite0, shared / "coco", tmp_path / "out", "--decoder", decoder, *reference)
    metrics = read(tmp_path / "out/metrics.json")
    for name in ("ours", "reference"):
        figures = tuple(round(metrics[name][figure], 4) for figure in FIGURES)
        print(decoder, name, *figures)
        assert figures == GOOGLE[decoder][1]
    print(metrics["detection_parity"])
    assert status == 0
    assert metrics["detection_parity"]["passed"]
    assert metrics["decoders"] == {decoder: 158}


@pytest.mark.slow
@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "compile"])
def test_every_engine_has_the_same_figures(
    shared: Path, trained_lite0: Path, tmp_path: Path, engine: str
) -> None:
    if ENGINES[engine].missing:
        pytest.skip(
            f"needs {', '.join(ENGINES[engine].missing)}: pip install -e '.[{ENGINES[engine].extra}]'"
        )
    assert run(trained_lite0, shared / "coco", tmp_path / "out", "--engine", engine) == 0
    metrics = read(tmp_path / "out/metrics.json")
    assert metrics["settings"]["ours"]["engine"] == engine
    assert tuple(round(metrics["ours"][figure], 4) for figure in FIGURES) == GOOGLE["pillow"][1]


# --- data sets ----------------------------------------------------------------------------------------


def test_annotations_and_images_are_found(coco: Path) -> None:
    (coco / "annotations/instances_train2017.json").write_text("{}")
    dataset = read_dataset(coco, limit=3)
    assert dataset.annotations == coco / "annotations/instances_val2017.json"
    assert dataset.folder == coco / "val2017"
    assert [image.id for image in dataset.images] == [0, 10, 20]
    assert dataset.categories == {1: "person", 2: "bicycle", 90: "toothbrush"}
    assert dataset.notes == ()


def test_an_annotation_of_id_0_counts(coco: Path) -> None:
    """pycocotools treats a match with annotation 0 as no match."""

    def change(data: dict[str, Any]) -> None:
        data["annotations"] = [{**box(0, 0), "id": 0}]

    rewrite(coco, change)
    figures = evaluate(read_dataset(coco).content, [box(0, 0, score=0.9)], [0]).figures
    assert figures["AP"] == pytest.approx(1)


def test_other_layouts_are_found(coco: Path, tmp_path: Path) -> None:
    shutil.copy(coco / "annotations/instances_val2017.json", tmp_path / "mine.json")
    given = read_dataset(None, tmp_path / "mine.json", coco / "val2017")
    assert len(given.images) == COUNT
    flat = tmp_path / "flat"
    shutil.copytree(coco / "val2017", flat)
    shutil.copy(tmp_path / "mine.json", flat / "mine.json")
    assert read_dataset(flat).folder == flat
    inner = coco / "annotations/instances_val2017.json"
    assert read_dataset(None, inner).folder == coco / "val2017"


def test_only_groups_of_objects_have_a_note(
    small_weights: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def all_but_the_last(data: dict[str, Any]) -> None:
        for entry in data["annotations"]:
            entry["iscrowd"] = 1
        data["annotations"][-1]["iscrowd"] = 0

    rewrite(coco, all_but_the_last)
    assert not any("iscrowd" in note for note in read_dataset(coco).notes)
    rewrite(coco, lambda data: [entry.update(iscrowd=1) for entry in data["annotations"]])
    dataset = read_dataset(coco)
    assert f"all {len(content()['annotations'])} annotations have iscrowd=1" in dataset.notes[-1]
    ids = [image.id for image in dataset.images]
    assert set(evaluate(dataset.content, [], ids).figures.values()) == {-1.0}
    assert run(small_weights, coco, tmp_path / "out", "--limit", "1") == 0
    assert "COCO's evaluation ignores groups" in " ".join(capsys.readouterr().out.split())


def test_orphans_are_left_out_and_counted(coco: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        data["annotations"] += [box(0, 0, image=999), box(0, 0, 7, image=10), box(0, 0, image=10)]
        data["annotations"][0]["bbox"][2] *= -1
        data["images"].pop(0)

    rewrite(coco, change)
    dataset = read_dataset(coco)
    notes = "\n".join(dataset.notes)
    gone = sum(entry["image_id"] == 0 for entry in content()["annotations"])
    assert f"{gone + 1} annotations of images that are not listed" in notes
    assert "1 annotations of categories that are not listed" in notes
    assert "1 annotations without an area" in notes
    assert "1 annotations whose box has a negative side" in notes
    assert "1 images in" in notes
    added = dataset.content["annotations"][-1]
    assert (added["area"], added["iscrowd"]) == (2500.0, 0)
    assert evaluate(dataset.content, [], [10]).figures["AP"] == 0


BAD_ANNOTATIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no images": (lambda data: data.pop("images"), "it lacks 'images'"),
    "no pictures": (lambda data: data["images"].clear(), "its images are an empty list"),
    "no categories": (lambda data: data["categories"].clear(), "its categories are an empty list"),
    "images by name": (lambda data: data.update(images={"a": 1}), "its images are not a list of objects"),
    "categories by id": (lambda data: data.update(categories={"1": "x"}), "its categories are not a list"),
    "category names": (
        lambda data: data.update(categories=["x"]),
        "its categories are not a list of objects",
    ),
    "annotations by id": (lambda data: data.update(annotations={}), "its annotations are not a list"),
    "annotations in words": (lambda data: data.update(annotations=""), "its annotations are not a list"),
    "null annotations": (lambda data: data.update(annotations=None), "its annotations are not a list"),
    "image id": (lambda data: data["images"][0].update(id=1.5), "the image id 1.5 is neither"),
    "no file name": (lambda data: data["images"][0].pop("file_name"), "an entry lacks 'file_name'"),
    "file name": (
        lambda data: data["images"][1].update(file_name=7),
        "the file_name of image 10 is not text",
    ),
    "two alike": (lambda data: data["images"][1].update(id=0), "it has two entries for image 0"),
    "category id": (lambda data: data["categories"][0].update(id="1"), "the category id '1' is not a whole"),
    "category twice": (lambda data: data["categories"].append(CATEGORIES[0]), "two entries for category 1"),
    "no name": (lambda data: data["categories"][0].update(name=""), "the name of category 1 is '', not text"),
    "null for a name": (
        lambda data: data["categories"][0].update(name=None),
        "the name of category 1 is None, not text",
    ),
    "true for a name": (lambda data: data["categories"][0].update(name=True), "1 is True, not text"),
    "a list for a name": (lambda data: data["categories"][0].update(name=["a"]), "1 is .'a'., not text"),
    "half a box": (lambda data: data["annotations"][0].update(bbox=[1, 2]), "the bbox of annotation 1"),
    "text for a side": (lambda data: data["annotations"][0].update(bbox=[1, 2, "3", 4]), "four numbers"),
    "an endless side": (lambda data: data["annotations"][0].update(bbox=[1, 2, 10**400, 4]), "four numbers"),
    "no crowd": (lambda data: data["annotations"][0].update(iscrowd=None), "the iscrowd of annotation 1"),
    "no area": (lambda data: data["annotations"][0].update(area="3"), "the area of annotation 1 is '3'"),
    "an endless area": (lambda data: data["annotations"][0].update(area=10**400), "the area of annotation 1"),
    "no category": (lambda data: data["annotations"][4].pop("category_id"), "an entry lacks 'category_id'"),
    "image ids": (
        lambda data: data["annotations"][0].update(image_id=[0]),
        "image_id of annotation 1 is .0.",
    ),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_bad_annotations(coco: Path, case: str) -> None:
    change, message = BAD_ANNOTATIONS[case]
    rewrite(coco, change)
    with pytest.raises(DatasetError, match=rf"is not in COCO's format: .*{message}.*; correct it, or give"):
        read_dataset(coco)


def test_images_of_another_data_set(coco: Path) -> None:
    rewrite(coco, lambda data: [image.update(file_name="x" + image["file_name"]) for image in data["images"]])
    with pytest.raises(DatasetError, match=r"no image of instances_val2017.json .*; give --images"):
        read_dataset(coco)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "it is not JSON: Expecting property name"),
        ("[" * 100_000, "it is nested too deep"),
        ("[1]", "it is not an object"),
        ('{"images": ' + "9" * 6000 + "}", "it holds a number of thousands of digits"),
        ('{"annotations": [], "annotations": []}', "an object in it has the key 'annotations' twice"),
        ('{"images": [{"id": 1, "id": 2}]}', "an object in it has the key 'id' twice"),
        (b"{\xff}", "it is not JSON: byte 1 is not text"),
    ],
    ids=["cut", "deep", "list", "digits", "two lists", "two ids", "bytes"],
)
def test_annotations_that_are_not_json(tmp_path: Path, text: str | bytes, reason: str) -> None:
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(
        DatasetError, match=rf"a\.json is not in COCO's format: {reason}.*; correct it, or give"
    ):
        read_dataset(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_annotations_in_unicode(coco: Path, encoding: str) -> None:
    file = rewrite(coco, lambda data: data["categories"][0].update(name="人"))
    file.write_text(json.dumps(read(file), ensure_ascii=False), encoding=encoding)
    assert read_dataset(coco).categories[1] == "人"


def test_a_box_beyond_64_bits_matches_nothing(coco: Path) -> None:
    rewrite(coco, lambda data: data["annotations"][0].update(bbox=[0, 0, 2**70, 2**70], area=2**140))
    dataset = read_dataset(coco)
    assert evaluate(dataset.content, [box(0, 0, image=10, score=0.5)], [10]).figures["AP"] == 0


def test_bad_places(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="is not a folder"):
        read_dataset(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no annotation file"):
        read_dataset(tmp_path / "empty")
    for name in ("missing.json", "no\0name"):
        with pytest.raises(DatasetError, match=r"cannot read the annotations .*; give a JSON file"):
            read_dataset(None, tmp_path / name)
    for name in ("a", "b"):
        (tmp_path / f"empty/instances_{name}.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"instances_a.json, instances_b.json.*give --annotations"):
        read_dataset(tmp_path / "empty")
    with pytest.raises(DatasetError, match="--images"):
        read_dataset(coco, images=tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="give --coco or --annotations"):
        read_dataset(None)


# --- classes ------------------------------------------------------------------------------------------


def test_coco_ids_are_class_ids(coco: Path) -> None:
    assert class_to_category(read_dataset(coco), 90, None) == {1: 1, 2: 2, 90: 90}


def use_zero(data: dict[str, Any]) -> None:
    """Category 1 becomes category 0, in the annotations too."""
    data["categories"][0]["id"] = 0
    for entry in data["annotations"]:
        if entry["category_id"] == 1:
            entry["category_id"] = 0


@pytest.mark.parametrize(
    ("change", "num_classes", "message"),
    [
        (lambda data: None, 20, "category id 90 .toothbrush., but the model has classes 1 to 20"),
        (use_zero, 90, "category id 0 .person."),
        (lambda data: data["categories"][0].update(name="cat"), 90, "'cat', but class 1 .* COCO's 'person'"),
        (lambda data: data["categories"][2].update(id=12), 90, "COCO's 'nothing'"),
    ],
)
def test_categories_that_do_not_fit(
    coco: Path, change: Callable[[dict[str, Any]], Any], num_classes: int, message: str
) -> None:
    rewrite(coco, change)
    with pytest.raises(DatasetError, match=message):
        class_to_category(read_dataset(coco), num_classes, None)


def test_categories_named_by_numbers(coco: Path, tmp_path: Path) -> None:
    rewrite(coco, lambda data: data.update(categories=[{"id": i + 1, "name": i} for i in range(10)]))
    dataset = read_dataset(coco)
    assert dataset.categories == {i + 1: str(i) for i in range(10)}
    for labels in (list(range(10)), read(dataset.annotations)):
        (tmp_path / "labels.json").write_text(json.dumps(labels))
        same = class_to_category(dataset, 10, tmp_path / "labels.json")
        assert same == {i: i for i in range(1, 11)}


def test_categories_by_name(coco: Path, tmp_path: Path) -> None:
    rewrite(coco, with_categories({0: "dog", 500: "cat"}))
    dataset = read_dataset(coco)
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\nbird\ndog\n")
    assert class_to_category(dataset, 3, labels) == {3: 0, 1: 500}
    labels.write_text("1: cat\n2: bird\n")
    with pytest.raises(DatasetError, match="does not name 'dog'"):
        class_to_category(dataset, 3, labels)
    labels.write_text("cat\ndog\ndog\n")
    with pytest.raises(
        DatasetError, match=r"gives two classes the same name; it must name each category of .*json once"
    ):
        class_to_category(dataset, 3, labels)
    labels.write_text("cat\nbird\ndog\n")
    rewrite(coco, with_categories({3: "dog", 7: "dog"}))
    with pytest.raises(DatasetError, match="two categories 'dog'"):
        class_to_category(read_dataset(coco), 3, labels)


def with_categories(names: Mapping[int, str], used: Sequence[int] = ()) -> Callable[[dict[str, Any]], None]:
    """A change of the data set: these categories; annotations of those in ``used``, of all without it."""

    def change(data: dict[str, Any]) -> None:
        data["categories"] = [{"id": id_, "name": name} for id_, name in names.items()]
        for number, entry in enumerate(data["annotations"]):
            entry["category_id"] = (list(used) or list(names))[number % len(used or names)]

    return change


def test_spelling_does_not_keep_names_apart(coco: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("TV-Monitor\nfire_hydrant\n")
    rewrite(coco, with_categories({5: "fire hydrant", 7: "tv"}))
    assert class_to_category(read_dataset(coco), 2, labels) == {2: 5, 1: 7}
    rewrite(coco, with_categories({5: "Tv", 7: "tv"}))  # two categories to their author
    with pytest.raises(DatasetError, match="does not name 'Tv'"):
        class_to_category(read_dataset(coco), 2, labels)


PARENT = {0: "insects", 1: "ant", 2: "bee"}  # as Roboflow writes it


def test_a_category_without_annotations_and_without_a_class_is_left_out(coco: Path, tmp_path: Path) -> None:
    rewrite(coco, with_categories(PARENT, used=(1, 2)))
    labels, dataset = tmp_path / "labels.txt", read_dataset(coco)
    labels.write_text("ant\nbee\n")
    for categories in (class_to_category(dataset, 2, None), class_to_category(dataset, 2, labels)):
        assert categories == {1: 1, 2: 2}
        assert left_out(dataset, categories) == [
            "category 0 (insects) has no annotations and no class: left out"
        ]
    assert left_out(dataset, {1: 0, 2: 1, 3: 2}) == []
    rewrite(coco, with_categories({0: "ant", 1: "ant", 2: "bee"}, used=(1, 2)))  # called like its child
    assert class_to_category(read_dataset(coco), 2, labels) == {1: 1, 2: 2}
    rewrite(coco, with_categories({1: "bee", 2: "ant"}, used=(2,)))
    assert class_to_category(read_dataset(coco), 2, labels) == {1: 2, 2: 1}  # unused, but it has a class


def test_a_category_with_annotations_is_never_left_out(coco: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("ant\nbee\n")
    for used in ((0, 1), ()):
        rewrite(coco, with_categories(PARENT, used))
        with pytest.raises(DatasetError, match=r"category id 0 \(insects\), but the model has"):
            class_to_category(read_dataset(coco), 2, None)
        with pytest.raises(DatasetError, match="does not name 'insects'"):
            class_to_category(read_dataset(coco), 2, labels)
    rewrite(coco, lambda data: (with_categories(PARENT)(data), data.update(annotations=[])))
    with pytest.raises(DatasetError, match="category id 0"):  # no annotations: nothing says that it is unused
        class_to_category(read_dataset(coco), 2, None)


def test_the_models_own_names(coco: Path) -> None:
    rewrite(coco, with_categories({1: "ant", 2: "bee"}))
    dataset = read_dataset(coco)
    assert class_to_category(dataset, 2, None, ("ant", "bee")) == {1: 1, 2: 2}
    assert class_to_category(dataset, 2, None, ("bee", "Ant")) == {1: 2, 2: 1}  # names decide
    assert class_to_category(dataset, 2, None, ("ant", "")) == {1: 1, 2: 2}  # not all are named
    with pytest.raises(DatasetError, match="the label map of the model does not name 'bee'"):
        class_to_category(dataset, 2, None, ("ant", "wasp"))
    rewrite(coco, with_categories({0: "ant", 1: "bee"}))
    assert class_to_category(read_dataset(coco), 2, None, ("ant", "bee")) == {1: 0, 2: 1}


def test_results_have_the_ids_of_the_categories() -> None:
    found = {
        "boxes": torch.tensor([[1.0, 2.0, 4.0, 8.0]] * 2),
        "scores": torch.tensor([0.75, 0.5]),
        "labels": torch.tensor([3, 2]),
    }
    expected = {"image_id": "a", "bbox": [1.0, 2.0, 3.0, 6.0]}
    assert to_results("a", found, {3: 0}) == [{**expected, "category_id": 0, "score": 0.75}]
    assert [row["category_id"] for row in to_results("a", found)] == [3, 2]
    found["boxes"][0, 2] = torch.inf
    assert [row["category_id"] for row in to_results("a", found)] == [2]


def test_test_dev_files() -> None:
    assert server_file_name("efficientdet-d7") == "detections_test-dev2017_efficientdet-d7_results.json"
    for name in ("", "a_b", "a/b", "a b"):
        with pytest.raises(EfficientDetError, match=r"--test-dev .*; give letters"):
            server_file_name(name)
    (row,) = server_results([box(0.123456, 7.0, score=0.98765)])
    assert (row["bbox"][0], row["score"]) == (0.12, 0.988)


# --- hyper-parameters ---------------------------------------------------------------------------------


def test_hparams_reach_suppression_and_size() -> None:
    config = model_config("efficientdet-d0")
    text = "nms_configs.method=hard,nms_configs.max_nms_inputs=0,image_size=640x512,num_classes=90"
    nms, size = nms_and_size(read_hparams(text), config)
    assert nms == NMSConfig(method="hard", max_nms_inputs=0)
    assert size == (512, 640)
    assert nms_and_size(read_hparams(""), config) == (NMSConfig(), (512, 512))


def test_global_suppression_takes_the_settings_of_exported_models() -> None:
    config = model_config("efficientdet-d0")
    assert nms_and_size(read_hparams(""), config, "global")[0] == NMSConfig(scope="global", max_nms_inputs=0)
    read = read_hparams("nms_configs.max_nms_inputs=50,nms_configs.method=hard")
    expected = NMSConfig(scope="global", max_nms_inputs=50, method="hard")
    assert nms_and_size(read, config, "global")[0] == expected


@pytest.mark.parametrize("text", ["num_classes=20", "anchor_scale=5.0", "name=efficientdet-d1"])
def test_hparams_of_another_network(text: str) -> None:
    with pytest.raises(ConfigError, match=r"the weights"):
        nms_and_size(read_hparams(text), model_config("efficientdet-d0"))


# --- shards -------------------------------------------------------------------------------------------


def test_any_later_process_reads_all_shards(tmp_path: Path) -> None:
    settings_ = {"decoder": "pillow", "size": (1, 2)}
    for rank, batch in ((0, 0), (1, 1), (0, 2)):
        Shards(tmp_path / "s", "ours", settings_).append(rank, batch, {"n": batch})
    assert Shards(tmp_path / "s", "ours", settings_).read() == {n: {"n": n} for n in range(3)}
    assert Shards(tmp_path / "s", "reference", settings_).read() == {}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_loses_the_last_batch_only(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shards = Shards(tmp_path_factory.mktemp("cut") / "s", "ours", {"decoder": "pillow"})
    for batch in range(3):
        shards.append(0, batch, [0.1] * batch)
    (file,) = shards.files()
    whole = file.read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    file.write_bytes(whole[:size])
    complete = max(0, whole[:size].count(b"\n") - 1)
    assert sorted(shards.read()) == list(range(complete))
    shards.append(0, complete, "again")
    assert shards.read() == {**{n: [0.1] * n for n in range(complete)}, complete: "again"}


def test_other_settings_are_rejected_by_name(tmp_path: Path) -> None:
    Shards(tmp_path / "s", "ours", {"decoder": "pillow", "tta": "none"}).append(0, 0, 1)
    other = Shards(tmp_path / "s", "ours", {"decoder": "fast-dct", "tta": "none"})
    with pytest.raises(ShardError, match=r"decoder: pillow there, fast-dct now.*--restart"):
        other.read()
    other.clear()
    assert other.read() == {}


def test_what_differs_is_said_in_words(tmp_path: Path) -> None:
    """Not by a digest, and not by the beginning of a dictionary."""
    before = {
        "weights": "a" * 64,
        "config": "a" * 64,
        "pictures": "a" * 64,
        "nms_configs": {"method": "gaussian", "scope": "per-class"},
        "categories": {str(n): n for n in range(9)},
    }
    now = {
        "weights": "b" * 64,
        "config": "b" * 64,
        "pictures": "b" * 64,
        "nms_configs": {"method": "gaussian", "scope": "global"},
        "categories": {str(n): n + 1 for n in range(9)},
    }
    Shards(tmp_path / "s", "ours", before).append(0, 0, 1)
    with pytest.raises(ShardError) as caught:
        Shards(tmp_path / "s", "ours", now).read()
    text = str(caught.value)
    assert "aaa" not in text
    assert "bbb" not in text
    for part in (
        "weights: other values",
        "config: another configuration of the model",
        "pictures: other images, by their list, names or content",
        "nms_configs.scope: per-class there, global now",
        "categories.0: 0 there, 1 now",
        "and 6 more of categories",
    ):
        assert part in text


def test_any_changed_bit_of_kept_results_is_rejected(tmp_path: Path) -> None:
    """Every bit of a file. Without its newline the last line counts as incomplete and is ignored."""
    shards = Shards(tmp_path / "s", "ours", {"decoder": "pillow"})
    for batch in range(2):
        shards.append(0, batch, [0.5, "a", 7])
    (file,) = shards.files()
    whole, kept = file.read_bytes(), shards.read()
    accepted, messages = [], set()
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            found = shards.read()
        except ShardError as error:
            messages.add(str(error))
        else:
            accepted.append(bit // 8)
            assert found == {0: kept[0]}
    print(f"{8 * len(whole)} bits; accepted as incomplete: {len(accepted)}")
    assert accepted == [len(whole) - 1] * 8
    (message,) = messages
    assert "ours-0.jsonl is damaged" in message
    assert "--restart" in message


def test_lines_of_another_evaluation_are_rejected(tmp_path: Path) -> None:
    mine, other = (Shards(tmp_path / name, "ours", {"tta": name}) for name in ("none", "flip"))
    for shards in (mine, other):
        shards.append(0, 0, shards.folder.name)
    (file,), (another,) = mine.files(), other.files()
    file.write_bytes(file.read_bytes() + another.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(ShardError, match=r"ours-0\.jsonl is damaged"):
        mine.read()


def test_results_without_checksums_are_rejected(tmp_path: Path) -> None:
    """Older versions wrote them."""
    shards = Shards(tmp_path, "ours", {})
    (tmp_path / "ours-0.jsonl").write_text('{"settings": {}}\n{"batch": 0, "content": 1}\n')
    with pytest.raises(ShardError, match=r"an older version of this tool wrote it; --restart"):
        shards.read()


def first_image(kept: dict[str, Any]) -> dict[str, Any]:
    image: dict[str, Any] = kept["content"]["pictures"][0]
    return image


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a batch too many": lambda kept: kept.update(batch=77),
    "the last batch, counted from behind": lambda kept: kept.update(
        batch=-1, content={"pictures": [{**first_image(kept), "id": 60}], "unreadable": []}
    ),
    "a batch without a number": lambda kept: kept.update(batch=[0]),
    "another batch": lambda kept: kept.update(batch=1),
    "nothing": lambda kept: kept.update(content={}),
    "not an object": lambda kept: kept.update(content=None),
    "a missing image": lambda kept: kept["content"]["pictures"].pop(),
    "an image twice": lambda kept: kept["content"]["pictures"].append(first_image(kept)),
    "another image": lambda kept: first_image(kept).update(id=20),
    "half a detection": lambda kept: first_image(kept).update(detections=[[1]]),
    "text for a score": lambda kept: first_image(kept)["detections"][0].append("1"),
    "a box in words": lambda kept: first_image(kept).update(detections=[[1, "2", 3, 4, 5, 6]]),
    "no decoder": lambda kept: first_image(kept).update(decoder=None),
    "no comparison of sizes": lambda kept: first_image(kept).update(size_differs=0),
    "no reason": lambda kept: kept["content"].update(
        unreadable=[[kept["content"]["pictures"].pop()["id"], None]]
    ),
}


@pytest.fixture(scope="module")
def four_batches(small_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with coco/ and out/, a complete evaluation of it."""
    folder = tmp_path_factory.mktemp("kept")
    make_coco(folder / "coco")
    assert run(small_weights, folder / "coco", folder / "out") == 0
    return folder


@pytest.mark.parametrize("case", FORGED)
def test_kept_results_must_fit_the_images(
    four_batches: Path, small_weights: Path, case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """They are checked even if the checksum is right."""
    out = Path(shutil.copytree(four_batches / "out", tmp_path / "out"))
    (file,) = (out / "shards").iterdir()
    first, line = [json.loads(line) for line in file.read_text().splitlines()[:2]]
    FORGED[case](line)
    file.unlink()
    Shards(out / "shards", "ours", first["settings"]).append(0, line["batch"], line["content"])
    before = (out / "metrics.json").read_bytes()
    assert run(small_weights, four_batches / "coco", out) == 2
    assert "is damaged, or an older version of this tool wrote it; --restart" in capsys.readouterr().err
    assert (out / "metrics.json").read_bytes() == before


def test_a_changed_coordinate_is_rejected_until_restart(
    four_batches: Path, small_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(four_batches / "out", tmp_path / "out"))
    (file,) = (out / "shards").iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[1]["content"]["pictures"][0]["detections"][0][1] += 200
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run(small_weights, four_batches / "coco", out) == 2
    assert "ours-0.jsonl is damaged" in capsys.readouterr().err
    assert run(small_weights, four_batches / "coco", out, "--restart") == 0
    for name in ("detections.json", "metrics.json"):
        assert (out / name).read_bytes() == (four_batches / "out" / name).read_bytes()


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("a file where the folder belongs")
    with pytest.raises(OutputError, match="cannot write"):
        Shards(tmp_path / "s", "ours", {}).append(0, 0, 1)
    (tmp_path / "t/ours-0.jsonl").mkdir(parents=True)
    shards = Shards(tmp_path / "t", "ours", {})
    with pytest.raises(OutputError, match=r"cannot remove .*ours-0\.jsonl: .*; remove it, or choose"):
        shards.clear()
    with pytest.raises(ShardError, match=r"cannot read .*ours-0\.jsonl: .*; choose another --out"):
        shards.read()


def test_kept_results_are_files(tmp_path: Path, pipe: Path) -> None:
    pipe.rename(tmp_path / "ours-0.jsonl")
    with pytest.raises(ShardError, match="it is a pipe or a device, not a file; choose another --out"):
        Shards(tmp_path, "ours", {}).read()


# --- the command --------------------------------------------------------------------------------------


def test_results_metrics_and_table(
    small_weights: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(small_weights, coco, out, "--per-class", "--test-dev", "mine", "--json") == 0
    printed = capsys.readouterr()
    metrics, told = read(out / "metrics.json"), json.loads(printed.out)
    assert told.pop("speed")["images"] == COUNT  # of this run, so it is not among the figures in the file
    assert told == metrics
    assert set(metrics["ours"]) == set(FIGURES)
    assert metrics["pictures"] == COUNT
    assert metrics["decoders"] == {"pillow": COUNT}
    assert set(metrics["per_class"]["ours"]) == {"1", "2", "90"}
    assert "ARmax100" in printed.err
    assert "90 toothbrush" in printed.err
    assert "read by pillow (7)" in printed.err
    assert " images/s; wrote" in printed.err
    results = read(out / "detections.json")
    assert {row["category_id"] for row in results} <= {1, 2, 90}
    expected = Detector(load_model(small_weights))([coco / "val2017/0.png", coco / "val2017/1.png"])[1]
    rows = to_results(10, expected, {1: 1, 2: 2, 90: 90})
    assert [row for row in results if row["image_id"] == 10] == rows
    assert len(read(out / server_file_name("mine"))) == len(results)


def test_an_evaluation_as_a_library_call(small_weights: Path, coco: Path, tmp_path: Path) -> None:
    """The files of the command, without a console."""
    heard: list[tuple[int, int | None]] = []

    class Listener:
        def progress(self, done: int, total: int | None) -> None:
            heard.append((done, total))

    assert run(small_weights, coco, tmp_path / "command", "--per-class") == 0
    out, dataset = tmp_path / "call", read_dataset(coco)
    options = EvaluationOptions(small_weights, out, batch_size=2, per_class=True)
    detector, categories = Detector(load_model(small_weights)), class_to_category(dataset, 90, None)
    for expected in ([(0, 7), (2, 7), (4, 7), (6, 7), (7, 7)], [(0, 0)]):  # the second call resumes
        heard.clear()
        result = evaluate_dataset(detector, dataset, categories, options, listener=Listener())
        assert heard == expected
        assert result is not None
        assert result.passed
        for name in ("detections.json", "metrics.json"):
            assert (out / name).read_bytes() == (tmp_path / "command" / name).read_bytes()
        assert result.metrics.figures["ours"] == result.evaluations["ours"].figures


def test_metrics_are_read_as_they_were_written(small_weights: Path, coco: Path, tmp_path: Path) -> None:
    (coco / "val2017/1.png").unlink()
    assert run(small_weights, coco, tmp_path / "out", "--per-class") == 1
    metrics = Metrics.parse(read_metrics(tmp_path / "out/metrics.json"))
    assert metrics.content() == read(tmp_path / "out/metrics.json")
    assert metrics.images == COUNT - 1
    assert metrics.weights_sha256 == hashlib.sha256(small_weights.read_bytes()).hexdigest()


def test_options_that_cannot_be_used(small_weights: Path, coco: Path, tmp_path: Path) -> None:
    with pytest.raises(EfficientDetError, match="--test-dev 'a/b'"):
        EvaluationOptions(small_weights, tmp_path, test_dev="a/b")
    detector, dataset = Detector(load_model(small_weights)), read_dataset(coco)
    with pytest.raises(ConfigError, match="batch_size is 0, must be at least 1"):
        evaluate_dataset(detector, dataset, {1: 1}, EvaluationOptions(small_weights, tmp_path, batch_size=0))


@pytest.mark.parametrize("engine", ["eager", "folded"])
def test_the_metrics_name_the_engine(engine: str, small_weights: Path, coco: Path, tmp_path: Path) -> None:
    found = tmp_path / "found"
    threads = torch.get_num_threads()
    try:
        assert run(small_weights, coco, found, "--engine", engine, "--threads", "1", "--limit", "2") == 0
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert read(found / "metrics.json")["settings"]["ours"]["engine"] == engine
    other = "eager" if engine == "folded" else "folded"
    assert run(small_weights, coco, found, "--engine", other, "--limit", "2") == 2  # it cannot be resumed


def test_a_folder_of_weights(small_weights: Path, coco: Path, tmp_path: Path) -> None:
    """A folder from save_pretrained, whose configuration is a file next to the tensors, is a setting too."""
    folder, out = tmp_path / "mine", tmp_path / "out"
    load_model(small_weights).save_pretrained(folder)
    assert run(folder, coco, out) == 0
    assert run(small_weights, coco, tmp_path / "file") == 0
    assert read(out / "detections.json") == read(tmp_path / "file/detections.json")
    noted = read(out / "metrics.json")["settings"]["ours"]
    assert noted["weights"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


class KilledError(Exception):
    pass


def test_a_killed_run_resumes(
    small_weights: Path, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(small_weights, coco, tmp_path / "whole") == 0
    append, compute = Shards.append, Detector.compute
    calls = 0

    def die_writing_the_third(self: Shards, process: int, batch: int, content_: Any) -> None:
        append(self, process, batch, content_)
        if batch == 2:
            (file,) = self.files()
            file.write_bytes(file.read_bytes()[:-40])
            raise KilledError

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return compute(*arguments)

    monkeypatch.setattr(Shards, "append", die_writing_the_third)
    with pytest.raises(KilledError):
        run(small_weights, coco, tmp_path / "killed")
    assert not (tmp_path / "killed/metrics.json").exists()
    monkeypatch.setattr(Shards, "append", append)
    monkeypatch.setattr(Detector, "compute", counted)
    assert run(small_weights, coco, tmp_path / "killed") == 0
    assert calls == 2  # batches 2 and 3; 0 and 1 were kept
    for name in ("detections.json", "metrics.json"):
        assert read(tmp_path / "killed" / name) == read(tmp_path / "whole" / name)
    assert run(small_weights, coco, tmp_path / "killed", "--per-class") == 0
    assert calls == 2


def test_all_that_detections_depend_on_is_a_setting(small_weights: Path, coco: Path) -> None:
    model, dataset, classes = load_model(small_weights), read_dataset(coco), {1: 1}
    plain = settings_of(Detector(model), dataset, 8, classes, "w")

    def changed(**options: Any) -> set[str]:
        detector = Detector(model, **options.pop("detector", {}))
        given_ = {"dataset": dataset, "batch_size": 8, "categories": classes, "weights": "w", **options}
        other = settings_of(detector, **given_)
        return {key for key in plain if plain[key] != other[key]}

    assert changed() == set()
    for nms in ({"method": "hard"}, {"sigma": 0.25}, {"score_thresh": 0.1}, {"scope": "global"}):
        assert changed(detector={"nms": NMSConfig(**nms)}) == {"nms_configs"}
    assert changed(detector={"decoder": "fast-dct"}) == {"decoder"}
    assert changed(detector={"tta": "flip"}) == {"tta"}
    assert changed(detector={"engine": "eager"}) == {"engine"}
    assert changed(detector={"image_size": (64, 32)}) == {"image_size"}
    assert changed(batch_size=4) == {"batch_size"}
    assert changed(categories={1: 2}) == {"categories"}
    assert changed(weights="v") == {"weights"}
    assert changed(dataset=read_dataset(coco, limit=3)) == {"pictures"}


def test_another_setting_is_rejected_until_restart(
    small_weights: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(small_weights, coco, out) == 0
    before = (out / "metrics.json").read_bytes()
    assert run(small_weights, coco, out, "--tta", "flip") == 2
    assert "tta: none there, flip now" in capsys.readouterr().err
    assert (out / "metrics.json").read_bytes() == before
    assert run(small_weights, coco, out, "--tta", "flip", "--restart") == 0
    assert read(out / "metrics.json")["settings"]["ours"]["tta"] == "flip"


def test_the_scope_of_suppression_is_kept_with_the_results(
    small_weights: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(small_weights, coco, out, "--nms", "global") == 0
    assert "suppressed across classes" in capsys.readouterr().out
    kept = read(out / "metrics.json")["settings"]["ours"]["nms_configs"]
    assert (kept["scope"], kept["max_nms_inputs"]) == ("global", 0)
    assert run(small_weights, coco, out) == 2
    assert "nms_configs.scope: global there, per-class now" in capsys.readouterr().err
    assert run(small_weights, coco, out, "--nms", "global") == 0


def test_an_image_that_appears_later_changes_the_settings(
    small_weights: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = coco / "val2017" / "1.png"
    content = picture.read_bytes()
    picture.unlink()
    assert run(small_weights, coco, tmp_path / "out") == 1
    picture.write_bytes(content)
    assert run(small_weights, coco, tmp_path / "out") == 2
    assert "pictures:" in capsys.readouterr().err
    assert run(small_weights, coco, tmp_path / "out", "--restart") == 0


def test_another_image_of_the_same_name_and_size_changes_the_settings(
    small_weights: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Uncompressed images of the same dimensions have the same number of bytes."""

    def paint(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for i in range(COUNT):
            pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(coco / "val2017" / f"{i}.bmp")

    rewrite(coco, lambda c: [entry.update(file_name=f"{i}.bmp") for i, entry in enumerate(c["images"])])
    paint(1)
    assert run(small_weights, coco, tmp_path / "out") == 0
    paint(2)
    assert run(small_weights, coco, tmp_path / "out") == 2
    assert "pictures:" in capsys.readouterr().err
    paint(1)
    assert run(small_weights, coco, tmp_path / "out") == 0


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png", "q" * 300 + ".png", "", "/dev/zero", "pipe"])
def test_names_that_no_image_can_have_are_skipped(
    small_weights: Path, coco: Path, tmp_path: Path, pipe: Path, name: str
) -> None:
    pipe.rename(coco / "val2017" / "pipe")
    rewrite(coco, lambda c: c["images"][1].update(file_name=name))
    assert run(small_weights, coco, tmp_path / "out") == 1
    metrics = read(tmp_path / "out" / "metrics.json")
    assert (metrics["pictures"], list(metrics["skipped"])) == (COUNT - 1, ["10"])


def test_annotations_are_a_file(coco: Path, pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(DatasetError, match="it is a pipe or a device, not a file"):
            read_dataset(coco, path)
    monkeypatch.setattr(dataset_module, "MOST_BYTES", 100)
    with pytest.raises(DatasetError, match=r"cannot read the annotations .* more than 100 bytes"):
        read_dataset(coco)


def test_the_folder_of_the_images_is_not_a_setting(small_weights: Path, coco: Path, tmp_path: Path) -> None:
    assert run(small_weights, coco, tmp_path / "out") == 0
    metrics = (tmp_path / "out" / "metrics.json").read_bytes()
    coco.rename(tmp_path / "elsewhere")
    assert run(small_weights, tmp_path / "elsewhere", tmp_path / "out") == 0
    assert (tmp_path / "out" / "metrics.json").read_bytes() == metrics


def test_restart_discards_all_of_an_earlier_run(
    small_weights: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """This includes a reference's detections and the server's file, which the new run does not write."""
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    stale = (
        "reference_detections.json",
        "detections_test-dev2017_a_results.json",
        "shards/reference-0.jsonl",
    )
    for name in (*stale, "notes.txt"):
        (out / name).write_text("[]")
    assert run(small_weights, coco, out, "--restart") == 0
    left = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert left == {".lock", "detections.json", "metrics.json", "notes.txt", "shards/ours-0.jsonl"}
    (out / "metrics.json").unlink()
    (out / "metrics.json").mkdir()
    assert run(small_weights, coco, out, "--restart") == 2
    assert "cannot remove" in capsys.readouterr().err


def test_a_reference_without_detections_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    print_parity(Console(width=100), compare_detections([], []), exact=True)
    printed = capsys.readouterr().out
    assert "FAILED detection parity: the reference found nothing" in printed
    assert "must be" not in printed


def test_two_processes_find_the_same(small_weights: Path, coco: Path, tmp_path: Path) -> None:
    """Started by torchrun, as a user would; two processes also resume what one process began."""
    assert run(small_weights, coco, tmp_path / "one") == 0
    shutil.copytree(tmp_path / "one", tmp_path / "half")
    (file,) = (tmp_path / "half/shards").iterdir()
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:2]))  # the first batch of four
    for out in ("two", "half"):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        arguments = ["--weights", small_weights, "--coco", coco, "--out", tmp_path / out, "--batch-size", "2"]
        done = subprocess.run(
            [*command, EVAL_COCO, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("ARmax100") == 1
        kept = [file.read_text().splitlines() for file in (tmp_path / out / "shards").iterdir()]
        assert len(kept) == 2
        assert sum(len(lines) - 1 for lines in kept) == 4  # each batch once, in either
        for name in ("detections.json", "metrics.json"):
            assert (tmp_path / out / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.parametrize(
    ("talk", "call"), [("broadcast_object_list", "from_first"), ("gather_object", "to_first")]
)
def test_a_process_that_dies_ends_the_others(talk: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*arguments: Any, **more: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, talk, closed)
    with pytest.raises(EfficientDetError, match="another process has stopped"):
        getattr(Processes(rank=1, count=2), call)(None)


def test_processes_that_do_not_find_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(EfficientDetError, match=r"cannot connect.*torchrun"), joined():
        pass


def test_two_processes_report_a_mistake_once(small_weights: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["--weights", str(small_weights), "--coco", str(tmp_path / "nowhere")]
    done = subprocess.run([*command, EVAL_COCO, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.count("nowhere is not a folder") == 1
    assert "RuntimeError" not in done.stderr


def test_bad_images_are_skipped_and_counted(
    small_weights: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = coco / "val2017"
    (pictures / "1.png").unlink()
    (pictures / "2.png").write_bytes((pictures / "2.png").read_bytes()[:300])
    Image.new("RGB", (20_000, 1)).save(pictures / "3.png")
    Image.new("L", (1, 1)).save(pictures / "4.png")
    out = tmp_path / "out"
    assert run(small_weights, coco, out) == 1
    printed = capsys.readouterr().out
    metrics = read(out / "metrics.json")
    assert metrics["pictures"] == COUNT - 3
    assert list(metrics["skipped"]) == ["10", "20", "30"]
    assert metrics["size_differs"] == [40]
    assert "3 images skipped" in printed
    assert "too long and thin" in printed
    assert "1 images differ in size" in printed


def test_without_annotations_there_are_no_figures(
    small_weights: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(coco, lambda data: data.pop("annotations"))
    assert run(small_weights, coco, tmp_path / "out") == 0
    assert "holds no annotations: no figures" in capsys.readouterr().out
    assert "ours" not in read(tmp_path / "out/metrics.json")
    assert read(tmp_path / "out/detections.json")


REJECTED = {
    "limit": (["--limit", "0"], "--limit is 0"),
    "reference without checkpoint": (["--reference", "ops"], "--reference and --ckpt go together"),
    "test-dev name": (["--test-dev", "a/b"], "--test-dev"),
    "empty test-dev name": (["--test-dev", ""], "--test-dev"),
    "hparams": (["--hparams", "num_classes=20"], "--hparams say num_classes=20"),
    "labels": (["--labels", "nowhere.txt"], "nowhere.txt cannot be read: No such file"),
    "device": (["--device", "abacus"], "--device abacus cannot be used"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_bad_options_are_rejected(
    small_weights: Path, coco: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more, message = REJECTED[case]
    assert run(small_weights, coco, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_ops_reference(
    tensorflow: object, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Synthetic Lite0 compared with its own checkpoint, then with other weights."""
    from porting.convert import apply_rules
    from porting.rules import rules
    from porting.sources.open import write_synthetic
    from porting.synthetic import synthetic_variables

    checkpoint = write_synthetic("efficientdet-lite0", tmp_path)
    config = model_config("efficientdet-lite0", image_size=(64, 64))
    path = tmp_path / "lite0.safetensors"
    state_dict = apply_rules(rules(config), synthetic_variables(model_config("efficientdet-lite0")))
    write_weights(path, state_dict, config, {})
    reference = ["--reference", "ops", "--ckpt", str(checkpoint), "--limit", "2"]
    assert run(path, coco, tmp_path / "same", *reference) == 0
    printed = capsys.readouterr().out
    assert "passed detection parity: AP 1.0000" in printed
    metrics = read(tmp_path / "same/metrics.json")
    assert metrics["reference"] == metrics["ours"]
    assert set(metrics["difference"].values()) == {0.0}
    assert (tmp_path / "same/reference_detections.json").is_file()
    assert run(path, coco, tmp_path / "raw", *reference, "--raw") == 1
    assert "FAILED detection parity" in capsys.readouterr().out
    assert not read(tmp_path / "raw/metrics.json")["detection_parity"]["passed"]


def test_a_tflite_reference(
    tensorflow: object, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recorded float file: its port has the same detections as the file run by TensorFlow Lite."""
    from porting.checkpoint.tflite.checkpoint import TFLiteCheckpoint
    from porting.convert import convert
    from porting.infer import infer_config

    file = GOLDENS / "tiny-lite-float32.tflite"
    checkpoint = TFLiteCheckpoint(file)
    config = infer_config(checkpoint.shapes, settings=checkpoint.settings).config
    path = tmp_path / "tiny.safetensors"
    write_weights(path, convert(checkpoint, config).state_dict, config, {})
    ids = range(1, config.num_classes + 1)
    rewrite(
        coco,
        lambda data: data.update(categories=[{"id": i, "name": f"c{i}"} for i in ids], annotations=[]),
    )
    assert run(path, coco, tmp_path / "out", "--reference", "tflite", "--ckpt", str(file)) == 0
    parity = read(tmp_path / "out/metrics.json")["detection_parity"]
    print(parity)
    assert parity["passed"]
    assert parity["score_largest"] <= 1e-4
    assert "passed detection parity" in capsys.readouterr().out
    more = ["--reference", "tflite", "--ckpt", str(file), "--hparams", "image_size=64"]
    assert run(path, coco, tmp_path / "other", *more) == 2
    assert "takes images of 96×72; give --hparams image_size=72x96" in capsys.readouterr().err


def test_a_saved_model_as_reference(
    tensorflow: Any, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network saved by TensorFlow has the detections of its port; a network with other weights has not."""
    from parity_tests.helpers.small_models import built, small
    from porting.convert import apply_rules
    from porting.rules import rules
    from porting.synthetic import synthetic_variables

    v1, config = tensorflow.compat.v1, small()
    for seed, folder in enumerate(("mine", "other")):
        graph, _ = built(tensorflow, config, synthetic_variables(config, seed))
        with graph.as_default(), v1.Session(graph=graph) as session:
            session.run(v1.global_variables_initializer())
            builder = v1.saved_model.Builder(str(tmp_path / folder))
            builder.add_meta_graph_and_variables(session, ["serve"])
            builder.save()
    path = tmp_path / "small.safetensors"
    write_weights(path, apply_rules(rules(config), synthetic_variables(config)), config, {})
    categories = [{"id": i, "name": f"c{i}"} for i in range(1, config.num_classes + 1)]
    rewrite(coco, lambda data: data.update(categories=categories, annotations=[]))
    reference = ["--reference", "savedmodel", "--ckpt", str(tmp_path / "mine")]
    assert run(path, coco, tmp_path / "out", *reference) == 0
    assert "passed detection parity" in capsys.readouterr().out
    assert run(path, coco, tmp_path / "out", *reference, "--graph", str(tmp_path / "other")) == 2
    assert "weights: " in capsys.readouterr().err  # they differ from those of the run kept there
    assert run(path, coco, tmp_path / "no", *reference, "--graph", str(tmp_path / "other")) == 1
    assert "FAILED detection parity" in capsys.readouterr().out


def test_a_file_that_takes_one_image_at_a_time(tensorflow: object) -> None:
    from porting.parity.reference.networks import file_network

    class OneAtATime:
        source, size, exact, taps = "one.meta", None, True, frozenset[str]()

        def on(self, images: np.ndarray) -> Any:
            raise ValueError("Cannot reshape\nat length")

    network = file_network(OneAtATime(), model_config("efficientdet-d0"))
    message = r"one.meta on 2 images at once \(Cannot reshape\); try --batch-size 1"
    with pytest.raises(EfficientDetError, match=message):
        network(torch.zeros(2, 3, 64, 64))


OUT_OF_MEMORY = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nGPU 0 has"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    "python": MemoryError(),
}


@pytest.mark.parametrize("where", OUT_OF_MEMORY)
def test_out_of_memory_is_one_sentence(
    where: str,
    small_weights: Path,
    coco: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raised: list[BaseException] = [OUT_OF_MEMORY[where], RuntimeError("a bug stays a bug")]

    def full(*_: Any) -> None:
        raise raised.pop(0)

    monkeypatch.setattr(Detector, "_network", full)
    assert run(small_weights, coco, tmp_path / "out") == 2
    assert capsys.readouterr().err == "error: out of memory; try a smaller --batch-size or --size\n"
    with pytest.raises(RuntimeError, match="a bug stays a bug"):
        run(small_weights, coco, tmp_path / "out")


def test_help_has_examples() -> None:
    done = subprocess.run([sys.executable, EVAL_COCO, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "torchrun --nproc-per-node=8" in done.stdout


def test_an_output_folder_that_cannot_be_used(
    small_weights: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run(small_weights, coco, tmp_path / "file/out") == 2
    assert "cannot create the folder" in capsys.readouterr().err
    (tmp_path / "out/.lock").mkdir(parents=True)
    assert run(small_weights, coco, tmp_path / "out") == 2
    assert "out: Is a directory; choose another folder" in capsys.readouterr().err


def test_no_readable_image(
    small_weights: Path, coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (coco / "val2017").iterdir():
        file.write_bytes(b"not an image")
    assert run(small_weights, coco, tmp_path / "out") == 1
    assert "7 images skipped" in capsys.readouterr().out
    assert read(tmp_path / "out/metrics.json")["pictures"] == 0
