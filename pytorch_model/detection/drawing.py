"""Images with their detections drawn in: boxes, class names, scores."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


def draw(pixels: Tensor, detections: Mapping[str, Tensor], names: Mapping[int, str]) -> Image.Image:
    """The image with its boxes, class names and scores; the best detection on top.

    ``pixels``: uint8 [3, h, w], RGB. ``detections``: as :class:`Detector` returns them, on the CPU.
    ``names``: class id → name.
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    canvas = ImageDraw.Draw(image)
    line_width = max(2, min(image.size) // 250)
    font = ImageFont.load_default(max(11, min(image.size) // 40))
    limits = torch.tensor([image.width, image.height, image.width, image.height]) - 1.0
    boxes = detections["boxes"].float().clamp(min=0).minimum(limits).tolist()
    labels, scores = detections["labels"].tolist(), detections["scores"].tolist()
    for (left, top, right, bottom), label, score in reversed(list(zip(boxes, labels, scores, strict=True))):
        colour = _colour(label)
        canvas.rectangle((left, top, right, bottom), outline=colour, width=line_width)
        text = f"{names[label]} {score:.2f}"
        text_box = canvas.textbbox((left + line_width, top + line_width), text, font=font)
        canvas.rectangle(text_box, fill=colour)
        canvas.text((left + line_width, top + line_width), text, fill=(0, 0, 0), font=font)
    return image


def _colour(label: int) -> tuple[int, int, int]:
    """A light colour for each class; hues of neighbouring ids differ by the golden ratio."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.6, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)
