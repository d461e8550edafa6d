"""Named, invertible array transforms: from AutoML variables to one PyTorch tensor, and back.

Forward takes the rule's source arrays, in the rule's order, and returns the PyTorch array. Inverse takes the
PyTorch array and returns the source arrays. Arithmetic is in float64; the caller chooses the final type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Transform:
    """A named pair of functions.

    ``inverse(forward(*sources), len(sources))`` gives the sources again. If the name contains *fold*, it
    gives sources that make the same function.
    """

    name: str
    forward: Callable[..., np.ndarray]
    inverse: Callable[[np.ndarray, int], Arrays]

    def __repr__(self) -> str:
        return self.name


def _permutation(name: str, axes: tuple[int, ...]) -> Transform:
    back = tuple(int(i) for i in np.argsort(axes))
    return Transform(name, lambda a: a.transpose(axes), lambda a, n: (a.transpose(back),))


def _fold_bias(mean: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return np.subtract(mean, bias, dtype=np.float64)


def _unfold_bias(mean: np.ndarray, count: int) -> Arrays:
    return mean, np.zeros_like(mean)


IDENTITY = Transform("identity", lambda a: a, lambda a, n: (a,))

#: [h, w, in, out] ↔ [out, in, h, w]
CONV_KERNEL = _permutation("conv kernel HWIO → OIHW", (3, 2, 0, 1))

#: [h, w, C, 1] ↔ [C, 1, h, w]
DEPTHWISE_KERNEL = _permutation("depthwise kernel HWC1 → C1HW", (2, 3, 0, 1))

#: (moving mean, bias of the convolution before it) → mean − bias. A bias before a batch norm shifts the batch
#: norm's mean and nothing else, in evaluation and in training. The inverse is (mean, zeros).
FOLD_BIAS_INTO_MEAN = Transform("fold bias into mean", _fold_bias, _unfold_bias)

#: WSM, WSM_1, …, each [] or [C] ↔ [inputs] or [inputs, C]
STACK = Transform("stack", lambda *arrays: np.stack(arrays), lambda a, n: tuple(a[i] for i in range(n)))

#: PyTorch's count of training batches: zero. AutoML has no such count, and a fixed momentum never reads it.
ZERO_COUNTER = Transform("zero counter", lambda: np.zeros((), np.int64), lambda a, n: ())
