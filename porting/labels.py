"""Class names: COCO's own, and the files people keep theirs in."""

from __future__ import annotations

import json
from pathlib import Path

from porting.errors import PortingError
from porting.files import read_bounded

# COCO's 90 class ids in order, from 1; ten of them name nothing.
_COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,,backpack,umbrella,,,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,"
    "surfboard,tennis racket,bottle,,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,"
    "broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,,dining table,,,toilet,,tv,"
    "laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,,book,clock,vase,"
    "scissors,teddy bear,hair drier,toothbrush"
)
#: Of a label file, which may be a data set's annotations: those of COCO's train2017 have 0.5 GB.
MOST_BYTES = 1 << 30
COCO_NAMES = tuple(_COCO_NAMES.split(","))


def given_names(path: Path | None, num_classes: int) -> dict[int, str]:
    """Class id → name as the file at ``path`` says; without a file COCO's for 90 classes, else nothing.

    The file is text with one name a line (the first is class 1; an empty line names nothing) or lines
    ``id: name``, or JSON: a list, an ``{id: name}`` object, or COCO annotations. Raises
    :class:`PortingError` when it is none of these, or names a class that a model of ``num_classes`` lacks.
    """
    if path is None:
        names = dict(enumerate(COCO_NAMES, start=1)) if num_classes == len(COCO_NAMES) else {}
    else:
        try:
            names = _parse_labels(read_bounded(path, MOST_BYTES).decode())
        except OSError as error:
            raise PortingError(f"--labels {path} cannot be read: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PortingError(f"--labels {path} is not a label file: {error}") from None
    unknown = [index for index in names if not 1 <= index <= num_classes]
    if unknown:
        raise PortingError(
            f"--labels {path} names class {max(unknown)}, but the model has classes 1 to {num_classes}"
        )
    return {index: name for index, name in names.items() if name}


def load_names(path: Path | None, num_classes: int) -> dict[int, str]:
    """Class id → name for every class of the model; classes that nothing names are called by number.

    As :func:`given_names`.
    """
    names = {index: f"class {index}" for index in range(1, num_classes + 1)}
    return names | given_names(path, num_classes)


def _parse_labels(text: str) -> dict[int, str]:
    if not text.lstrip().startswith(("{", "[")):
        lines = [line.strip() for line in text.splitlines()]
        pairs = [line.partition(":") for line in lines if line]
        if pairs and all(key.strip().isdecimal() and name for key, _, name in pairs):
            return {int(key): name.strip().strip("'\"") for key, _, name in pairs}
        return dict(enumerate(lines, start=1))
    content = json.loads(text)
    if isinstance(content, list):
        return {index: str(name) for index, name in enumerate(content, start=1)}
    if "categories" in content:
        return {int(category["id"]): str(category["name"]) for category in content["categories"]}
    return {int(index): str(name) for index, name in content.items()}
