"""The parts of a network and their functions, with the errors that rounding of stored tensors may cause.

The network is cut into *parts*: a convolution with its batch norm, a node's fusion weights, any other tensor
by itself. The functions of a part in two sets of weights are compared:

- convolution and batch norm: y = scale · kernel * x + shift, with scale = weight / √(var + ε) and
  shift = bias − (mean − convolution's bias) · scale; the kernel of a separable convolution is the product of
  its two;
- fusion: the normalised weights.

Two parts are the same function if every number agrees within the error that rounding the stored tensors can
cause. That bound is computed together with the numbers, so it needs no tuning: see :class:`_Rounded`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from porting.parity.measure import Difference, difference
from pytorch_model.bifpn import FASTATTN_EPSILON
from pytorch_model.config import BN_EPSILON, EfficientDetConfig

#: The number of roundings of a stored number that may lie between two files of one function: folding a bias
#: or moving a factor takes up to four float32 operations (add ε, root, divide, multiply).
ROUNDINGS = 4

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class _Rounded:
    """Numbers, and the largest error in them from rounding every stored tensor behind them once.

    Both float64. Bounds are first order; the float64 arithmetic here counts as one more rounding.
    """

    value: Tensor
    error: Tensor

    @classmethod
    def of(cls, value: Tensor, error: Tensor) -> _Rounded:
        return cls(value, error + _unit(torch.float64) * value.abs())

    @classmethod
    def stored(cls, tensor: Tensor, exact: bool) -> _Rounded:
        """A tensor as a file has it; ``exact``: the other file has the same one."""
        value = tensor.double()
        unit = 0.0 if exact else _unit(tensor.dtype)
        return cls(value, unit * value.abs().clamp(min=torch.finfo(tensor.dtype).tiny))

    def __add__(self, other: _Rounded) -> _Rounded:
        return self.of(self.value + other.value, self.error + other.error)

    def __sub__(self, other: _Rounded) -> _Rounded:
        return self.of(self.value - other.value, self.error + other.error)

    def __mul__(self, other: _Rounded) -> _Rounded:
        error = self.value.abs() * other.error + other.value.abs() * self.error
        return self.of(self.value * other.value, error)

    def __truediv__(self, other: _Rounded) -> _Rounded:
        value = self.value / other.value
        return self.of(value, (self.error + value.abs() * other.error) / other.value.abs())

    def sqrt(self) -> _Rounded:
        value = self.value.sqrt()
        return self.of(value, self.error / (2 * value))

    def plus(self, constant: float) -> _Rounded:
        return self.of(self.value + constant, self.error)

    def shaped(self, change: Callable[[Tensor], Tensor]) -> _Rounded:
        """Both tensors, reshaped or transposed or summed in the same way."""
        return _Rounded(change(self.value), change(self.error))


def tensor_difference(a: Tensor, b: Tensor) -> Difference:
    return difference(a.double().numpy(), b.double().numpy())


def _unit(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


_Numbers = Mapping[str, _Rounded]


@dataclass(frozen=True)
class Part:
    """A part of the network. ``keys``: its tensors, which a side may lack. ``function``: its outputs."""

    name: str
    keys: tuple[str, ...]
    function: Callable[[_Numbers], tuple[_Rounded, ...]]

    def compare(
        self, a: Mapping[str, Tensor], b: Mapping[str, Tensor], unequal: set[str]
    ) -> tuple[Difference, bool]:
        """The difference between a's function and b's, and whether rounding explains it."""
        ours, theirs = (
            self.function(
                {
                    key: _Rounded.stored(side[key], exact=key in a and key in b and key not in unequal)
                    for key in self.keys
                    if key in side
                }
            )
            for side in (a, b)
        )
        same = all(
            bool(((x.value - y.value).abs() <= ROUNDINGS * (x.error + y.error)).all())
            for x, y in zip(ours, theirs, strict=True)
        )
        flat_a, flat_b = (torch.cat([x.value.reshape(-1) for x in side]) for side in (ours, theirs))
        return tensor_difference(flat_a, flat_b), same


def parts_of(shared: Iterable[str], folded: set[str], config: EfficientDetConfig | None) -> Iterator[Part]:
    """All parts of the network; every shared key is in at least one."""
    keys = set(shared)
    left = dict.fromkeys(shared)
    for bn in batch_norms(keys):
        kernels = kernels_before(bn, keys)
        biases = tuple(key for key in (bias_of(kernels),) if key in keys or key in folded)
        tensors = tuple(f"{bn}.{leaf}" for leaf in _BATCH_NORM)
        yield Part(
            bn.removesuffix(".bn"),
            (*kernels, *biases, *tensors),
            partial(_convolution, kernels=kernels, bias=bias_of(kernels), bn=bn),
        )
        for key in (*kernels, *biases, *tensors):
            left.pop(key, None)
    for key in list(left):
        name = key.removesuffix(".depthwise.weight")
        if name != key and f"{name}.pointwise.weight" in left:
            kernels, bias = _kernels(name, keys), f"{name}.pointwise.bias"
            biases = (bias,) if bias in left else ()
            yield Part(name, (*kernels, *biases), partial(_convolution, kernels=kernels, bias=bias, bn=None))
            for done in (*kernels, *biases):
                del left[done]
    for key in left:
        fusion = key.endswith(".fuse.weights") and config is not None
        function = partial(_fusion, key=key, method=config.fpn_weight_method) if fusion and config else None
        yield Part(key.rpartition(".")[0], (key,), function or partial(_as_stored, key=key))


def batch_norms(keys: set[str]) -> list[str]:
    """Names of the batch norms of which ``keys`` has every tensor, and those of the convolution before."""
    names = sorted(key.removesuffix(".running_var") for key in keys if key.endswith(".running_var"))
    return [
        bn
        for bn in names
        if keys.issuperset(f"{bn}.{leaf}" for leaf in _BATCH_NORM)
        and keys.issuperset(kernels_before(bn, keys))
    ]


def kernels_before(bn: str, keys: set[str]) -> tuple[str, ...]:
    """The kernels of the convolution whose output the batch norm ``bn`` normalises."""
    head = re.fullmatch(r"(.+)\.bns\.(\d+)\.\d+", bn)  # one convolution serves the batch norms of all levels
    return _kernels(f"{head[1]}.convs.{head[2]}" if head else f"{bn.removesuffix('bn')}conv", keys)


def _kernels(conv: str, keys: set[str]) -> tuple[str, ...]:
    separable = (f"{conv}.depthwise.weight", f"{conv}.pointwise.weight")
    return separable if keys.issuperset(separable) else (f"{conv}.weight",)


def bias_of(kernels: tuple[str, ...]) -> str:
    """The key of the bias, which the last convolution adds."""
    return f"{kernels[-1].removesuffix('.weight')}.bias"


def _convolution(
    numbers: _Numbers, kernels: tuple[str, ...], bias: str, bn: str | None
) -> tuple[_Rounded, ...]:
    """(kernel [out, in, h, w], shift [out]) of a convolution and the batch norm after it, if any."""
    kernel, shift = numbers[kernels[-1]], numbers.get(bias)
    if bn is not None:
        weight, beta, mean, variance = (numbers[f"{bn}.{leaf}"] for leaf in _BATCH_NORM)
        scale = weight / variance.plus(BN_EPSILON).sqrt()
        kernel = kernel * scale.shaped(lambda x: x.reshape(-1, 1, 1, 1))
        shift = beta - (mean - shift if shift else mean) * scale
    if len(kernels) == 2:  # depthwise [in, 1, h, w], then pointwise [out, in, 1, 1]
        kernel = kernel * numbers[kernels[0]].shaped(lambda x: x.transpose(0, 1))
    return (kernel, shift) if shift else (kernel,)


def _fusion(numbers: _Numbers, key: str, method: str) -> tuple[_Rounded, ...]:
    """The factors of a node's inputs, as the network normalises them: [inputs] or [inputs, C]."""
    weights = numbers[key]
    if not method.endswith("fastattn"):
        factors = torch.softmax(weights.value, dim=0)
        return (_Rounded.of(factors, factors * 2 * weights.error.amax(dim=0)),)
    positive = weights.shaped(torch.relu)  # relu changes no error, as errors are never negative
    total = positive.shaped(lambda x: x.sum(dim=0)).plus(FASTATTN_EPSILON)
    return (positive / total,)


def _as_stored(numbers: _Numbers, key: str) -> tuple[_Rounded, ...]:
    return (numbers[key],)
