"""Parts of the recordings of the Object Detection API: ``python parity_tests/goldens/make_detection_api.py``.

Needs the recordings in ``../shared``. Of each image only the rows are kept that four rows of the network's
input depend on; the others become 0. Of the head outputs, only those of anchors that can be among the first
12 detections: hard suppression never looks at lower scores.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from parity_tests.helpers.paths import GOLDENS, SHARED

FIRST = 12
COLUMNS = 3  # every third of the network's input
STRIDE = 97  # of the recorded anchors
ROWS = {
    "fixed_160x320": (0, 101, 180, 255),
    "keep_aspect_201x333": (0, 77, 154, 200),
}  # of the network's input
SCALED_ROWS = {"fixed_160x320": 256, "keep_aspect_201x333": 155}


def main() -> None:
    arrays: dict[str, Any] = {}
    for case, rows in ROWS.items():
        with np.load(SHARED / "odapi_truth" / f"{case}.npz") as stored:
            image, threshold = stored["image"][0], stored["det_detection_scores"][0, FIRST - 1]
            places = np.array(rows) * (len(image) / SCALED_ROWS[case])
            needed = {int(place) + more for place in places for more in (0, 1)}
            kept = [row for row in sorted(needed) if row < len(image)]
            alive = (1 / (1 + np.exp(-stored["cls"][0].max(axis=1))) >= threshold - 1e-6).nonzero()[0]
            sparse = np.zeros(image.shape, np.uint8)
            sparse[kept] = image[kept]
            arrays |= {
                f"{case}/image": sparse,
                f"{case}/rows": np.array(rows),
                f"{case}/pre": stored["pre"][0][list(rows), ::COLUMNS],
                f"{case}/anchors": stored["anchors"].reshape(-1)[::STRIDE],
                f"{case}/alive": alive.astype(np.uint16),
                f"{case}/box": stored["box"][0][alive],
                f"{case}/cls": stored["cls"][0][alive],
                f"{case}/boxes": stored["det_detection_boxes"][0, :FIRST],
                f"{case}/scores": stored["det_detection_scores"][0, :FIRST],
                f"{case}/classes": stored["det_detection_classes"][0, :FIRST],
            }
    np.savez_compressed(GOLDENS / "detection_api.npz", **arrays)


if __name__ == "__main__":
    main()
