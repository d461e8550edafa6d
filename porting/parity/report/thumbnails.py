"""Small maps of the activations of both networks: an observer of :func:`porting.parity.compare`.

The activations of a large model take gigabytes and are dropped as soon as they are compared. The memory used
here is bounded: for each tap two channels of at most 48×48 pixels, one byte per pixel, and for the network's
outputs a histogram of their differences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from porting.rules import TapPair

SIDE = 48  # pixels a side, at most

#: One byte per pixel: 0 for NaN and infinity, 1…255 for other values.
NOT_FINITE, LOWEST, MIDDLE, HIGHEST = 0, 1, 128, 255

OUTPUTS = ("class_outputs/", "box_outputs/")  # taps that get a histogram
BINS_PER_DECADE = 4
LOWEST_DECADE, HIGHEST_DECADE = -20, 4  # differences beyond either end are counted in the last bin there
BINS = (HIGHEST_DECADE - LOWEST_DECADE) * BINS_PER_DECADE

_BLOCK = 1 << 20  # values worked on at once


@dataclass(frozen=True)
class Thumbnail:
    """One channel of one image of the batch. All three maps are uint8 [h, w], h and w at most 48.

    ``ours`` and ``reference`` are means over cells of ``cell`` × ``cell`` pixels, on one scale: 1 is
    ``lowest``, 255 is ``highest``. ``difference`` is ours − reference where it is furthest from zero in the
    cell: 1 is −``largest``, 128 is zero, 255 is +``largest``. In all three, 0 means NaN or infinite.
    """

    why: str  # how the channel was chosen
    image: int
    channel: int
    cell: int
    lowest: float
    highest: float
    largest: float
    ours: np.ndarray
    reference: np.ndarray
    difference: np.ndarray


@dataclass
class Histogram:
    """How often |ours − reference| fell into each bin. The bins split decades evenly: :func:`bin_edges`.

    ``equal``: values without any difference. ``not_finite``: those that are NaN or infinite on either side.
    """

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    equal: int = 0
    not_finite: int = 0

    def add(self, delta: np.ndarray) -> None:
        """Count the values of ``delta``, a float64 array of any shape."""
        finite = np.isfinite(delta)
        self.not_finite += int(delta.size - finite.sum())
        size = np.abs(delta[finite & (delta != 0)])
        self.equal += int((delta == 0).sum())
        bins = np.floor((np.log10(size) - LOWEST_DECADE) * BINS_PER_DECADE)
        indices = np.clip(bins, 0, BINS - 1).astype(np.int64)
        self.counts += np.bincount(indices, minlength=BINS)


def bin_edges() -> list[float]:
    """log10 of the histogram's edges, ascending, one more than there are bins."""
    return [LOWEST_DECADE + i / BINS_PER_DECADE for i in range(BINS + 1)]


class Thumbnails:
    """Pass an instance as ``observe`` to :func:`porting.parity.compare`; then read its attributes.

    ``dtype``: the run's float type, "" before the first tap. ``maps``: tap → the channel that differs most
    and the one that varies most. ``histograms``: output tap → its differences. A tap whose two sides have
    different shapes gets neither. Memory: at most 14 kB per tap, 1 kB more for an output, for any image size.
    """

    def __init__(self) -> None:
        self.dtype = ""
        self.maps: dict[str, tuple[Thumbnail, ...]] = {}
        self.histograms: dict[str, Histogram] = {}

    def __call__(self, pair: TapPair, ours: np.ndarray, reference: np.ndarray) -> None:
        """Keep the maps and the histogram of one tap. ``ours`` and ``reference``: float [N, H, W, C]."""
        self.dtype = str(reference.dtype)
        if ours.shape != reference.shape or not ours.size:
            return
        # A faulty network makes infinities and NaN; they are drawn without a warning.
        with np.errstate(invalid="ignore", over="ignore"):
            differences, variances = _per_channel(ours, reference)
            image, first = np.unravel_index(int(differences.argmax()), differences.shape)
            choice = [("differs most", int(first))]
            if differences.shape[1] > 1:
                variances[image, first] = -1.0  # the second map should show a different channel
                choice.append(("varies most", int(variances[image].argmax())))
            self.maps[pair.tap] = tuple(
                _thumbnail(why, int(image), channel, ours, reference) for why, channel in choice
            )
            if pair.tap.startswith(OUTPUTS):
                histogram = self.histograms[pair.tap] = Histogram()
                for _, a, b in _blocks(ours, reference):
                    histogram.add(a - b)


