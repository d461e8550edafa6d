"""Are two sets of weights the same function, and if not, where do they differ?

Tensors that differ may still make the same network: a bias may be in a batch norm's mean or before it, a
factor in a kernel or in the gamma after it, and a negative fast-attention weight counts as zero. So not only
the tensors are compared, but the functions of the network's parts, see :mod:`porting.parity.weight_parts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from porting.checkpoint import Checkpoint
from porting.convert import RAW, apply_rules, convert
from porting.parity.compared_weights import ComparedWeights
from porting.parity.measure import Difference, relative_l2
from porting.parity.weight_parts import batch_norms, bias_of, kernels_before, parts_of, tensor_difference
from porting.rules import rules
from porting.scopes import STATISTICS
from pytorch_model.config import EfficientDetConfig, shown
from pytorch_model.errors import EfficientDetError

_COUNTER = ".num_batches_tracked"  # only read by training with a momentum of None, which no EfficientDet uses

#: Fields of the configuration that the network does not read: they are for anchors and preprocessing.
_AROUND_THE_NETWORK = (
    "image_size",
    "num_scales",
    "aspect_ratios",
    "anchor_scale",
    "mean_rgb",
    "stddev_rgb",
)


class Verdict(Enum):
    """``EXACT``: equal bit for bit. ``SAME_FUNCTION``: stored differently, but equal within rounding."""

    EXACT = "exact"
    SAME_FUNCTION = "equal up to folding and rounding"
    DIFFERENT = "different"


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not bit-equal. ``difference``: between a's values and b's, relative to b.

    ``part``: the smallest part of the network that uses the tensor. ``part_difference``: between the
    functions of that part. ``same_function``: whether rounding explains the latter. For a convolution shared
    by several batch norms, the part that differs most is shown.
    """

    key: str
    shape: tuple[int, ...]
    difference: Difference
    part: str
    part_difference: Difference
    same_function: bool


@dataclass(frozen=True)
class WeightComparison:
    """The result of :func:`compare_weights`.

    ``tensors``: the number of tensors that both sides have, without counters. ``differing``: the tensors that
    are not bit-equal: first those that change the function, then the others, each by falling relative
    difference. ``first``: the earliest in execution order that changes the function. ``mismatches``: keys,
    shapes and settings that cannot be compared, one sentence each. ``notes``: further facts, one sentence
    each. ``distance``: ‖a − b‖₂ / ‖b‖₂, with a − b only of the tensors that change the function, and b of
    all.
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
    """Weights compared with every set of values that a checkpoint may stand for.

    ``comparisons``: name → comparison with the weights. The names are ``EMA``, ``raw`` and
    ``EMA with raw statistics`` (averaged kernels, but the raw moving mean and variance of batch norms: the
    content of Keras' ``emackpt``, and a common mistake), or only ``raw`` if the checkpoint has no averages.
    They are tried in this order. ``match``: the first that is the same function, or None. ``default``: the
    name of those that a conversion uses.
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
        """Whether the weights are the default conversion of the checkpoint."""
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
            "(EMA) that evaluation uses and conversion takes by default: a different function, usually a "
            f"worse detector. {self.nearest.explanation}"
        )


# --- comparing ----------------------------------------------------------------------------------------


