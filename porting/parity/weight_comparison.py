"""Are two sets of weights the same function, and if not, where do they part?

Tensors that differ may still make the same network: a bias may sit in a batch norm's mean or before it, a
factor in a kernel or in the gamma behind it, and a negative fast-attention weight is as good as zero. So the
network is cut into *parts* (a convolution with its batch norm; a node's fusion weights; any other tensor by
itself) and what each part computes is compared:

- convolution and batch norm: y = scale · kernel * x + shift, with scale = weight / √(var + ε) and
  shift = bias − (mean − convolution's bias) · scale; the kernel of a separable convolution is the product of
  its two;
- fusion: the normalised weights.

Two parts are the same function where every number agrees within what rounding the stored tensors can do to
it. That bound is carried along with the numbers, so it needs no tuning: see :class:`_Rounded`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from porting.checkpoint import Checkpoint
from porting.convert import apply_rules, convert
from porting.parity.measure import Difference, difference
from porting.rules import rules
from porting.scopes import STATISTICS
from pytorch_model.bifpn import FASTATTN_EPSILON
from pytorch_model.config import BN_EPSILON, EfficientDetConfig
from pytorch_model.errors import WeightsError
from pytorch_model.weights.checks import plain_tensors
from pytorch_model.weights.files import read_weights
from pytorch_model.weights.pickles import load_pth

#: How many roundings of a stored number may lie between two files of one function: folding a bias or moving a
#: factor takes up to four float32 operations (add ε, root, divide, multiply).
ROUNDINGS = 4

_BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
_COUNTER = ".num_batches_tracked"  # read by training with a momentum of None only, so never here

#: Fields of the configuration that the network does not read: they make anchors and prepare pictures.
_AROUND_THE_NETWORK = (
    "image_size",
    "num_scales",
    "aspect_ratios",
    "anchor_scale",
    "mean_rgb",
    "stddev_rgb",
)


class Verdict(Enum):
    """``EXACT``: bit for bit. ``SAME_FUNCTION``: stored differently, the same within rounding."""

    EXACT = "exact"
    SAME_FUNCTION = "equal up to folding and rounding"
    DIFFERENT = "different"


@dataclass(frozen=True)
class Weights:
    """One side of a comparison. ``config`` is None where the file does not say; ``source`` is its name."""

    source: str
    state_dict: Mapping[str, Tensor]
    config: EfficientDetConfig | None = None


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not bit-equal. ``difference``: of a's values from b's, relative to b.

    ``part``: the smallest part of the network the tensor works in; ``part_difference``: of what that part
    computes; ``same_function``: whether that is rounding only. A convolution shared by several batch norms
    shows the part that differs most.
    """

    key: str
    shape: tuple[int, ...]
    difference: Difference
    part: str
    part_difference: Difference
    same_function: bool


@dataclass(frozen=True)
class WeightComparison:
    """What two sets of weights have in common.

    ``tensors``: how many both sides hold, counters left out. ``differing``: those not bit-equal; first those
    that change the function, then the rest, each by falling relative difference. ``first``: the earliest in
    execution order that changes the function. ``mismatches``: what cannot be compared at all (keys, shapes,
    settings), a sentence each. ``notes``: what else to know, a sentence each. ``distance``: ‖a − b‖₂ / ‖b‖₂,
    where a − b counts only in the tensors that change the function and b in all.
    """

    a: str
    b: str
    verdict: Verdict
    tensors: int
    differing: tuple[TensorDifference, ...]
    first: TensorDifference | None
    mismatches: tuple[str, ...]
    notes: tuple[str, ...]
    distance: float

    @property
    def same_function(self) -> bool:
        return self.verdict is not Verdict.DIFFERENT

    @property
    def explanation(self) -> str:
        """The verdict in a sentence or two."""
        if self.verdict is Verdict.EXACT:
            return f"{self.a} and {self.b} are equal, bit for bit, in all {self.tensors} tensors."
        if self.verdict is Verdict.SAME_FUNCTION:
            if not self.differing:
                return f"{self.a} and {self.b} are the same function, one with its biases folded."
            change = max(tensor.part_difference.relative for tensor in self.differing)
            return (
                f"{self.a} and {self.b} are the same function: {len(self.differing)} of {self.tensors} "
                "tensors are stored differently, which changes no part by more than rounding (relative "
                f"{change:.1e})."
            )
        if self.mismatches:
            more = f" (and {len(self.mismatches) - 1} more)" if len(self.mismatches) > 1 else ""
            return f"{self.a} and {self.b} are different networks: {self.mismatches[0]}{more}."
        assert self.first is not None
        changed = sum(not tensor.same_function for tensor in self.differing)
        worst = self.differing[0]
        return (
            f"{self.a} and {self.b} differ in {changed} of {self.tensors} tensors, by {self.distance:.1e} of "
            f"all (relative L2); the first is {self.first.key} ({self.first.difference.relative:.1e}), the "
            f"worst {worst.key} ({worst.difference.relative:.1e})."
        )


