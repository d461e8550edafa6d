"""Class names: which forms of label files are read, and which class each name belongs to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pytest

from pytorch_model.config import model_config
from pytorch_model.detection import labels
from pytorch_model.detection.labels import find_names
from pytorch_model.errors import EfficientDetError, Reason
from pytorch_model.formats.protobuf_text import unescaped
from pytorch_model.labels.classes import class_names
from pytorch_model.labels.files import FORMS, parse_names
from pytorch_model.labels.known import COCO_NAMES, LABEL_MAPS, canonical

COCO_80 = [name for name in COCO_NAMES if name]
COCO_90 = tuple(COCO_NAMES)


def lines(names: Iterable[object]) -> str:
    return "".join(f"{name}\n" for name in names)


def holes(mark: str) -> list[str]:
    """COCO's names, with ``mark`` where an id has none."""
    return [name or mark for name in COCO_NAMES]


def respelled() -> list[str]:
    """COCO's 80 as Darknet's files have them, and in capitals."""
    other = {
        "motorcycle": "motorbike",
        "airplane": "aeroplane",
        "tv": "tvmonitor",
        "couch": "sofa",
        "potted plant": "pottedplant",
        "dining table": "diningtable",
        "cell phone": "Cell-Phone",
        "hair drier": "hair dryer",
        "donut": "doughnut",
        "hot dog": "hot_dog",
        "refrigerator": "REFRIGERATOR",
    }
    return [other.get(name, name) for name in COCO_80]


# --- COCO ---------------------------------------------------------------------------------------------

COCO_FILES = {
    "80 names": lines(COCO_80),
    "80 names and an empty line": lines([*COCO_80, ""]),
    "80 after the background": lines(["__background__", *COCO_80]),
    "80 in JSON": json.dumps(COCO_80),
    "80 in YAML": "names: [" + ", ".join(COCO_80) + "]\nnc: 80\n",
    "80 from 0, spaces": lines(f"{i}  {name}" for i, name in enumerate(COCO_80)),
    "80 from 0, colons": lines(f"{i}: {name}" for i, name in enumerate(COCO_80)),
    "80 from 0, commas": lines(f"{i},{name}" for i, name in enumerate(COCO_80)),
    "80 from 0, names first": lines(f"{name},{i}" for i, name in enumerate(COCO_80)),
    "80 from 1": lines(f"{i}: {name}" for i, name in enumerate(COCO_80, start=1)),
    "80 from 0, JSON": json.dumps(dict(enumerate(COCO_80))),
    "80 after the background, numbered": lines(f"{i}: {n}" for i, n in enumerate(["background", *COCO_80])),
    "90, N/A": lines(holes("N/A")),
    "90, ???": lines(holes("???")),
    "90, unlabeled": lines(holes("unlabeled")),
    "90, empty lines": lines(COCO_NAMES),
    "91 after __background__": lines(["__background__", *holes("N/A")]),
    "91 after ???": lines(["???", *holes("???")]),
    "91 in JSON": json.dumps(["__background__", *holes("N/A")]),
    "90 from 0, holes left out": lines(f"{i} {name}" for i, name in enumerate(COCO_NAMES) if name),
    "90 from 0, holes": lines(f"{i}  {name}" for i, name in enumerate(holes("n/a"))),
    "90 from 0, colons": lines(f"{i}: {name}" for i, name in enumerate(COCO_NAMES) if name),
    "90 from 1, holes left out": lines(f"{i}\t{name}" for i, name in enumerate(COCO_NAMES, 1) if name),
    "90 from 1, YAML": "0: background\n" + lines(f"{i}: {n}" for i, n in enumerate(COCO_NAMES, 1) if n),
    "label map": lines(f"item {{ name: '{n}' id: {i} }}" for i, n in enumerate(COCO_NAMES, 1) if n),
}


@pytest.mark.parametrize("form", COCO_FILES)
def test_every_form_of_cocos_names_on_90_classes(form: str) -> None:
    assert class_names(parse_names(COCO_FILES[form].encode()), 90) == COCO_90


def test_cocos_names_are_known_by_their_common_spellings() -> None:
    names = class_names(parse_names(lines(respelled()).encode()), 90)
    assert names[:5] == ("person", "bicycle", "car", "motorbike", "aeroplane")
    assert [bool(name) for name in names] == [bool(name) for name in COCO_NAMES]
    assert list(map(canonical, names)) == list(map(canonical, COCO_NAMES))


