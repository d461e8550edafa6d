"""Google's training inputs, without its pictures: run this file as a script.

A value of a network's input depends on at most four pixels. So the golden holds some values of each recorded
input, and only the pixels that they depend on. Operations of AutoAugment often depend on all pixels: for
them it holds the recorded boxes, and checksums of our own results on a drawn picture, written only if our
results on the recorded picture equal the recordings.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from parity_tests.helpers.paths import GOLDENS
from parity_tests.training import auto_augment_truth, input_truth
from parity_tests.training.auto_augment_truth import applications
from parity_tests.training.input_truth import SETTINGS, as_draws
from porting.synthetic import synthetic_image
from pytorch_model.detection.resizing.tensors import neighbours
from pytorch_model.training.data.augment import place
from pytorch_model.training.data.auto_augment.operations import Picture, apply_operation

VALUES = 24  # of each input
PICTURE = (61, 83)  # height, width of the drawn picture


def main() -> None:
    folder = GOLDENS / "training"
    np.savez_compressed(folder / "augmentation.npz", **inputs())
    np.savez_compressed(folder / "auto_augment.npz", **operations())


def inputs() -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    about = []
    for case in input_truth.document()["cases"]:
        key, size, image_id = case["key"], tuple(case["image_size_hw"]), case["image_id"]
        pixels = input_truth.picture(image_id, "fast-dct" if key.endswith("/fast") else "pillow")
        found = input_truth.recorded(key)
        positions = np.linspace(0, len(found.samples) - 1, VALUES).astype(np.int64)
        needed = sources(case, positions * found.stats["stride"])
        arrays |= {
            f"{key}/boxes": found.boxes_yxyx,
            f"{key}/classes": found.classes.astype(np.uint8),
            f"{key}/values": found.samples[positions],
            f"{key}/positions": (positions * found.stats["stride"]).astype(np.int32),
            f"{key}/pixel_positions": needed.astype(np.int32),
            f"{key}/pixels": pixels.reshape(-1)[needed],
        }
        annotations = zip(("boxes", "classes", "crowd"), input_truth.annotated(image_id, size), strict=True)
        arrays |= {f"{image_id}/{name}": values for name, values in annotations}
        names = ("key", "image_id", "image_size_hw", "hparams", "draws", "image_scale_to_original")
        about.append({name: case[name] for name in names})
    return {**arrays, "about": np.frombuffer(json.dumps(about).encode(), np.uint8)}


def sources(case: dict[str, Any], positions: np.ndarray) -> np.ndarray:
    """Flat positions in an input [h, w, 3] → those of all pixels [H, W, 3] that they depend on, ascending."""
    settings, draws = SETTINGS[case["hparams"]], as_draws(case["draws"])
    height, width = case["image_size_hw"]
    placement = place(
        (height, width), draws, settings.target_size or settings.image_size, settings.image_size
    )
    y, x, channel = np.unravel_index(positions, (*settings.image_size, 3))
    y, x = y + placement.offset[0], x + placement.offset[1]
    inside = (y < placement.size[0]) & (x < placement.size[1])
    rows = [each[y[inside]] for each in neighbours(height, placement.size[0], True)[:2]]
    columns = [each[x[inside]] for each in neighbours(width, placement.size[1], True)[:2]]
    if settings.input_rand_hflip and draws.flip > 0.5:
        columns = [width - 1 - each for each in columns]
    flat = [(row * width + column) * 3 + channel[inside] for row in rows for column in columns]
    return np.unique(np.concatenate(flat))


def operations() -> dict[str, Any]:
    document = auto_augment_truth.document()
    with np.load(input_truth.TRUTH / "autoaugment.npz") as stored:
        recorded = {name: stored[name] for name in stored.files}
    stats = json.loads(bytes(recorded["__stats_json__"]))
    photograph, drawn = input_truth.picture(139, "pillow"), synthetic_image(*PICTURE)
    boxes, checksums, arrays = recorded["boxes"], {}, {}
    for key, operation, draws, count in applications(document["cases"]):
        result = apply_operation(Picture(photograph, boxes[:count]), operation, draws)
        stride = stats[f"{key}/image"]["stride"]
        np.testing.assert_array_equal(result.pixels.reshape(-1)[::stride], recorded[f"{key}/image@strided"])
        ours = apply_operation(Picture(drawn, boxes[:count]), operation, draws)
        checksums[key] = zlib.crc32(ours.pixels.tobytes())
        arrays[f"{key}/boxes"] = recorded[f"{key}/boxes"]
    about = {
        "cases": document["cases"],
        "policies": document["policies"],
        "photograph": photograph.shape[:2],
        "checksums": checksums,
    }
    return {
        **arrays,
        "boxes": boxes,
        "picture": drawn,
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
    }


if __name__ == "__main__":
    main()
