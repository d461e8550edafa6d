"""The parts of detection on one batch, against the network."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from porting.bench.measure import in_turn, summarise, timed
from porting.synthetic import synthetic_image
from pytorch_model.detection.detector import Detector
from pytorch_model.detection.postprocess import per_class_nms
from pytorch_model.detection.preprocess import load_image
from pytorch_model.detection.suppression.candidates import Candidates, pre_nms
from pytorch_model.devices import choose_device
from pytorch_model.efficientdet import create_model


def measure_detection(
    folder: Path, model: str, repeat: int, batch_size: int, device_name: str
) -> dict[str, Any]:
    """A batch of JPEG files of 640 × 480 pixels, the model as it is. No time depends on the weights."""
    device = choose_device(device_name)
    files = photographs(folder, batch_size)
    torch.manual_seed(0)
    detector = Detector(create_model(model).to(device))
    pixels = [load_image(file).pixels for file in files]
    batch = detector.preprocess(pixels)
    anchors_yxyx, nms = detector.anchors_yxyx.to(device), detector.nms
    with torch.no_grad():
        class_outputs, box_outputs = detector.model(batch.images)

    def select() -> Candidates:
        return pre_nms(class_outputs, box_outputs, anchors_yxyx, nms.max_nms_inputs)

    candidates = select()

    def part(work: Callable[[], Any]) -> Callable[[], float]:
        @torch.no_grad()
        def run() -> None:
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return timed(run)

    sides = {
        "decode, pillow": part(lambda: [load_image(file) for file in files]),
        "normalise, resize, pad": part(lambda: detector.preprocess(pixels)),
        "network": part(lambda: detector.model(batch.images)),
        "select": part(select),
        "NMS": part(lambda: per_class_nms(candidates, nms, batch.image_scales)),
    }
    if importlib.util.find_spec("simplejpeg"):
        sides["decode, fast-dct"] = part(lambda: [load_image(file, "fast-dct") for file in files])
    figures = summarise(in_turn(sides, repeat, warm_up=1), "network")
    return figures | {
        "postprocessing_over_network": figures["ratio"]["select"] + figures["ratio"]["NMS"],
        "described": f"{model}, batch of {batch_size}, {device}, {torch.get_num_threads()} threads",
    }


def photographs(folder: Path, count: int) -> list[Path]:
    files = [folder / f"{seed}.jpg" for seed in range(count)]
    for seed, file in enumerate(files):
        Image.fromarray(synthetic_image(480, 640, seed)).save(file, quality=90)
    return files
