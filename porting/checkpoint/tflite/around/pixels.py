"""The part of a TFLite graph before the network: grey levels → the normalised image.

AutoML's TensorFlow 1 exporter puts it into the file, for images of the network's own size (``inference.py``).
"""

from __future__ import annotations

import math

import numpy as np

from porting.checkpoint.tflite.flow import Mismatch, Step
from porting.checkpoint.tflite.layers import LayerMatcher
from porting.checkpoint.tflite.structure import Normalisation

# Operators that change neither the number of values nor the values, if the image has the network's size
_ARRANGED = ("STRIDED_SLICE", "RESHAPE", "CAST", "RESIZE_BILINEAR", "PAD")
_COLOURS = 3
_MOST_DIGITS = 6


def find_pixels(matcher: LayerMatcher, image: int) -> tuple[int, Normalisation | None]:
    """(the tensor that the stem reads, the normalisation before it or None). Places the operators.

    Raises :class:`Mismatch` if the image is changed in another way.
    """
    flow = matcher.flow
    size = math.prod(flow.shape(image))
    scale, offset = np.ones(_COLOURS), np.zeros(_COLOURS)
    x, steps = image, list[Step]()
    while [step.kind for step in flow.consumers[x]] not in ([], ["CONV_2D"]):
        step = flow.consumers[x][0]
        if step.kind in _ARRANGED:
            factor, term = np.ones(()), np.zeros(())
        else:
            factor, term = _affine(matcher, step)
        if len(flow.consumers[x]) != 1 or math.prod(flow.shape(step.output)) != size:
            raise Mismatch(f"{step.operator} changes the image in another way than AutoML's export")
        scale, offset = scale * factor, offset * factor + term
        steps.append(step)
        x = step.output
    for step in steps:
        matcher.place(step)
    if not any(step.kind not in _ARRANGED for step in steps):
        return x, None
    if not (scale > 0).all():
        raise Mismatch("it multiplies the image by a number that is not positive")
    return x, Normalisation(_rounded(-offset / scale), _rounded(1 / scale))


def _affine(matcher: LayerMatcher, step: Step) -> tuple[np.ndarray, np.ndarray]:
    """(factor, term) of an operator on grey levels, each a number or one for each colour."""
    constants = matcher.flow.constants
    value = next((constants[i] for i in step.operator.inputs[1:] if i in constants), None)
    if value is not None and math.prod(value.shape) in (1, _COLOURS) and not value.is_quantized:
        number = value.values().reshape(-1)
        forms = {
            "SUB": (np.ones(()), -number),
            "ADD": (np.ones(()), number),
            "MUL": (number, np.zeros(())),
            "DIV": (1 / number if number.all() else np.zeros(()), np.zeros(())),
        }
        if step.kind in forms:
            return forms[step.kind]
    raise Mismatch(f"{matcher.after(step.inputs[0])}, but the stem or a normalisation should be there")


def _rounded(values: np.ndarray) -> tuple[float, float, float]:
    """The numbers with the fewest digits that a float32 does not distinguish from ``values``."""
    for digits in range(_MOST_DIGITS):
        rounded = np.round(values, digits)
        if np.allclose(rounded, values, rtol=2e-7, atol=0):
            break
    red, green, blue = (float(value) for value in rounded)
    return red, green, blue
