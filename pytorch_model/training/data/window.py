"""A window of a resized image, without resizing the rest of it.

Every value of a resized image depends on at most four pixels. So only the pixels that the window needs are
normalised and interpolated; the result equals the same window of ``resize_bilinear`` bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pytorch_model.detection.resizing.tensors import neighbours

#: Rows at a time: temporary arrays stay in the processor's cache, and need no fresh memory from the system.
_BLOCK = 64


class _Axis(NamedTuple):
    """``needed``: positions of the image, ascending. ``first``, ``second``: per output, indices of these."""

    needed: np.ndarray | slice
    first: np.ndarray
    second: np.ndarray
    step: np.ndarray


def resize_window(
    pixels: np.ndarray,
    size: tuple[int, int],
    offset: tuple[int, int],
    mean_rgb: tuple[float, float, float],
    stddev_rgb: tuple[float, float, float],
    out: np.ndarray,
) -> None:
    """Normalise uint8 [H, W, 3], resize it to ``size``, and write what is at ``offset`` into ``out``.

    ``size``, ``offset``: (height, width). ``out``: float32 [3, h, w]; where the resized image ends earlier,
    it is left as it is.
    """
    rows = _axis(pixels.shape[0], size[0], offset[0], out.shape[1])
    columns = _axis(pixels.shape[1], size[1], offset[1], out.shape[2])
    needed = pixels[rows.needed][:, columns.needed]
    across = np.empty((len(columns.first), needed.shape[0]), np.float32)
    for channel, (mean, stddev) in enumerate(zip(mean_rgb, stddev_rgb, strict=True)):
        # Transposed, because whole rows are copied much faster than single pixels of each row.
        plane = needed[..., channel].T.astype(np.float32, order="C")
        plane -= np.float32(mean)
        plane /= np.float32(stddev)
        _interpolate(plane, columns, across)
        _interpolate(across.T.copy(), rows, out[channel, : len(rows.first), : len(columns.first)])


def _axis(size: int, new_size: int, offset: int, length: int) -> _Axis:
    window = slice(offset, offset + length)
    first, second, step = (array[window] for array in neighbours(size, new_size, half_pixel_centres=True))
    needed, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    whole = needed[-1] - needed[0] == len(needed) - 1
    return _Axis(
        slice(needed[0], needed[-1] + 1) if whole else needed,
        places[: len(first)],
        places[len(first) :],
        step,
    )


def _interpolate(values: np.ndarray, axis: _Axis, out: np.ndarray) -> None:
    """float32 [n, m] → ``out`` [outputs, m]: first + (second - first) · step."""
    for start in range(0, len(axis.step), _BLOCK):
        block = slice(start, start + _BLOCK)
        first, result = values.take(axis.first[block], axis=0), values.take(axis.second[block], axis=0)
        result -= first
        result *= axis.step[block, None]
        result += first
        out[block] = result