@dataclass(frozen=True)
class CheckpointComparison:
    """Weights against everything a checkpoint may have been meant to give.

    ``comparisons``: name → comparison with the weights; the names are ``EMA``, ``raw`` and
    ``EMA with raw statistics`` (averaged kernels, but the batch norms' moving mean and variance as they were:
    what Keras' ``emackpt`` holds, and a common mistake), or ``raw`` alone where the checkpoint has no
    averages. They are tried in this order, up to the first that is the same function: ``match``, or None.
    ``default``: the one conversion takes.
    """

    weights: str
    checkpoint: str
    comparisons: Mapping[str, WeightComparison]
    default: str
    match: str | None

    @property
    def nearest(self) -> WeightComparison:
        """The comparison that matches, else the one with the smallest distance."""
        if self.match:
            return self.comparisons[self.match]
        return min(self.comparisons.values(), key=lambda comparison: comparison.distance)

    @property
    def passed(self) -> bool:
        """Whether the weights are what conversion makes of the checkpoint by default."""
        return self.match == self.default

    @property
    def explanation(self) -> str:
        """The verdict in a sentence or two."""
        if self.match is None:
            return self.nearest.explanation
        if self.passed:
            return self.nearest.explanation
        return (
            f"{self.weights} holds the {self.match} values of {self.checkpoint}, not the moving averages "
            "(EMA) that evaluation uses and conversion takes by default: another function, usually a worse "
            f"detector. {self.nearest.explanation}"
        )


# --- reading ------------------------------------------------------------------------------------------


def read_weight_file(path: str | os.PathLike[str]) -> Weights:
    """A weight file of this project, or any ``.pth``, ``.pt`` or ``.safetensors`` of named tensors.

    A plain file may hold the tensors at its top or under ``state_dict`` or ``model``; it has no
    configuration. Code in a file is never run. Raises :class:`WeightsError`.
    """
    path = Path(path)
    try:
        state_dict, config, _ = read_weights(path)
    except WeightsError:
        plain = _read_plain(path)
        if plain is None:
            raise
        return Weights(str(path), plain)
    return Weights(str(path), state_dict, config)


def _read_plain(path: Path) -> dict[str, Tensor] | None:
    """The named tensors in a file without a configuration; None where there are none, or it is damaged."""
    try:
        content = _load(path)
    except WeightsError:
        raise
    except Exception:  # both libraries raise many types; the caller has a better message
        return None
    if not isinstance(content, dict) or "config" in content:
        return None
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not content or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        return None
    return plain_tensors(content, str(path), path.stat().st_size)


