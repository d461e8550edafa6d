"""The proof: both networks on the same input, compared at every tap."""

from porting.parity.lockstep import ParityResult, TapResult, compare, tapped, tensorflow_reference
from porting.parity.measure import Difference, difference, tolerances

__all__ = [
    "Difference",
    "ParityResult",
    "TapResult",
    "compare",
    "difference",
    "tapped",
    "tensorflow_reference",
    "tolerances",
]
