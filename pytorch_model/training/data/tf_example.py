"""``tf.train.Example`` without TensorFlow, and the detection example that AutoML and others keep in one.

Sources: TensorFlow ``core/example/{example,feature}.proto``; AutoML ``dataset/create_coco_tfrecord.py``,
``dataset/create_pascal_tfrecord.py``, ``object_detection/tf_example_decoder.py``. The Object Detection API's
scripts write the same keys, fewer of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from pytorch_model.errors import Reason
from pytorch_model.formats import wire
from pytorch_model.training.data.example import NO_AREA, NOT_FINITE, Example

IMAGE = "image/encoded"
SOURCE_ID = "image/source_id"
FILE_NAME = "image/filename"
SIDES = tuple(f"image/object/bbox/{side}" for side in ("ymin", "xmin", "ymax", "xmax"))
LABEL = "image/object/class/label"
TEXT = "image/object/class/text"
CROWD = "image/object/is_crowd"
AREA = "image/object/area"
KEYS = frozenset((IMAGE, SOURCE_ID, FILE_NAME, *SIDES, LABEL, TEXT, CROWD, AREA))

#: A coordinate beyond -MOST…MOST is one of pixels. Boxes a little beyond 0…1 are usual.
MOST_COORDINATE = 10.0

_BYTES, _FLOATS, _INTEGERS = 1, 2, 3  # the fields of a Feature
_HELD = {bytes: "bytes", np.dtype(np.float32): "floats", np.dtype(np.int64): "whole numbers"}

#: Values of one feature: bytes, float32 [n], or int64 [n]. A feature without a kind is an empty list.
Values: TypeAlias = "Sequence[bytes] | np.ndarray"


def parse_features(record: bytes, wanted: Container[str] | None = None) -> dict[str, Values]:
    """The features of a serialized ``tf.train.Example``, or only those ``wanted``.

    Raises :class:`~pytorch_model.formats.wire.Malformed`.
    """
    found: dict[str, Values] = {}
    for features in _messages(memoryview(record), 1):
        for entry in _messages(features, 1):
            name = b"".join(_messages(entry, 1)[-1:]).decode("utf-8", "backslashreplace")
            if wanted is None or name in wanted:
                found[name] = _values(memoryview(b"".join(_messages(entry, 2)[-1:])))
    return found


def detection_example(features: Mapping[str, Values], place: str) -> tuple[Example, Counter[str]]:
    """One image with its objects, and how many boxes are left out for which reason.

    ``place``: where the features are from, the example's name if they do not give one. A box whose sides are
    not positive, or not finite, is left out (AutoML keeps one whose area is not 0). Without areas, the
    relative ones are used; without ``is_crowd``, no box is a crowd. Raises :class:`Reason` if these are not
    the features of a detection example.
    """
    image = b"".join(_column(features, IMAGE, bytes)[:1])
    if not image:
        raise Reason(f"it has no {IMAGE}, so it is no detection example")
    sides = [_column(features, key, np.dtype(np.float32)) for key in SIDES]
    classes = _column(features, LABEL, np.dtype(np.int64))
    crowd = _column(features, CROWD, np.dtype(np.int64))
    area = _column(features, AREA, np.dtype(np.float32))
    count = len(classes)
    if any(len(side) != count for side in sides) or len(crowd) not in (0, count):
        lengths = [
            f"{len(values)} {key}" for key, values in zip((*SIDES, CROWD), (*sides, crowd), strict=True)
        ]
        raise Reason(f"it has {count} {LABEL}, but {', '.join(lengths)}")
    boxes = np.stack(sides, axis=1)
    _check(boxes, classes)
    if len(area) != count:
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    finite = np.isfinite(boxes).all(axis=1)
    with np.errstate(invalid="ignore"):
        flat = finite & ~((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    left_out = Counter({NOT_FINITE: int((~finite).sum()), NO_AREA: int(flat.sum())})
    kept = finite & ~flat
    source_id = _text(features, SOURCE_ID)
    example = Example(
        image,
        boxes[kept],
        classes[kept],
        crowd[kept] != 0 if len(crowd) else np.zeros(kept.sum(), bool),
        area[kept],
        int(source_id) if source_id.isdecimal() and source_id.isascii() else source_id or place,
        _text(features, FILE_NAME) or source_id or place,
    )
    return example, +left_out


def texts(features: Mapping[str, Values]) -> list[tuple[int, str]]:
    """(class, its name) of each object of a detection example that states names; else nothing."""
    names, classes = features.get(TEXT, ()), features.get(LABEL, ())
    if isinstance(names, np.ndarray) or len(names) != len(classes):
        return []
    return [
        (int(label), bytes(name).decode("utf-8", "replace"))
        for label, name in zip(classes, names, strict=True)
    ]


def _check(boxes: np.ndarray, classes: np.ndarray) -> None:
    """Raises :class:`Reason` for what a whole data set gets wrong at once: ids from 0, boxes in pixels."""
    if len(classes) and classes.min() < 1:
        raise Reason(
            f"it has the class label {classes.min()}, but labels count from 1 (0 is the background); write "
            "the records with label + 1, and the label map likewise"
        )
    largest = np.abs(boxes[np.isfinite(boxes)]).max(initial=0)
    if largest > MOST_COORDINATE:
        raise Reason(
            f"it has a box with the coordinate {largest:g}, but boxes are relative to the image, 0 to 1; "
            "write the records with pixels divided by the image's width or height"
        )


def _column(features: Mapping[str, Values], key: str, kind: Any) -> Any:
    """The values of feature ``key``, which must be of ``kind``; empty if it is absent or has none."""
    values = features.get(key, ())
    if len(values) == 0:
        return [] if kind is bytes else np.zeros(0, kind)
    held = values.dtype if isinstance(values, np.ndarray) else bytes
    if held != kind:
        raise Reason(f"its {key} holds {_HELD[held]} instead of {_HELD[kind]}")
    return values


def _text(features: Mapping[str, Values], key: str) -> str:
    return b"".join(_column(features, key, bytes)[:1]).decode("utf-8", "replace")


def _messages(message: memoryview, number: int) -> list[memoryview]:
    return [
        wire.expect_bytes(field, value) for field, _, value in wire.read_fields(message) if field == number
    ]


def _values(feature: memoryview) -> Values:
    """A ``Feature``: one of three lists. The last one counts, as for any ``oneof``."""
    values: Values = []
    for number, _, value in wire.read_fields(feature):
        if number == _BYTES:
            values = [bytes(each) for each in _messages(wire.expect_bytes(number, value), 1)]
        elif number == _FLOATS:
            values = _floats(wire.expect_bytes(number, value))
        elif number == _INTEGERS:
            values = _integers(wire.expect_bytes(number, value))
    return values


def _floats(message: memoryview) -> np.ndarray:
    """A ``FloatList``, packed or not."""
    parts: list[bytes | memoryview] = []
    for number, kind, value in wire.read_fields(message):
        if number == 1 and kind == wire.FIXED32 and isinstance(value, int):
            parts.append(value.to_bytes(4, "little"))
        elif number == 1:
            parts.append(wire.expect_bytes(number, value))
    data = b"".join(parts)
    if len(data) % 4:
        raise wire.Malformed(f"a list of floats has {len(data)} bytes, which is not a multiple of 4")
    return np.frombuffer(data, "<f4").astype(np.float32)


def _integers(message: memoryview) -> np.ndarray:
    """An ``Int64List``, packed or not."""
    values: list[int] = []
    for number, _, value in wire.read_fields(message):
        if number == 1 and isinstance(value, int):
            values.append(value)
        elif number == 1:
            packed, position = bytes(wire.expect_bytes(number, value)), 0
            while position < len(packed):
                each, position = wire.read_varint(packed, position)
                values.append(each)
    return np.array(values, np.uint64).astype(np.int64)
