"""Google's TFRecords without their pictures: ``python parity_tests/goldens/training/make_examples.py``.

A serialized map is its entries one after the other, so what is left are Google's own bytes.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from parity_tests.helpers.paths import GOLDENS, SHARED
from pytorch_model.formats import wire
from pytorch_model.training.data.records import RecordFile

PICTURES = (b"image/encoded", b"image/object/mask")


def without_pictures(record: bytes) -> bytes:
    features = wire.expect_bytes(1, wire.last_values(record, 1)[1])
    kept = [
        wire.bytes_field(1, entry)
        for _, _, entry in wire.read_fields(features)
        if isinstance(entry, bytes) and wire.last_values(entry, 1)[1] not in PICTURES
    ]
    return wire.bytes_field(1, b"".join(kept))


def main() -> None:
    folder = SHARED / "train_truth" / "tfrecord"
    goldens = []
    expected = json.loads((folder / "expected.json").read_text())["examples"]
    for name in ("coco-00000-of-00002.tfrecord", "pascal-00000-of-00001.tfrecord"):
        file = RecordFile(folder / name)
        for index, each in enumerate(each for each in expected if each["file"] == name):
            features = {
                key: feature["values"]
                for key, feature in each["features"].items()
                if key.encode() not in PICTURES
            }
            serialized = base64.b64encode(without_pictures(file.read(index))).decode()
            goldens.append({"serialized": serialized, "features": features})
    text = json.dumps(goldens, separators=(",", ":"))
    (GOLDENS / "training" / "examples.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