def compare_weights(a: ComparedWeights, b: ComparedWeights) -> WeightComparison:
    """Decide whether ``a`` and ``b`` are the same network, and list the tensors in which they differ.

    Tensors may be of any float type, and convolutions before a batch norm may have a bias. Keys, shapes or
    settings that do not correspond raise no error: they are :attr:`WeightComparison.mismatches`.
    """
    config = a.config or b.config
    shared = _shared(a, b, config)
    unequal = {key for key in shared if not _bit_equal(a.state_dict[key], b.state_dict[key])}
    folded = _one_sided_biases(a, b, shared)
    mismatches = [*network_settings_that_differ(a, b), *_keys(a, b, folded), *_unlike(a, b, shared)]
    rows: dict[str, TensorDifference] = {}
    for part in parts_of(shared, folded, config):
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
    weights: ComparedWeights, checkpoint: Checkpoint, config: EfficientDetConfig
) -> CheckpointComparison:
    """Decide from which of a checkpoint's values, averaged or raw, ``weights`` were made.

    ``config``: the checkpoint's. Raises :class:`ConversionError` if checkpoint and ``config`` do not fit,
    :class:`CheckpointError` if the file is damaged.
    """
    comparisons: dict[str, WeightComparison] = {}
    for name, state_dict in _candidates(checkpoint, config):
        other = ComparedWeights(f"{checkpoint.source} ({name})", state_dict, config)
        comparisons[name] = compare_weights(weights, other)
        if comparisons[name].same_function:
            break
    default, last = next(iter(comparisons)), name
    match = last if comparisons[last].same_function else None
    return CheckpointComparison(weights.source, checkpoint.source, comparisons, default, match)


def _candidates(
    checkpoint: Checkpoint, config: EfficientDetConfig
) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """(name, state dict) of every set of values the checkpoint may stand for, conversion's default first."""
    default = convert(checkpoint, config, ema_or_raw=True)
    yield default.values_kind, default.state_dict
    if default.values_kind == RAW or not checkpoint.shapes.keys() >= default.variables.keys():
        return
    raw = convert(checkpoint, config, raw=True)
    yield raw.values_kind, raw.state_dict
    mixed = {
        name: raw.variables[name] if name.endswith(STATISTICS) else value
        for name, value in default.variables.items()
    }
    yield "EMA with raw statistics", apply_rules(rules(config), mixed)


def _row(
    key: str, a: ComparedWeights, b: ComparedWeights, part: str, change: Difference, same: bool
) -> TensorDifference:
    ours, theirs = a.state_dict[key], b.state_dict[key]
    return TensorDifference(key, tuple(ours.shape), tensor_difference(ours, theirs), part, change, same)


def _part_severity(row: TensorDifference) -> tuple[bool, float]:
    return not row.same_function, row.part_difference.relative


def _severity(row: TensorDifference) -> tuple[bool, float]:
    return not row.same_function, row.difference.relative


def _bit_equal(a: Tensor, b: Tensor) -> bool:
    """Whether type and bytes are equal, NaNs and the sign of zero included."""
    if a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def _distance(a: ComparedWeights, b: ComparedWeights, shared: Iterable[str], changed: set[str]) -> float:
    error = norm = 0.0
    for key in shared:
        theirs = b.state_dict[key].double()
        if key in changed:
            error += float((a.state_dict[key].double() - theirs).square().sum())
        norm += float(theirs.square().sum())
    return relative_l2(error, norm) if error else 0.0


# --- what can be compared ----------------------------------------------------------------------


def _weights_only(state_dict: Mapping[str, Tensor]) -> list[str]:
    return [key for key in state_dict if not key.endswith(_COUNTER)]


def _shared(a: ComparedWeights, b: ComparedWeights, config: EfficientDetConfig | None) -> list[str]:
    """Keys of tensors that can be compared number by number, in execution order if it is known."""
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


def _one_sided_biases(a: ComparedWeights, b: ComparedWeights, shared: Iterable[str]) -> set[str]:
    """Biases of convolutions before a batch norm that one side has and the other has folded."""
    keys, found = set(shared), set()
    for bn in batch_norms(keys):
        bias = bias_of(kernels_before(bn, keys))
        sides = [side.state_dict for side in (a, b) if bias in side.state_dict]
        if len(sides) == 1 and sides[0][bias].shape == sides[0][f"{bn}.running_mean"].shape:
            found.add(bias)
    return found


def _keys(a: ComparedWeights, b: ComparedWeights, folded: set[str]) -> Iterator[str]:
    for here, there in ((a, b), (b, a)):
        missing = [
            key for key in _weights_only(there.state_dict) if key not in here.state_dict and key not in folded
        ]
        if missing:
            more = f" and {len(missing) - 1} more that {there.source} has" if len(missing) > 1 else ""
            yield f"{here.source} lacks {missing[0]}{more}"


