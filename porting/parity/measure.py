"""How far apart two arrays are, and how far is too far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

#: float64 has nothing to hide behind: two right implementations differ by rounding alone, about 1e-13 after
#: D7x's 700 layers. A wrong epsilon, padding or dropped bias is 1e-4 or more.
FLOAT64_TOLERANCE = 1e-10

#: float32, one layer fed the same input: rounding of one convolution's sum, at most some thousand terms.
FLOAT32_ISOLATED_TOLERANCE = 1e-5

#: float32, everything since the image: rounding grows with depth. AutoML's own float32 differs from its own
#: float64 by up to 4e-4 (D7x); each of the two sides compared here may be that far out.
FLOAT32_ACCUMULATED_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Difference:
    """``relative``: ‖ours − reference‖₂ / ‖reference‖₂. ``maximum``: the largest absolute difference.

    Infinite where a value on either side is NaN or infinite, or the shapes differ.
    """

    relative: float
    maximum: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.relative)


INFINITE = Difference(math.inf, math.inf)


def difference(ours: np.ndarray, reference: np.ndarray) -> Difference:
    """Compare arrays of the same layout. Sums run in float64 whatever the arrays' type."""
    if ours.shape != reference.shape or not (np.isfinite(ours).all() and np.isfinite(reference).all()):
        return INFINITE
    if not ours.size:
        return Difference(0.0, 0.0)
    delta = np.subtract(ours, reference, dtype=np.float64).reshape(-1)
    error = math.sqrt(float(delta @ delta))
    flat = reference.reshape(-1).astype(np.float64, copy=False)
    norm = math.sqrt(float(flat @ flat))
    relative = error / norm if norm else (0.0 if error == 0 else math.inf)
    return Difference(relative, float(np.abs(delta).max()))


def tolerances(dtype: str) -> tuple[float, float]:
    """(accumulated, isolated) tolerance of a float type."""
    if dtype == "float64":
        return FLOAT64_TOLERANCE, FLOAT64_TOLERANCE
    return FLOAT32_ACCUMULATED_TOLERANCE, FLOAT32_ISOLATED_TOLERANCE