def _load(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return load_pth(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return {**(file.metadata() or {}), "state_dict": tensors}


# --- comparing ----------------------------------------------------------------------------------------


def compare_weights(a: Weights, b: Weights) -> WeightComparison:
    """Decide whether ``a`` and ``b`` are the same network, and list where they are not.

    Tensors may be of any float type, and convolutions ahead of a batch norm may have a bias. Keys, shapes or
    settings that do not correspond raise nothing: they are :attr:`WeightComparison.mismatches`.
    """
    config = a.config or b.config
    shared = _shared(a, b, config)
    unequal = {key for key in shared if not _bit_equal(a.state_dict[key], b.state_dict[key])}
    folded = _one_sided_biases(a, b, shared)
    mismatches = [*network_settings_that_differ(a, b), *_keys(a, b, folded), *_unlike(a, b, shared)]
    rows: dict[str, TensorDifference] = {}
    for part in _parts(shared, folded, config):
        if not unequal.isdisjoint(part.keys) or not folded.isdisjoint(part.keys):
            change, same = part.compare(a.state_dict, b.state_dict, unequal)
            if not same and unequal.isdisjoint(part.keys):
                mismatches.append(
                    f"a bias that only one of them has changes {part.name} (relative {change.relative:.1e})"
                )
            for key in unequal.intersection(part.keys):
                row = _row(key, a, b, part.name, change, same)
                rows[key] = max(rows.get(key, row), row, key=_part_severity)
    first = next((rows[key] for key in shared if key in rows and not rows[key].same_function), None)
    equal = Verdict.SAME_FUNCTION if unequal or folded else Verdict.EXACT
    return WeightComparison(
        a=a.source,
        b=b.source,
        verdict=Verdict.DIFFERENT if mismatches or first else equal,
        tensors=len(shared),
        differing=tuple(sorted(rows.values(), key=_severity, reverse=True)),
        first=first,
        mismatches=tuple(mismatches),
        notes=tuple(_notes(a, b)),
        distance=_distance(a, b, shared, {key for key, row in rows.items() if not row.same_function}),
    )


def compare_with_checkpoint(
    weights: Weights, checkpoint: Checkpoint, config: EfficientDetConfig
) -> CheckpointComparison:
    """Decide which of a checkpoint's values, averaged or raw, ``weights`` were made of.

    ``config``: the checkpoint's. Raises :class:`ConversionError` where checkpoint and ``config`` do not fit,
    :class:`CheckpointError` where the file is damaged.
    """
    comparisons: dict[str, WeightComparison] = {}
    for name, state_dict in _candidates(checkpoint, config):
        other = Weights(f"{checkpoint.source} ({name})", state_dict, config)
        comparisons[name] = compare_weights(weights, other)
        if comparisons[name].same_function:
            break
    default, last = next(iter(comparisons)), name
    match = last if comparisons[last].same_function else None
    return CheckpointComparison(weights.source, checkpoint.source, comparisons, default, match)


def _candidates(
    checkpoint: Checkpoint, config: EfficientDetConfig
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """What the checkpoint may have been meant to give: conversion's default first."""
    default = convert(checkpoint, config)
    yield default.weights, default.state_dict
    if default.weights == "raw" or not checkpoint.shapes.keys() >= default.variables.keys():
        return
    raw = convert(checkpoint, config, raw=True)
    yield raw.weights, raw.state_dict
    mixed = {
        name: raw.variables[name] if name.endswith(STATISTICS) else value
        for name, value in default.variables.items()
    }
    yield "EMA with raw statistics", apply_rules(rules(config), mixed)


def _row(key: str, a: Weights, b: Weights, part: str, change: Difference, same: bool) -> TensorDifference:
    ours, theirs = a.state_dict[key], b.state_dict[key]
    return TensorDifference(key, tuple(ours.shape), _difference(ours, theirs), part, change, same)


def _part_severity(row: TensorDifference) -> tuple[bool, float]:
    return not row.same_function, row.part_difference.relative


def _severity(row: TensorDifference) -> tuple[bool, float]:
    return not row.same_function, row.difference.relative


def _difference(a: Tensor, b: Tensor) -> Difference:
    return difference(a.double().numpy(), b.double().numpy())


def _bit_equal(a: Tensor, b: Tensor) -> bool:
    """Of one type and byte for byte the same, NaNs and the sign of zero included."""
    if a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def _distance(a: Weights, b: Weights, shared: Iterable[str], changed: set[str]) -> float:
    error = norm = 0.0
    for key in shared:
        theirs = b.state_dict[key].double()
        if key in changed:
            error += float((a.state_dict[key].double() - theirs).square().sum())
        norm += float(theirs.square().sum())
    distance = math.sqrt(error / norm) if norm and math.isfinite(error) else math.inf
    return distance if error else 0.0


# --- what can be compared at all ----------------------------------------------------------------------


def _weights_only(state_dict: Mapping[str, Tensor]) -> list[str]:
    return [key for key in state_dict if not key.endswith(_COUNTER)]


def _shared(a: Weights, b: Weights, config: EfficientDetConfig | None) -> list[str]:
    """Keys of tensors that can be compared number by number, in execution order where it is known."""
    keys = [
        key
        for key in _weights_only(a.state_dict)
        if key in b.state_dict
        and a.state_dict[key].shape == b.state_dict[key].shape
        and a.state_dict[key].is_floating_point()
        and b.state_dict[key].is_floating_point()
    ]
    order = {rule.target: i for i, rule in enumerate(rules(config))} if config else {}
    return sorted(keys, key=lambda key: order.get(key, len(order)))


def _one_sided_biases(a: Weights, b: Weights, shared: Iterable[str]) -> set[str]:
    """Biases of convolutions ahead of a batch norm that only one side has, the other having folded them."""
    keys, found = set(shared), set()
    for bn in _batch_norms(keys):
        bias = _bias_of(_kernels_before(bn, keys))
        sides = [side.state_dict for side in (a, b) if bias in side.state_dict]
        if len(sides) == 1 and sides[0][bias].shape == sides[0][f"{bn}.running_mean"].shape:
            found.add(bias)
    return found


def _keys(a: Weights, b: Weights, folded: set[str]) -> Iterator[str]:
    for here, there in ((a, b), (b, a)):
        missing = [
            key for key in _weights_only(there.state_dict) if key not in here.state_dict and key not in folded
        ]
        if missing:
            more = f" and {len(missing) - 1} more that {there.source} has" if len(missing) > 1 else ""
            yield f"{here.source} lacks {missing[0]}{more}"


def _unlike(a: Weights, b: Weights, shared: Iterable[str]) -> Iterator[str]:
    """Tensors of one name that differ in shape, or are not numbers to compare."""
    comparable = set(shared)
    for key in _weights_only(a.state_dict):
        if key in b.state_dict and key not in comparable:
            ours, theirs = a.state_dict[key], b.state_dict[key]
            if ours.shape != theirs.shape:
                yield f"{key} is {list(ours.shape)} in {a.source}, {list(theirs.shape)} in {b.source}"
            else:
                yield f"{key} is {_dtype(ours)} in {a.source}, {_dtype(theirs)} in {b.source}"


def network_settings_that_differ(a: Weights, b: Weights) -> list[str]:
    """Settings that make another network of the same tensors, a sentence each."""
    if a.config is None or b.config is None:
        return []
    ours, theirs = _network_settings(a.config), _network_settings(b.config)
    return [
        f"{name} is {value} in {a.source}, {theirs[name]} in {b.source}"
        for name, value in ours.items()
        if value != theirs[name]
    ]


def _network_settings(config: EfficientDetConfig) -> dict[str, Any]:
    """What the network reads of its configuration, in evaluation."""
    settings = config.to_dict()
    for name in ("name", *_AROUND_THE_NETWORK):
        del settings[name]
    del settings["backbone"]["name"]
    if settings["act_type"] in ("silu", "swish_native"):  # AutoML's other names for it
        settings["act_type"] = "swish"
    settings["survival_prob"] = bool(settings["survival_prob"])  # set, heads add a residual
    return settings


def _notes(a: Weights, b: Weights) -> Iterator[str]:
    if a.config and b.config:
        for name in _AROUND_THE_NETWORK:
            ours, theirs = getattr(a.config, name), getattr(b.config, name)
            if ours != theirs:
                yield f"{name} is {ours} in {a.source}, {theirs} in {b.source}: detections differ"
    else:
        for side in (a, b):
            if side.config is None:
                yield f"{side.source} carries no configuration; the other's is taken to hold for both"
    ours, theirs = (_dtypes(side.state_dict) for side in (a, b))
    if ours != theirs:
        yield f"{a.source} is {ours}, {b.source} {theirs}: equal as far as the coarser can tell, at best"
    counters = [key for key in a.state_dict if key.endswith(_COUNTER) and key in b.state_dict]
    if any(not torch.equal(a.state_dict[key], b.state_dict[key]) for key in counters):
        yield "the counts of training batches differ, which no evaluation reads"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtypes(state_dict: Mapping[str, Tensor]) -> str:
    return " and ".join(sorted({_dtype(state_dict[key]) for key in _weights_only(state_dict)}))


# --- parts of the network, and what they compute ------------------------------------------------------


@dataclass(frozen=True)
class _Rounded:
    """Numbers, and how far one rounding of each stored tensor behind them may have moved them.

    Both float64. Bounds are first order; the float64 arithmetic here is counted as one more rounding.
    """

    value: Tensor
    error: Tensor

    @classmethod
    def of(cls, value: Tensor, error: Tensor) -> _Rounded:
        return cls(value, error + _unit(torch.float64) * value.abs())

    @classmethod
    def stored(cls, tensor: Tensor, exact: bool) -> _Rounded:
        """A tensor as it lies in a file; ``exact`` where the other file has the very same."""
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
        """Both tensors, reshaped or transposed or summed alike."""
        return _Rounded(change(self.value), change(self.error))


def _unit(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to ``dtype``."""
    return torch.finfo(dtype).eps / 2


_Numbers = Mapping[str, _Rounded]


@dataclass(frozen=True)
class _Part:
    """``keys``: the tensors it works with, some of which a side may lack. ``function``: what it computes."""

    name: str
    keys: tuple[str, ...]
    function: Callable[[_Numbers], tuple[_Rounded, ...]]

    def compare(
        self, a: Mapping[str, Tensor], b: Mapping[str, Tensor], unequal: set[str]
    ) -> tuple[Difference, bool]:
        """How far a's function is from b's, and whether rounding explains it."""
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
        return _difference(flat_a, flat_b), same


def _parts(shared: Iterable[str], folded: set[str], config: EfficientDetConfig | None) -> Iterator[_Part]:
    """Cut the network up; every shared key is in one part at least."""
    keys = set(shared)
    left = dict.fromkeys(shared)
    for bn in _batch_norms(keys):
        kernels = _kernels_before(bn, keys)
        biases = tuple(key for key in (_bias_of(kernels),) if key in keys or key in folded)
        tensors = tuple(f"{bn}.{leaf}" for leaf in _BATCH_NORM)
        yield _Part(
            bn.removesuffix(".bn"),
            (*kernels, *biases, *tensors),
            partial(_convolution, kernels=kernels, bias=_bias_of(kernels), bn=bn),
        )
        for key in (*kernels, *biases, *tensors):
            left.pop(key, None)
    for key in list(left):
        name = key.removesuffix(".depthwise.weight")
        if name != key and f"{name}.pointwise.weight" in left:
            kernels, bias = _kernels(name, keys), f"{name}.pointwise.bias"
            biases = (bias,) if bias in left else ()
            yield _Part(name, (*kernels, *biases), partial(_convolution, kernels=kernels, bias=bias, bn=None))
            for done in (*kernels, *biases):
                del left[done]
    for key in left:
        fusion = key.endswith(".fuse.weights") and config is not None
        function = partial(_fusion, key=key, method=config.fpn_weight_method) if fusion and config else None
        yield _Part(key.rpartition(".")[0], (key,), function or partial(_as_stored, key=key))


def _batch_norms(keys: set[str]) -> list[str]:
    """Names of the batch norms of which ``keys`` has every tensor, and of the convolution before them too."""
    names = sorted(key.removesuffix(".running_var") for key in keys if key.endswith(".running_var"))
    return [
        bn
        for bn in names
        if keys.issuperset(f"{bn}.{leaf}" for leaf in _BATCH_NORM)
        and keys.issuperset(_kernels_before(bn, keys))
    ]


def _kernels_before(bn: str, keys: set[str]) -> tuple[str, ...]:
    """The kernels of the convolution whose output the batch norm ``bn`` normalises."""
    head = re.fullmatch(r"(.+)\.bns\.(\d+)\.\d+", bn)  # one convolution serves the batch norms of all levels
    return _kernels(f"{head[1]}.convs.{head[2]}" if head else f"{bn.removesuffix('bn')}conv", keys)


def _kernels(conv: str, keys: set[str]) -> tuple[str, ...]:
    separable = (f"{conv}.depthwise.weight", f"{conv}.pointwise.weight")
    return separable if keys.issuperset(separable) else (f"{conv}.weight",)


def _bias_of(kernels: tuple[str, ...]) -> str:
    """The last convolution adds the bias."""
    return f"{kernels[-1].removesuffix('.weight')}.bias"


def _convolution(
    numbers: _Numbers, kernels: tuple[str, ...], bias: str, bn: str | None
) -> tuple[_Rounded, ...]:
    """(kernel [out, in, h, w], shift [out]) of a convolution and the batch norm behind it, if any."""
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
    positive = weights.shaped(torch.relu)  # errors are never negative, and relu makes none larger
    total = positive.shaped(lambda x: x.sum(dim=0)).plus(FASTATTN_EPSILON)
    return (positive / total,)


def _as_stored(numbers: _Numbers, key: str) -> tuple[_Rounded, ...]:
    return (numbers[key],)
