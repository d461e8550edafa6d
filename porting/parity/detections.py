"""Compare the detections of an exported model with ours, of one image: preprocessing and anchors included.

Each detection of the file must be one of our predictions before suppression: the same class, score and box.
And our best score must be the file's. So the kind of suppression plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from porting.parity.reference.exported import Detections, exported_detections
from pytorch_model.anchors import generate_anchors
from pytorch_model.detection.preprocess import preprocess
from pytorch_model.detection.suppression.candidates import pre_nms
from pytorch_model.efficientdet import EfficientDet

#: Largest difference of a score, and of a box as a fraction of the image's longer side. Rounding in float32,
#: from the image on, changes them by 1e-5; a wrong setting by 1e-2 and more.
SCORE_TOLERANCE = 1e-3
BOX_TOLERANCE = 1e-3

_MOST_PREDICTIONS = 1 << 20  # the best ones; a file has about 100 detections


@dataclass(frozen=True)
class DetectionCheck:
    """``count``: the file's detections; ``found``: those that we predict too. ``cause``: empty if passed."""

    count: int
    found: int
    cause: str

    @property
    def passed(self) -> bool:
        return not self.cause


@dataclass(frozen=True)
class _Predictions:
    """Ours, best first: ``boxes`` yxyx [K, 4] in the image's pixels, ``clipped`` to the network's input."""

    boxes: np.ndarray
    clipped: np.ndarray
    scores: np.ndarray
    class_ids: np.ndarray


def compare_detections(source: str, model: EfficientDet) -> DetectionCheck | None:
    """The detections of the file ``source`` against those of ``model``. None if the file gives none.

    Imports TensorFlow.
    """
    theirs = exported_detections(Path(source), model.config.image_size)
    if theirs is None or not len(theirs.scores):
        return None
    ours = _predictions(model, theirs.image)
    tolerance = BOX_TOLERANCE * max(theirs.image.shape)
    found = sum(_is_found(theirs, i, ours, tolerance) for i in range(len(theirs.scores)))
    is_best = abs(float(theirs.scores.max()) - float(ours.scores[0])) <= SCORE_TOLERANCE
    complete = is_best and found == len(theirs.scores)
    return DetectionCheck(len(theirs.scores), found, "" if complete else _cause(theirs, ours))


@torch.no_grad()
def _predictions(model: EfficientDet, image: np.ndarray) -> _Predictions:
    config, device = model.config, next(model.parameters()).device
    batch = preprocess([image], config, device=device)
    outputs = [[level.cpu() for level in levels] for levels in model(batch.images)]
    anchors = generate_anchors(config)
    most = min(len(anchors) * config.num_classes, _MOST_PREDICTIONS)
    candidates = pre_nms(outputs[0], outputs[1], anchors, most)
    boxes = candidates.boxes_yxyx[0].double().numpy()
    scale = np.tile(batch.image_scales[0].cpu().numpy(), 2)  # down, across, down, across
    height, width = config.image_size
    clipped = np.clip(boxes, 0, [height, width, height, width])
    class_ids = candidates.classes[0].numpy() + 1
    return _Predictions(boxes * scale, clipped * scale, candidates.scores[0].numpy(), class_ids)


def _is_found(theirs: Detections, index: int, ours: _Predictions, tolerance: float) -> bool:
    same = ours.class_ids == theirs.class_ids[index]
    same &= ours.scores >= theirs.scores[index] - SCORE_TOLERANCE  # soft suppression lowers scores
    box = theirs.boxes_yxyx[index]
    return any(
        bool((np.abs(boxes[same] - box).max(axis=1, initial=0) <= tolerance).any())
        for boxes in (ours.boxes, ours.clipped)
    )


def _cause(theirs: Detections, ours: _Predictions) -> str:
    """One sentence with the settings that probably differ, from the file's best detection."""
    best = int(theirs.scores.argmax())
    score, box, class_id = theirs.scores[best], theirs.boxes_yxyx[best], theirs.class_ids[best]
    near = np.abs(ours.scores - score) <= SCORE_TOLERANCE / 10
    near &= ours.class_ids == class_id
    if abs(float(ours.scores[0]) - score) > SCORE_TOLERANCE or not near.any():
        which = "image_size, mean_rgb or stddev_rgb"
        what = f"its best score is {score:.4f}, ours {ours.scores[0]:.4f}"
    else:
        which = "anchor_scale, aspect_ratios or num_scales"
        apart = np.abs(ours.boxes[near] - box).max(axis=1)
        nearest = ours.boxes[near][apart.argmin()]
        texts = [", ".join(f"{side:.1f}" for side in sides) for sides in (box, nearest)]
        what = f"its best box is {texts[0]} (y, x, y, x), ours {texts[1]}"
    return (
        f"the file's detections differ from ours: {what}; probably {which} differ: give the file's own with "
        "--hparams"
    )