def test_cocos_80_on_80_classes_are_the_classes() -> None:
    for form in ("80 names", "80 from 0, spaces", "80 from 1", "80 after the background"):
        assert class_names(parse_names(COCO_FILES[form].encode()), 80) == tuple(COCO_80)


def test_some_of_cocos_names_counted_from_zero() -> None:
    assert class_names({12: "stop sign", 15: "bird"}, 90)[12:16] == ("stop sign", "", "", "bird")
    assert class_names({13: "stop sign", 16: "bird"}, 90)[12:16] == ("stop sign", "", "", "bird")


@pytest.mark.parametrize(
    ("names", "count"),
    [(sorted(COCO_80), 80), (COCO_80[:79], 79), ([*COCO_80, "extra"], 81), ([*COCO_NAMES, "extra"], 91)],
)
def test_other_lists_on_90_classes_are_refused_with_both_counts(names: Sequence[str], count: int) -> None:
    with pytest.raises(
        Reason, match=f"it lists {count} names, but the model has 90 classes; list one for each"
    ):
        class_names(parse_names(lines(names).encode()), 90)


# --- which class --------------------------------------------------------------------------------------

ANT, BEE = ("ant", "bee"), ("ant", "bee", "")

FILES: list[tuple[str, str, tuple[str, ...]]] = [
    ("lines", "ant\nbee\n", ANT),
    ("an empty line", "ant\n\nbee\n", ("ant", "", "bee")),
    ("a class without a name at the end", "ant\nbee\n\n", BEE),
    ("empty lines at the end", "ant\nbee\n\n\n", ANT),
    ("Windows", "ant\r\nbee\r\n", ANT),
    ("byte-order mark", "\ufeffant\nbee\n", ANT),
    ("after two for no class", "__ignore__\n_background_\nant\nbee\n", ANT),
    ("id: name", "1: ant\n2: 'bee'\n", ANT),
    ("some ids", "2: bee\n", ("", "bee", "", "")),
    ("ids from 0", "0: ant\n1: bee\n", ANT),
    ("ids from 0, one left out", "0: ant\n2: bee\n", ("ant", "", "bee")),
    ("background has the id 0", "0: background\n1: ant\n2: bee\n", BEE),
    ("??? has the id 0", "0 ???\n1 ant\n2 bee\n", ANT),
    ("spaces", "0  ant\n1  bee\n", ANT),
    ("spaces from 1", "1 ant\n2 bee\n", ANT),
    ("any order", "0 ant\n2 cat\n1 bee\n", ("ant", "bee", "cat")),
    ("descending from 1", "3 cat\n2 bee\n1 ant\n", ("ant", "bee", "cat")),
    ("descending from 0", "2 cat\n1 bee\n0 ant\n", ("ant", "bee", "cat")),
    ("dots", "0. ant\n1. bee\n", ANT),
    ("dots from 1", "1. ant\n2. bee\n", ANT),
    ("brackets", "1) ant\n2) bee\n", ANT),
    ("prices", "1.50 dollars\n2.50 pounds\n", ("1.50 dollars", "2.50 pounds")),
    ("commas", "0,ant\n1,bee\n", ANT),
    ("commas and a header", "class_id,name\n0,ant\n1,bee\n", ANT),
    ("tabs", "0\tant\n1\tbee\n", ANT),
    ("names first", "ant,0\nbee,1\n", ANT),
    ("names first, a header", "name;id\nant;1\nbee;2\n", ANT),
    ("colons after names", "ant: 0\nbee: 1\n", ANT),
    ("numbers in names", "50 km/h\n60 km/h\n", ("50 km/h", "60 km/h")),
    ("coins", "1 euro\n2 euro\n", ("1 euro", "2 euro")),
    ("doors", "2 doors\n4 wheels\n", ("2 doors", "4 wheels")),
    ("one number", "7 up\ncola\n", ("7 up", "cola")),
    ("digits", "0\n1\n", ("0", "1")),
    ("colons in names", "cat: big\ndog: small\n", ("cat: big", "dog: small")),
    ("called item", "item\nitem one {\n", ("item", "item one {")),
    ("JSON list", '["ant", "bee"]', ANT),
    ("JSON object", '{"2": "bee"}', ("", "bee")),
    ("JSON object from 0", '{"0": "ant", "1": "bee"}', ANT),
    ("JSON with names", '{"names": ["ant", "bee"]}', ANT),
    ("JSON with digits", '["ant", 0]', ("ant", "0")),
    ("JSON object with digits", '{"2": 7}', ("", "7")),
    ("Python list", "['ant', 'bee']", ANT),
    ("COCO", '{"categories": [{"id": 2, "name": "bee"}]}', ("", "bee")),
    ("COCO with digits", '{"categories": [{"id": 2, "name": 7}]}', ("", "7")),
    ("flow mapping", "{1: ant, 2: bee}", ANT),
    ("label_map in hparams, flow", "num_classes: 2\nlabel_map: {1: ant, 2: bee}\n", ANT),
    ("label_map in hparams, block", "label_map:\n  1: ant\n  2: bee\nmode: train\n", ANT),
    ("label_id_mapping", "label_id_mapping: {1: ant, 2: bee}\nlabel_map: null\n", ANT),
    ("obj_list", "project_name: x\nobj_list: ['ant', 'bee']\n", ANT),
    ("names in YAML", "nc: 2\nnames:\n- ant\n- bee\n", ANT),
    ("names from 0 in YAML", "names:\n  0: ant\n  1: bee\n", ANT),
    ("names that YAML would not take for text", "names: [no, 010, 1_0, 1.50]", ("no", "010", "1_0", "1.50")),
]


