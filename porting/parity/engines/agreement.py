"""Whether two lists of detections are the same, but for rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pytorch_model.detection.settings import NMSConfig

#: Largest difference of a score, and of a box's side as a fraction of the longer side of the network's input.
#: Float32 moves a head output by some 1e-6 of its size: less than a tenth of either.
SCORE_TOLERANCE = 1e-5
BOX_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Agreement:
    """``ours`` and ``expected``: how many detections. ``equal``: how many of both are the same one.

    ``at_the_end``: how many more differ, but have a score at which the other side's list ends, so that
    rounding decides whether they are in it. ``score``, ``box``: the largest differences between equal ones;
    ``box`` in pixels of the network's input. ``allowed``: the tolerance of scores.
    """

    ours: int
    expected: int
    equal: int
    at_the_end: int
    score: float
    box: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.ours + self.expected == 2 * self.equal + self.at_the_end

    @property
    def different(self) -> int:
        """How many detections of either side the other does not have."""
        return self.ours + self.expected - 2 * self.equal - self.at_the_end


def agreement(
    ours: Sequence[Mapping[str, Tensor]],
    expected: Sequence[Mapping[str, Tensor]],
    size: tuple[int, int],
    nms: NMSConfig,
    score_tolerance: float,
) -> Agreement:
    """Compare the detections of the same images, one dict per image as :meth:`Detector.detect` returns.

    Two detections are equal if they have one label, and scores and boxes within the tolerances. Their order
    plays no part. ``size``: (height, width) of the network's input, in whose pixels the boxes are.
    """
    equal = at_the_end = 0
    score = box = 0.0
    for mine, theirs in zip(ours, expected, strict=True):
        pairs, differences = _pairs(mine, theirs, score_tolerance, BOX_TOLERANCE * max(size))
        equal += len(pairs)
        score, box = (max(a, *b, 0.0) for a, b in zip((score, box), differences, strict=True))
        for one, other, place in ((mine, theirs, 0), (theirs, mine, 1)):
            alone = np.delete(one["scores"].cpu().numpy(), [pair[place] for pair in pairs])
            at_the_end += int((alone <= _last_score(other, nms) + score_tolerance).sum())
    counts = [sum(len(image["scores"]) for image in side) for side in (ours, expected)]
    return Agreement(counts[0], counts[1], equal, at_the_end, score, box, score_tolerance)


def _last_score(found: Mapping[str, Tensor], nms: NMSConfig) -> float:
    """The score below which a detection is not in the list."""
    full = len(found["scores"]) >= nms.max_output_size
    return float(found["scores"].min()) if full else nms.effective_score_thresh


def _pairs(
    ours: Mapping[str, Tensor], expected: Mapping[str, Tensor], score_tolerance: float, box_tolerance: float
) -> tuple[list[tuple[int, int]], tuple[list[float], list[float]]]:
    """The equal detections, one to one, nearest boxes first, and the differences of scores and boxes."""
    boxes, scores, labels = (
        [side[key].double().cpu().numpy() for side in (ours, expected)]
        for key in ("boxes", "scores", "labels")
    )
    apart = np.abs(boxes[0][:, None] - boxes[1]).max(axis=2, initial=0)
    lower = np.abs(scores[0][:, None] - scores[1])
    same = (labels[0][:, None] == labels[1]) & (lower <= score_tolerance) & (apart <= box_tolerance)
    candidates = np.argwhere(same)
    candidates = candidates[np.argsort(apart[same], kind="stable")]
    pairs: list[tuple[int, int]] = []
    taken: tuple[set[int], set[int]] = (set(), set())
    for i, j in candidates.tolist():
        if i not in taken[0] and j not in taken[1]:
            taken[0].add(i)
            taken[1].add(j)
            pairs.append((i, j))
    return pairs, ([float(lower[pair]) for pair in pairs], [float(apart[pair]) for pair in pairs])