def _blocks(ours: np.ndarray, reference: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(image, ours, reference), float64 [pixels, C], some rows of one image at a time."""
    count, height, width, channels = ours.shape
    rows = max(1, _BLOCK // (width * channels))
    for image in range(count):
        for top in range(0, height, rows):
            a, b = (x[image, top : top + rows].reshape(-1, channels) for x in (ours, reference))
            yield image, a.astype(np.float64), b.astype(np.float64)


def _per_channel(ours: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every image and channel, float64 [N, C]: squared error, and the reference's variance.

    A variance that is NaN or infinite counts as zero. Such an error stays, because argmax treats NaN as the
    largest.
    """
    count, height, width, channels = ours.shape
    error, total, squares = np.zeros((3, count, channels))
    for image, a, b in _blocks(ours, reference):
        error[image] += np.square(a - b).sum(axis=0)
        total[image] += b.sum(axis=0)
        squares[image] += np.square(b).sum(axis=0)
    variance = squares / (height * width) - np.square(total / (height * width))
    variance[~np.isfinite(variance)] = 0.0
    return error, variance


def _thumbnail(why: str, image: int, channel: int, ours: np.ndarray, reference: np.ndarray) -> Thumbnail:
    a, b = (x[image, :, :, channel].astype(np.float64) for x in (ours, reference))
    cell = -(-max(a.shape) // SIDE)
    small_a, small_b = _cell_means(a, cell), _cell_means(b, cell)
    delta = _cell_peaks(a - b, cell)
    values = np.concatenate([small_a.ravel(), small_b.ravel()])
    values = values[np.isfinite(values)]
    lowest, highest = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    largest = float(np.abs(delta[np.isfinite(delta)]).max(initial=0.0))
    return Thumbnail(
        why=why,
        image=image,
        channel=channel,
        cell=cell,
        lowest=lowest,
        highest=highest,
        largest=largest,
        ours=_quantise(small_a, lowest, highest),
        reference=_quantise(small_b, lowest, highest),
        difference=_quantise(delta, -largest, largest),
    )


def _starts(size: int, cell: int) -> np.ndarray:
    return np.arange(0, size, cell)


def _cell_means(x: np.ndarray, cell: int) -> np.ndarray:
    """Mean of every ``cell`` × ``cell`` square of [H, W]; those at the far edges may be narrower."""
    for axis, size in enumerate(x.shape):
        starts = _starts(size, cell)
        widths = np.diff(np.append(starts, size))
        sums = np.add.reduceat(x, starts, axis=axis)
        x = sums / (widths[:, None] if axis == 0 else widths)
    return x


def _cell_peaks(x: np.ndarray, cell: int) -> np.ndarray:
    """The value furthest from zero in every square: a mean would hide a fault of a single pixel."""
    rows, columns = _starts(x.shape[0], cell), _starts(x.shape[1], cell)
    high = np.maximum.reduceat(np.maximum.reduceat(x, rows, axis=0), columns, axis=1)
    low = np.minimum.reduceat(np.minimum.reduceat(x, rows, axis=0), columns, axis=1)
    return np.where(high >= -low, high, low)


def _quantise(x: np.ndarray, lowest: float, highest: float) -> np.ndarray:
    span = highest - lowest
    if span > 0:
        levels = LOWEST + np.rint((x - lowest) / span * (HIGHEST - LOWEST))
    else:
        levels = np.full(x.shape, float(MIDDLE))
    finite = np.isfinite(x)
    return np.where(finite, np.where(finite, levels, 0), NOT_FINITE).astype(np.uint8)
