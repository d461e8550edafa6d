"""Normalise and resize on any device: the definition. Source: TensorFlow's ``ResizeBilinear`` kernel."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pytorch_model.config import EfficientDetConfig


def normalise(pixels: Tensor, config: EfficientDetConfig) -> Tensor:
    """uint8 [..., 3, h, w] → float32 of the same shape, (pixels - mean_rgb) / stddev_rgb."""
    mean, stddev = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device)[:, None, None]
        for values in (config.mean_rgb, config.stddev_rgb)
    )
    return (pixels.float() - mean) / stddev


def resize_bilinear(images: Tensor, size: tuple[int, int], half_pixel_centres: bool = True) -> Tensor:
    """Resize float32 [..., h, w] to ``size`` (height, width) as TensorFlow does, without antialiasing.

    ``torch.nn.functional.interpolate`` adds the four neighbours in another order and differs in the last
    bits. TensorFlow interpolates from the left neighbour to the right one, then from top to bottom.
    Without ``half_pixel_centres``, TensorFlow 1's resizing: the top left corners of pixels are matched.
    """
    left, right, step_x = (
        torch.from_numpy(array).to(images.device)
        for array in neighbours(images.shape[-1], size[1], half_pixel_centres)
    )
    top, bottom, step_y = (
        torch.from_numpy(array).to(images.device)
        for array in neighbours(images.shape[-2], size[0], half_pixel_centres)
    )
    left_columns = images.index_select(-1, left)
    rows = left_columns + (images.index_select(-1, right) - left_columns) * step_x
    top_rows = rows.index_select(-2, top)
    return top_rows + (rows.index_select(-2, bottom) - top_rows) * step_y[:, None]


def neighbours(
    size: int, new_size: int, half_pixel_centres: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per output position: the two input positions around it, and its distance from the first."""
    ratio = np.float32(size) / np.float32(new_size)
    centre = np.float32(0.5 if half_pixel_centres else 0)
    places = (np.arange(new_size, dtype=np.float32) + centre) * ratio - centre
    below = np.floor(places)
    first = np.maximum(below, 0).astype(np.int64)
    second = np.minimum(np.ceil(places), size - 1).astype(np.int64)
    # The step uses the unclamped position. At an edge both neighbours are the same, so it has no effect.
    return first, second, places - below
