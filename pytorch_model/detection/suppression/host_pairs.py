"""The pairs with the highest logits, found on the CPU in a fraction of the time that tensors take.

A sample of the logits shows about where the last wanted one lies. What is above is collected in one pass over
all of them, and only that is sorted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

#: Logits in the sample.
_SAMPLE = 1 << 16


def top_pairs_on_host(
    class_outputs: Sequence[Tensor], num_anchors: int, num_classes: int, count: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The ``count`` highest logits per image, or all: (anchor index, class index, logit), each [N, count].

    Descending; of equal logits the lower pair first, in the order of anchors, then classes. None if NaN is
    among the logits.
    """
    levels = [_Level(level, num_anchors, num_classes) for level in class_outputs]
    count = min(count, sum(level.size for level in levels))
    pairs = np.empty((len(class_outputs[0]), count), np.int64)
    logits = np.empty(pairs.shape, np.float32)
    for image in range(len(pairs)):
        rows = [level.row(image) for level in levels]
        found = _top_of_image(rows, levels, count)
        if found is None:
            return None
        pairs[image], logits[image] = found
    anchors, classes = np.divmod(pairs, num_classes)
    return torch.from_numpy(anchors), torch.from_numpy(classes), torch.from_numpy(logits)


class _Level:
    """The logits of one level, [N, anchors · classes, H, W], in the order in which they lie in memory."""

    def __init__(self, level: Tensor, num_anchors: int, num_classes: int) -> None:
        self._locations = level.shape[2] * level.shape[3]
        self._anchors, self._classes = num_anchors, num_classes
        self._in_order = not level.is_contiguous()  # channels last: the order of pairs
        self._values = (level.permute(0, 2, 3, 1) if self._in_order else level).float().contiguous().numpy()
        self.size = level.shape[1] * self._locations

    def row(self, image: int) -> np.ndarray:
        return self._values[image].reshape(-1)

    def pairs(self, places: np.ndarray) -> np.ndarray:
        """The numbers of pairs, counted within the level, at ``places`` of a row."""
        if self._in_order:
            return places
        channels, locations = np.divmod(places, self._locations)
        return locations * (self._anchors * self._classes) + channels


def _top_of_image(
    rows: Sequence[np.ndarray], levels: Sequence[_Level], count: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """(pairs, logits) of one image, [count] each, descending. None if NaN is among the logits."""
    edges = _edges(rows, count)
    values = np.empty(0, np.float32)
    while len(values) < count:
        edge = next(edges)
        # NaN is not below anything, so it is found here.
        places = [np.flatnonzero(~(row < edge)) for row in rows]
        values = np.concatenate([row[chosen] for row, chosen in zip(rows, places, strict=True)])
        if np.isnan(values).any():
            return None
    starts = np.cumsum([0, *(level.size for level in levels[:-1])])
    pairs = np.concatenate(
        [start + level.pairs(chosen) for start, level, chosen in zip(starts, levels, places, strict=True)]
    )
    if len(values) > count:
        lowest = np.partition(values, len(values) - count)[len(values) - count]
        kept = values >= lowest
        values, pairs = values[kept], pairs[kept]
    order = np.lexsort((pairs, -values))[:count]
    return pairs[order], values[order]


def _edges(rows: Sequence[np.ndarray], count: int) -> Iterator[np.float32]:
    """Logits above which there should be ``count`` or a few more, each lower than the one before."""
    total = sum(len(row) for row in rows)
    step = max(1, total // _SAMPLE) | 1  # odd: a map's width is even
    sample = np.concatenate([row[::step] for row in rows])
    expected = count / step
    wanted = int(1.25 * expected + 3 * math.sqrt(expected)) + 1
    while wanted < len(sample):
        yield np.partition(sample, len(sample) - wanted)[len(sample) - wanted]
        wanted *= 2
    yield np.float32(-math.inf)
