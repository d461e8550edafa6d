"""Class names: COCO's, and label files."""

from __future__ import annotations

import codecs
import json
import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pytorch_model.errors import EfficientDetError, Reason
from pytorch_model.files import parse_json, read_bounded

# Names of COCO's class ids 1 to 90, in order; ten ids have none.
_COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,umbrella,,,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
    "surfboard,tennis racket,bottle,,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,"
    "broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,,dining table,,,toilet,,tv,"
    "laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush"
)
#: Bytes of a label file, which may be a data set's annotations: those of COCO's train2017 have 0.5 GB.
MOST_BYTES = 1 << 30
COCO_NAMES = tuple(_COCO_NAMES.split(","))

_FORMS = "give one name per line, lines `id: name`, or JSON: a list, {id: name}, or COCO annotations"
#: A possible class id. int() would raise on thousands of digits, and read "1_0" as ten.
_ID = re.compile(r"[0-9]{1,9}")
_LABEL_MAP = re.compile(r"^[ \t]*item(?:[ \t]*:)?[ \t]*[{<]", re.M)  # blocks "item { id: 1 name: 'x' }"


def given_names(path: Path | None, num_classes: int) -> dict[int, str]:
    """Class id → name, from the file at ``path``. Without a file: COCO's names for 90 classes, else empty.

    The file is UTF-8 text with one name per line (the first is class 1; an empty line means no name) or lines
    ``id: name``, or JSON: a list, an ``{id: name}`` object, or COCO annotations. In JSON a
    whole number may be a name; its digits are used. Raises :class:`EfficientDetError` if the file has another
    form, names a class twice, or names one that a model of ``num_classes`` does not have.
    """
    if path is None:
        names = dict(enumerate(COCO_NAMES, start=1)) if num_classes == len(COCO_NAMES) else {}
    else:
        try:
            names = _parse_labels(read_bounded(path, MOST_BYTES))
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            reason = getattr(error, "strerror", None) or error
            raise EfficientDetError(
                f"--labels {path} cannot be read: {reason}; give a file of class names"
            ) from None
        except Reason as reason:
            raise EfficientDetError(f"--labels {path} is not a label file: {reason}; {_FORMS}") from None
    unknown = [index for index in names if not 1 <= index <= num_classes]
    if unknown:
        raise EfficientDetError(
            f"--labels {path} names class {max(unknown)}, but the model has classes 1 to {num_classes}; give "
            "the names of this model's classes"
        )
    return {index: name for index, name in names.items() if name}


def load_names(path: Path | None, num_classes: int) -> dict[int, str]:
    """Class id → name for every class of the model; classes without a name are called ``class ID``.

    Otherwise like :func:`given_names`.
    """
    names = {index: f"class {index}" for index in range(1, num_classes + 1)}
    return names | given_names(path, num_classes)


def _parse_labels(data: bytes) -> dict[int, str]:
    """Raises :class:`Reason` if ``data`` is not a label file."""
    if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith((b"{", b"[")):
        names = _from_json(parse_json(data))
    else:
        try:
            names = _from_text(data.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise Reason(f"byte {error.start} is not UTF-8 text") from None
    if not any(names.values()):
        raise Reason("it names no class")
    return names


def _from_text(text: str) -> dict[int, str]:
    if _LABEL_MAP.search(text):
        raise Reason("it is a label_map.pbtxt of the Object Detection API")
    lines = [line.strip() for line in text.splitlines()]
    if len(lines) == 1 and _is_json(text):
        raise Reason(f"{reprlib.repr(lines[0])} is JSON of another form")
    pairs = [line.partition(":") for line in lines if line]
    numbered = [key for key, colon, _ in pairs if colon and key.strip().isdecimal()]
    if not numbered:
        return _by_id((str(index), name) for index, name in enumerate(lines, start=1))
    if len(numbered) < len(pairs):
        raise Reason(f"some lines begin with an id ({reprlib.repr(numbered[0])}:), others do not")
    return _by_id((key.strip(), name.strip().strip("'\"")) for key, _, name in pairs)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _from_json(content: Any) -> dict[int, str]:
    if isinstance(content, list):
        return _by_id((str(index), name) for index, name in enumerate(content, start=1))
    if "categories" not in content:
        return _by_id(content.items())
    try:
        pairs = [(category["id"], category["name"]) for category in content["categories"]]
    except KeyError as error:
        raise Reason(f"a category lacks {error}") from None
    except TypeError:
        raise Reason("its categories are not a list of objects with id and name") from None
    for index, _ in pairs:
        if type(index) is not int:
            raise Reason(f"the category id {reprlib.repr(index)} is not a whole number")
    return _by_id((str(index), name) for index, name in pairs)


def _by_id(pairs: Iterable[tuple[str, Any]]) -> dict[int, str]:
    """Raises :class:`Reason` for an invalid id, a name that is not text, and an id that occurs twice."""
    found = [
        (key, str(name) if type(name) is int else name) for key, name in pairs
    ]  # data sets of digits have them
    for key, name in found:
        if not _ID.fullmatch(key):
            raise Reason(f"{reprlib.repr(key)} is not a class id")
        if not isinstance(name, str) or any(
            unicodedata.category(character) in ("Cc", "Cs") for character in name
        ):
            raise Reason(f"the name of class {key} is {reprlib.repr(name)}, not one line of text")
    counted = Counter(int(key) for key, _ in found)
    twice = [index for index, count in counted.items() if count > 1]
    if twice:
        raise Reason(f"it names class {twice[0]} twice")
    return {int(key): name for key, name in found}