@pytest.mark.parametrize(("text", "expected"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_label_files(text: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_bytes(text.encode())
    found = find_names(tmp_path / "names.txt", len(expected))
    assert found.names == expected
    assert found.source == "names.txt"
    assert not found.assumed
    model_config("efficientdet-d0", num_classes=len(expected), class_names=found.names)


@pytest.mark.parametrize(
    "text", ["- ant\n- bee\n", "1: ant\n2: bee\n", "0: ant\n1: bee\n", "# ours\n[ant, bee]"]
)
@pytest.mark.parametrize("suffix", [".yml", ".yaml", ".YAML"])
def test_yaml_files(text: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"names{suffix}"
    path.write_text(text)
    assert find_names(path, 2).names == ANT


PBTXT = """# ours
item {
  name: "/m/01"   # the machine's id
  id: 4
  display_name: 'big "ant"'
}
item:
{
  id: 2 name: 'b\\'ee' keypoints { id: 1 label: "wing" }
}
item < name: "\\303\\251t\\xc3\\xa9", id: 1 >
"""


def test_label_map_of_the_object_detection_api() -> None:
    names = parse_names(PBTXT.encode())
    assert names == {1: "été", 2: "b'ee", 4: 'big "ant"'}
    assert class_names(names, 5) == ("été", "b'ee", "", 'big "ant"', "")
    assert unescaped(r"a\\b\tc\101") == "a\\b\tcA"


NOT_LABELS = [
    ("1: person\n1: cat\n", "it names class 1 twice"),
    ('{"1": "a", "1": "b"}', "an object in it has the key '1' twice"),
    ('{"1": "a", "01": "b"}', "it names class 1 twice"),
    ("names: {1: a, 1: b}", "it has the key '1' twice, again in line 1"),
    ('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "it names class 1 twice"),
    ('["a", null]', "the name of class 2 is None, not one line of text"),
    ('[["x"]]', "the name of class 1 is .'x'., not one line of text"),
    ('["a\\nb"]', "the name of class 1 is .*, not one line of text"),
    ('["\\ud800"]', "the name of class 1 is .*, not one line of text"),
    ('["a", true]', "the name of class 2 is True, not one line of text"),
    ('["a", 1.5]', "the name of class 2 is 1.5, not one line of text"),
    ("a\tb\n", "the name of class 1 is .*, not one line of text"),
    ("a" * 1001, "the name of class 1 is .*, not one line of text"),
    ("null", "'null' is JSON of another form"),
    ("5", "'5' is JSON of another form"),
    ('"x"\n', ".* is JSON of another form"),
    ('{"a": "b"}', "'a' is not a class id"),
    ('{"1_0": "b"}', "'1_0' is not a class id"),
    ("9" * 6000 + ": cat", "'9+.*9+' is not a class id"),
    ("[" + "9" * 6000 + "]", "it holds a number of thousands of digits"),
    ('{"categories": [{"id": 1}]}', "a category lacks 'name'"),
    ('{"categories": {"1": "x"}}', "its categories are not a list of objects with id and name"),
    ('{"categories": 1}', "its categories are not a list of objects with id and name"),
    ('{"categories": [{"id": 1.5, "name": "x"}]}', "the category id 1.5 is not a whole number"),
    ("[1, 2", "it is not JSON: Expecting"),
    ("[" * 100_000, "it is nested too deep"),
    ("1: cat\ndog\n", "some lines begin with an id ..1.:., others do not"),
    (
        "1 ant\n3 bee\n",
        "its lines begin or end with numbers .* may be ids or parts of the names; write `id: name`",
    ),
    ("ant,0\nbee,2\n", "its lines begin or end with numbers"),
    ("\n\n", "it names no class"),
    ("", "it names no class"),
    ("[]", "it names no class"),
    ("???\nN/A\n", "it names no class"),
    (b"cat\ndog \xff\n", "byte 8 is not UTF-8 text"),
    ("cat\n".encode("utf-16"), "byte 0 is not UTF-8 text"),
    ("num_classes: 3\nlearning_rate: 0.1\n", "'num_classes' is not a class id"),
    ("names: [a]\nobj_list: [b]\n", "it has both names and obj_list; leave one of them"),
    ("label_map: coco\n", "its label_map is 'coco', neither a list nor .id: name."),
    ("names: [a\n", "it is not YAML: line "),
    ("names: [&a x, *a]\n", "it in line 1 refers to another value"),
    ("item { id: 1 }\n", "item 1 of the label map has no id or no name"),
    ("item { name: 'x' }\n", "item 1 of the label map has no id or no name"),
    ("item { id: 1 name { } }\n", "item 1 of the label map has no id or no name"),
    ("item { id: 1.5 name: 'x' }\n", "'1.5' is not a class id"),
    ("item { id: -1 name: 'x' }\n", "'-1' is not a class id"),
    ("item { id: 1 name: 'x' } item { id: 1 name: 'y' }", "it names class 1 twice"),
    ("item { id: 1 name: 'x' } item: x", "an item of the label map is 'x', not a block"),
    ("item { id: 1 name: '\\377' }", r"'.*377' is not UTF-8 text"),
    ("item { id: 1 name: 'x'\n", "line 1: '{' is never closed"),
    ("item {\n id: 1 name: 'x' } }\n", "line 2: '}' has no opening bracket"),
    ("item {\n id: 1 = 'x' }\n", "line 2: '=' is unexpected"),
]


@pytest.mark.parametrize(("text", "reason"), NOT_LABELS, ids=[str(case[0])[:20] for case in NOT_LABELS])
def test_what_is_not_a_label_file(tmp_path: Path, text: str | bytes, reason: str) -> None:
    (tmp_path / "labels").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(EfficientDetError, match=rf"labels is not a label file: {reason}") as caught:
        find_names(tmp_path / "labels", 5)
    assert str(caught.value).endswith(f"; {FORMS}")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("just words\n", "its YAML is neither a list nor id: name"),
        ("a: 1\nb: 2\n", "'a' is not a class id"),
        ("", "its YAML is neither a list nor id: name"),
        ("x" * (1 << 20) + "y", "it has 1,048,577 characters, YAML may have 1,048,576"),
    ],
)
def test_yaml_that_is_not_a_label_file(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "x.yml").write_text(text)
    with pytest.raises(EfficientDetError, match=rf"x\.yml is not a label file: {reason}"):
        find_names(tmp_path / "x.yml", 2)


@pytest.mark.parametrize(
    ("text", "num_classes", "reason"),
    [
        ("ant\nbee\n", 3, "it lists 2 names, but the model has 3 classes; list one for each, or write lines"),
        ("ant\nbee\n", 1, "it lists 2 names, but the model has 1 classes"),
        ("background\nant\n", 3, "it lists 1 names after 'background', but the model has 3 classes"),
        ("background\nant\nbee\n", 3, "it lists 3 names for 3 classes, but the first is 'background'"),
        (
            "__ignore__\n_background_\nant\n",
            2,
            "it lists 3 names for 2 classes, but the first is '__ignore__'",
        ),
        (
            "0: ant\n1: bee\n",
            3,
            r"its ids are 0 \('ant'\) to 1, but the model has classes 1 to 3, or 0 to 2 if",
        ),
        ("0: ant\n1: bee\n", 1, r"its ids are 0 \('ant'\) to 1, but the model has classes 1 to 1"),
        ("1: ant\n6: bee\n", 5, "it names class 6, but the model has classes 1 to 5"),
        ("item { id: 6 name: 'x' }\n", 5, "it names class 6, but the model has classes 1 to 5"),
    ],
)
def test_labels_of_another_model(text: str, num_classes: int, reason: str, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text(text)
    with pytest.raises(EfficientDetError, match=f"--labels .*labels does not fit this model: {reason}"):
        find_names(tmp_path / "labels", num_classes)


def coco_file(names: Mapping[int, str], used: Iterable[int]) -> bytes:
    categories = [{"id": index, "name": name} for index, name in names.items()]
    entries = [{"category_id": index} for index in used]
    return json.dumps({"categories": categories, "annotations": entries}).encode()


def test_an_unused_category_that_no_class_can_be_is_left_out() -> None:
    parent = {0: "insects", 1: "ant", 2: "bee", 9: "wasp"}
    assert class_names(parse_names(coco_file(parent, (1, 2))), 2) == ANT
    with pytest.raises(Reason, match="it names class 9"):
        class_names(parse_names(coco_file(parent, (1, 9))), 2)
    with pytest.raises(Reason, match=r"its ids are 0 \('insects'\) to 2"):
        class_names(parse_names(coco_file(parent, (0, 2))), 2)
    with pytest.raises(Reason, match=r"no annotation has its category 0 \('ant'\), so its ids may be"):
        class_names(parse_names(coco_file({0: "ant", 1: "bee"}, (1,))), 2)
    assert class_names(parse_names(coco_file({0: "ant", 1: "bee"}, (0, 1))), 2) == ANT
    assert class_names(parse_names(coco_file({0: "_background_", 1: "ant", 2: "bee"}, (1,))), 2) == ANT


# --- where the names are from -------------------------------------------------------------------------


def test_labels_are_a_bounded_file(tmp_path: Path, pipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(
            EfficientDetError, match="it is a pipe or a device, not a file; give a file of class"
        ):
            find_names(path, 5)
    for name in ("absent", "no\0name"):
        with pytest.raises(EfficientDetError, match=r"cannot be read: .*; give a file of class names"):
            find_names(tmp_path / name, 5)
    (tmp_path / "labels").write_text("cat\n" * 30)
    monkeypatch.setattr("pytorch_model.labels.files._MOST_TEXT", 100)
    with pytest.raises(EfficientDetError, match="it has 120 bytes, text may have 100"):
        find_names(tmp_path / "labels", 5)
    monkeypatch.setattr(labels, "MOST_BYTES", 100)
    with pytest.raises(EfficientDetError, match="it has more than 100 bytes"):
        find_names(tmp_path / "labels", 5)


def test_coco_names_are_those_of_coco(shared: Path) -> None:
    content = json.loads((shared / "coco/instances_val2017_158.json").read_text())
    official = {category["id"]: category["name"] for category in content["categories"]}
    assert LABEL_MAPS["coco"] == official == find_names(None, 90).named


def test_names_are_assumed_only_for_90_classes() -> None:
    coco = find_names(None, 90)
    assert coco.assumed
    assert (coco.source, coco.shown[90], coco.shown[12]) == (
        "COCO's, assumed for 90 classes",
        "toothbrush",
        "class 12",
    )
    unknown = find_names(None, 3)
    assert unknown.shown == {1: "class 1", 2: "class 2", 3: "class 3"}
    assert (unknown.named, unknown.assumed, unknown.source) == ({}, False, "not known")


def test_a_file_overrides_the_models_own_names(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("wasp\nfly\n")
    assert find_names(tmp_path / "x.txt", 2, ANT).names == ("wasp", "fly")
    assert find_names(None, 2, ANT).names == ANT
    assert find_names(None, 2, ANT).source == "kept with the weights"


def test_automls_label_maps() -> None:
    assert LABEL_MAPS["voc"][20] == "tvmonitor"
    assert LABEL_MAPS["voc"][1] == "aeroplane"
    assert {name: len(names) for name, names in LABEL_MAPS.items()} == {"coco": 80, "voc": 20, "waymo": 3}