def _unlike(a: ComparedWeights, b: ComparedWeights, shared: Iterable[str]) -> Iterator[str]:
    """Tensors of one name that differ in shape, or are not numbers to compare."""
    comparable = set(shared)
    for key in _weights_only(a.state_dict):
        if key in b.state_dict and key not in comparable:
            ours, theirs = a.state_dict[key], b.state_dict[key]
            if ours.shape != theirs.shape:
                yield f"{key} is {list(ours.shape)} in {a.source}, {list(theirs.shape)} in {b.source}"
            else:
                yield f"{key} is {_dtype(ours)} in {a.source}, {_dtype(theirs)} in {b.source}"


def network_settings_that_differ(a: ComparedWeights, b: ComparedWeights) -> list[str]:
    """Settings that make a different network of the same tensors, one sentence each."""
    if a.config is None or b.config is None:
        return []
    ours, theirs = _network_settings(a.config), _network_settings(b.config)
    differing = {name: (value, theirs[name]) for name, value in ours.items() if value != theirs[name]}
    names = a.config.backbone.name, b.config.backbone.name
    if any(name.startswith("backbone.") for name in differing) and names[0] != names[1]:
        others = {name: pair for name, pair in differing.items() if not name.startswith("backbone.")}
        differing = {"backbone": names, **others}
    return [
        f"{name} is {_in_message(mine)} in {a.source}, {_in_message(other)} in {b.source}"
        for name, (mine, other) in differing.items()
    ]


def _in_message(value: Any) -> str:
    return value if isinstance(value, str) else shown(value)


def check_same_network(weights: ComparedWeights, checkpoint: ComparedWeights) -> None:
    """Reject weights whose settings differ from the checkpoint's.

    A reference built with a wrong setting of the weight file would agree with it. Raises
    :class:`EfficientDetError`.
    """
    differing = network_settings_that_differ(weights, checkpoint)
    if differing:
        raise EfficientDetError(
            f"{differing[0]}; convert again, or give --hparams that the checkpoint was trained with"
        )


def _network_settings(config: EfficientDetConfig) -> dict[str, Any]:
    """The settings that the network reads in evaluation; those of the backbone as ``backbone.stages``, …"""
    settings = config.to_dict()
    for name in ("name", *_AROUND_THE_NETWORK):
        del settings[name]
    backbone = settings.pop("backbone")
    settings.update({f"backbone.{name}": value for name, value in backbone.items() if name != "name"})
    if settings["act_type"] in ("silu", "swish_native"):  # AutoML's other names for it
        settings["act_type"] = "swish"
    settings["survival_prob"] = bool(settings["survival_prob"])  # set, heads add a residual
    return settings


def _notes(a: ComparedWeights, b: ComparedWeights) -> Iterator[str]:
    if a.config and b.config:
        for name in _AROUND_THE_NETWORK:
            ours, theirs = getattr(a.config, name), getattr(b.config, name)
            if ours != theirs:
                yield f"{name} is {ours} in {a.source}, {theirs} in {b.source}: detections differ"
    else:
        for side in (a, b):
            if side.config is None:
                yield f"{side.source} has no configuration; the other's is used for both"
    ours, theirs = (_dtypes(side.state_dict) for side in (a, b))
    if ours != theirs:
        yield f"{a.source} is {ours}, {b.source} {theirs}: at best they are equal within the coarser type"
    counters = [key for key in a.state_dict if key.endswith(_COUNTER) and key in b.state_dict]
    if any(not torch.equal(a.state_dict[key], b.state_dict[key]) for key in counters):
        yield "the counts of training batches differ, which evaluation does not read"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtypes(state_dict: Mapping[str, Tensor]) -> str:
    return " and ".join(sorted({_dtype(state_dict[key]) for key in _weights_only(state_dict)}))
