"""How far apart two arrays are, and how far is too far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

#: In float64 two right implementations differ by rounding only, about 1e-13 after D7x's 700 layers. A wrong
#: epsilon, padding or dropped bias is 1e-4 or more.
FLOAT64_TOLERANCE = 1e-10

#: float32, one layer fed the same input: rounding of one convolution's sum, at most some thousand terms.
FLOAT32_ISOLATED_TOLERANCE = 1e-5

#: float32, everything since the image: rounding grows with depth. AutoML's float32 differs from its float64
#: by up to 4e-4 (D7x), and each of the two sides compared here may be off by as much.
FLOAT32_ACCUMULATED_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Difference:
    """``relative``: ‖ours − reference‖₂ / ‖reference‖₂. ``maximum``: the largest absolute difference.

    Both are infinite if a value on either side is NaN or infinite, or if the shapes differ.
    """

    relative: float
    maximum: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.relative)


INFINITE = Difference(math.inf, math.inf)


def difference(ours: np.ndarray, reference: np.ndarray) -> Difference:
    """Compare arrays of the same layout. Sums run in float64."""
    if ours.shape != reference.shape or not (np.isfinite(ours).all() and np.isfinite(reference).all()):
        return INFINITE
    if not ours.size:
        return Difference(0.0, 0.0)
    delta = np.subtract(ours, reference, dtype=np.float64).reshape(-1)
    flat = reference.reshape(-1).astype(np.float64, copy=False)
    relative = relative_l2(float(delta @ delta), float(flat @ flat))
    return Difference(relative, float(np.abs(delta).max()))


def relative_l2(error: float, reference: float) -> float:
    """Relative L2, ‖error‖₂ / ‖reference‖₂, from the two sums of squares.

    Infinite if a sum is NaN or infinite, or if the reference is zero and the error is not.
    """
    if not (math.isfinite(error) and math.isfinite(reference)):
        return math.inf
    if reference:
        return math.sqrt(error) / math.sqrt(reference)
    return 0.0 if error == 0 else math.inf


def tolerances(dtype: str) -> tuple[float, float]:
    """(accumulated, isolated) tolerance of a float type."""
    if dtype == "float64":
        return FLOAT64_TOLERANCE, FLOAT64_TOLERANCE
    return FLOAT32_ACCUMULATED_TOLERANCE, FLOAT32_ISOLATED_TOLERANCE
