"""Wrong weights by kind: a layer's tensors compared with those that each common mistake would have made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from porting.convert import port_arrays
from porting.parity.diagnosis.layer import rules_of
from porting.rules import Rule, TapPair, rules
from porting.transforms import CONV_KERNEL, DEPTHWISE_KERNEL, FOLD_BIAS_INTO_MEAN, STACK
from pytorch_model import bifpn
from pytorch_model.efficientdet import EfficientDet


def kind_of_weights(
    model: EfficientDet,
    variables: Mapping[str, np.ndarray],
    raw_variables: Mapping[str, np.ndarray] | None,
    pair: TapPair,
) -> tuple[str, str]:
    """(kind of mistake, a sentence about it) for a layer whose weights are wrong.

    ``raw_variables``: the values before averaging, if known.
    """
    state = model.state_dict()
    wrong = []
    for rule in rules_of(model, pair):
        expected = port_arrays([rule], variables, "float64")[rule.target]
        ours = state[rule.target].cpu().double().numpy()
        if not _close(ours, expected):
            wrong.append((rule, ours, expected))
    for rule, ours, expected in wrong:
        for kind, made in _mistakes(rule, expected, variables, raw_variables, model):
            if made.shape == ours.shape and _close(ours, made):
                return kind, f"this mistake makes exactly {rule.target} from {' and '.join(rule.sources)}"
    names = ", ".join(rule.target for rule, _, _ in wrong)
    return "wrong values in the weights", f"{names}: the rules make other values from the variables"


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-5, atol=1e-7))


def _mistakes(
    rule: Rule,
    expected: np.ndarray,
    variables: Mapping[str, np.ndarray],
    raw_variables: Mapping[str, np.ndarray] | None,
    model: EfficientDet,
) -> Iterator[tuple[str, np.ndarray]]:
    """(kind of mistake, the tensor it would have made)."""
    sources = [variables[source].astype(np.float64) for source in rule.sources]
    if raw_variables is not None:
        raw = [raw_variables[source].astype(np.float64) for source in rule.sources]
        yield "raw values instead of moving averages", rule.transform.forward(*raw)
    if rule.transform is FOLD_BIAS_INTO_MEAN:
        yield "bias dropped", sources[0]
        yield "bias folded with the wrong sign", sources[0] + sources[1]
    if rule.transform in (CONV_KERNEL, DEPTHWISE_KERNEL):
        yield "kernel layout transposed", expected.swapaxes(2, 3)
        yield "kernel layout transposed", expected.swapaxes(0, 1)
        yield "kernel layout transposed", sources[0].reshape(expected.shape)
        yield "kernel flipped", expected[:, :, ::-1, ::-1]
    if rule.transform is STACK:
        positive = np.maximum(expected, 0)
        yield "fusion weights normalised twice", positive / (positive.sum(0) + bifpn.FASTATTN_EPSILON)
        yield "fusion weights in the wrong order", expected[::-1]
    yield from _swaps(rule, variables, model)


def _swaps(
    rule: Rule, variables: Mapping[str, np.ndarray], model: EfficientDet
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of neighbours: the same leaf at another level, or another leaf of the same batch norm."""
    owner, leaf = rule.target.rsplit(".", 1)
    for other in rules(model.config):
        if other.target == rule.target or not other.sources:
            continue
        other_owner, other_leaf = other.target.rsplit(".", 1)
        if other_owner == owner:
            kind = f"{leaf} and {other_leaf} swapped"
        elif other_leaf == leaf and other_owner.rsplit(".", 1)[0] == owner.rsplit(".", 1)[0]:
            kind = "levels swapped" if ".bns." in owner else "layers swapped"
        else:
            continue
        yield kind, port_arrays([other], variables, "float64")[other.target]
