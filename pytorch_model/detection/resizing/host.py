"""Normalise and resize on the CPU: the same result as that of ``tensors``, bit for bit, in less time.

One colour at a time, whose values stay in the processor's cache, and without temporary arrays of the whole
image. It takes one core and none of PyTorch's threads, so images can be made ready beside a network.
"""

from __future__ import annotations

import numpy as np

from pytorch_model.config import EfficientDetConfig
from pytorch_model.detection.resizing.tensors import neighbours


def resize_on_host(
    pixels: np.ndarray, config: EfficientDetConfig, half_pixel_centres: bool, out: np.ndarray
) -> None:
    """Write uint8 [n, 3, h, w], normalised and resized, into ``out`` float32 [n, 3, H, W]."""
    left, right, step_x = neighbours(pixels.shape[3], out.shape[3], half_pixel_centres)
    top, bottom, step_y = neighbours(pixels.shape[2], out.shape[2], half_pixel_centres)
    colours = zip(config.mean_rgb, config.stddev_rgb, strict=True)
    for channel, (mean, stddev) in enumerate(colours):
        for image, resized in zip(pixels[:, channel], out[:, channel], strict=True):
            plane = image.astype(np.float32)
            plane -= np.float32(mean)
            plane /= np.float32(stddev)
            rows = _between(plane.take(left, axis=1), plane.take(right, axis=1), step_x)
            resized[:] = _between(rows.take(top, axis=0), rows.take(bottom, axis=0), step_y[:, None])


def _between(first: np.ndarray, second: np.ndarray, step: np.ndarray) -> np.ndarray:
    """first + (second - first) · step, in place of ``second``."""
    second -= first
    second *= step
    second += first
    return second
