"""The proof: both networks on the same input, compared at every tap.

Names are imported when they are first used, so that importing ``porting.parity.reference`` does not load
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from porting.parity.lockstep import ParityResult, TapResult, compare, tapped, tensorflow_reference
    from porting.parity.measure import Difference, difference, tolerances
    from porting.parity.proof import Listener, Proof, prove

_HOMES = {
    "Difference": "measure",
    "Listener": "proof",
    "ParityResult": "lockstep",
    "Proof": "proof",
    "TapResult": "lockstep",
    "compare": "lockstep",
    "difference": "measure",
    "prove": "proof",
    "tapped": "lockstep",
    "tensorflow_reference": "lockstep",
    "tolerances": "measure",
}

__all__ = [
    "Difference",
    "Listener",
    "ParityResult",
    "Proof",
    "TapResult",
    "compare",
    "difference",
    "prove",
    "tapped",
    "tensorflow_reference",
    "tolerances",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
