"""Small data sets, written here: TFRecords without TensorFlow, images, annotations."""

from __future__ import annotations

import gzip
import io
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pytorch_model.formats import wire
from pytorch_model.formats.crc32c import masked_crc32c

Value = Sequence[bytes] | Sequence[float] | Sequence[int]


def record(data: bytes) -> bytes:
    """One TFRecord."""
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(each)) for each in (length, data))
    return length + next(checksums) + data + next(checksums)


def write_records(path: Path, records: Iterable[bytes]) -> Path:
    """A TFRecord file; GZIP if its name ends in ``.gz``."""
    content = b"".join(map(record, records))
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def tf_example(features: Mapping[str, Value], packed: bool = True) -> bytes:
    """A serialized ``tf.train.Example``. Lists of bytes, floats or ints; an empty list has no kind."""
    entries = (
        wire.bytes_field(
            1, wire.bytes_field(1, name.encode()) + wire.bytes_field(2, _feature(values, packed))
        )
        for name, values in features.items()
    )
    return wire.bytes_field(1, b"".join(entries))


def _feature(values: Value, packed: bool) -> bytes:
    if not len(values):
        return b""
    if isinstance(values[0], bytes):
        return wire.bytes_field(1, b"".join(wire.bytes_field(1, bytes(each)) for each in values))  # type: ignore
    if isinstance(values[0], float):
        parts = [struct.pack("<f", each) for each in values]
        tag, number = wire.write_varint(1 << 3 | wire.FIXED32), 2
    else:
        parts = [wire.write_varint(int(each) % (1 << 64)) for each in values]
        tag, number = wire.write_varint(1 << 3 | wire.VARINT), 3
    inner = wire.bytes_field(1, b"".join(parts)) if packed else b"".join(tag + part for part in parts)
    return wire.bytes_field(number, inner)


def picture(seed: int, size: tuple[int, int] = (24, 32), form: str = "PNG") -> bytes:
    """An encoded image of (height, width) ``size``."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def detection_features(number: int, **changes: Any) -> dict[str, Any]:
    """The features of a small image with two objects, of class 1 and 3. ``changes``: see the names below."""
    names = {
        "image": "image/encoded",
        "source_id": "image/source_id",
        "filename": "image/filename",
        "ymin": "image/object/bbox/ymin",
        "xmin": "image/object/bbox/xmin",
        "ymax": "image/object/bbox/ymax",
        "xmax": "image/object/bbox/xmax",
        "label": "image/object/class/label",
        "text": "image/object/class/text",
        "is_crowd": "image/object/is_crowd",
        "area": "image/object/area",
    }
    features = {
        "image": [picture(number)],
        "source_id": [str(number).encode()],
        "filename": [f"{number}.png".encode()],
        "ymin": [0.1, 0.5],
        "xmin": [0.2, 0.25],
        "ymax": [0.6, 1.0],
        "xmax": [0.7, 0.75],
        "label": [1, 3],
    } | changes
    return {names[name]: values for name, values in features.items() if values is not None}


def detection_records(path: Path, count: int = 6, first: int = 0, **changes: Any) -> Path:
    """A TFRecord file of ``count`` small images."""
    return write_records(
        path, (tf_example(detection_features(first + number, **changes)) for number in range(count))
    )


def coco_folder(folder: Path, count: int = 6, **changes: Any) -> Path:
    """A data set in COCO's format: ``count`` small images with one object each, of category 1 or 2.

    ``changes``: other images, categories or annotations.
    """
    (folder / "train").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for number in range(count):
        (folder / "train" / f"{number}.png").write_bytes(picture(number))
    content = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "height": 24, "width": 32} for number in range(count)
        ],
        "categories": [{"id": 1, "name": "ant"}, {"id": 2, "name": "bee"}],
        "annotations": [
            {"id": number + 1, "image_id": number, "category_id": 1 + number % 2, "bbox": [4, 6, 8, 12]}
            for number in range(count)
        ],
    } | changes
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return folder
