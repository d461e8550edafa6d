"""From the first layer that differs to what is wrong with it.

The layer is known: it is the first whose isolated error is out of tolerance. Its fault is found by repair:
one thing at a time is set right in that layer alone (its weights, an attribute, the arithmetic of one kind of
module) and the comparison run again. What makes the error vanish was wrong. For weights, the tensors are
then compared with what each classic mistake would have made of the same variables.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from porting.convert import apply_rules
from porting.parity.lockstep import Reference, TapResult, tapped
from porting.parity.measure import difference, tolerances
from porting.rules import Rule, TapPair, rules
from porting.transforms import CONV_KERNEL, DEPTHWISE_KERNEL, FOLD_BIAS_INTO_MEAN, STACK
from pytorch_model import bifpn
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.efficientnet import SqueezeExcite
from pytorch_model.layers import Conv2dSame


@dataclass(frozen=True)
class Statistics:
    """One tensor of the faulty layer: as it is, and as the rules make it."""

    tensor: str
    sources: tuple[str, ...]
    ours: tuple[float, float, float, float]  # min, max, mean, standard deviation
    expected: tuple[float, float, float, float]
    relative: float


@dataclass(frozen=True)
class Diagnosis:
    """``kind`` is a few words, ``detail`` a sentence; ``weights`` the layer's tensors, worst first."""

    module: str
    tap: str
    kind: str
    detail: str
    weights: tuple[Statistics, ...]


def diagnose(
    model: EfficientDet,
    variables: Mapping[str, np.ndarray],
    raw_variables: Mapping[str, np.ndarray] | None,
    reference: Reference,
    images: np.ndarray,
    first: TapResult,
) -> Diagnosis:
    """Say what is wrong with the layer at ``first`` (from :func:`compare` of the same arguments).

    ``variables`` are the values the reference uses; ``raw_variables``, where given, the same run's values
    before averaging. ``images`` [N, H, W, 3] may be small: every activation of
    the reference is kept, and the network runs once for each suspicion.
    ``model`` is left as it was.
    """
    model = copy.deepcopy(model)
    lab = _Laboratory(model, reference, images, first)
    weights = _statistics(model, variables, first.pair)
    kind, detail = _find(lab, model, variables, raw_variables, first)
    return Diagnosis(first.pair.module, first.pair.tap, kind, detail, weights)


def _find(
    lab: _Laboratory,
    model: EfficientDet,
    variables: Mapping[str, np.ndarray],
    raw_variables: Mapping[str, np.ndarray] | None,
    first: TapResult,
) -> tuple[str, str]:
    if not first.accumulated.finite and not _weights_finite(model, first.pair):
        return "NaN or infinite weights", "a tensor of this layer holds values that are not finite"
    if lab.fixed_by(_right_weights(model, variables, first.pair)):
        return _kind_of_weights(model, variables, raw_variables, first.pair)
    if lab.fixed_by(_evaluation_mode(model, variables, first.pair)):
        return (
            "batch norm in training mode",
            "it normalises with the batch's own statistics and moves its own",
        )
    for attribute, kind in _ATTRIBUTES.items():
        if lab.fixed_by(_right_attribute(model, first.pair, attribute)):
            return kind, f"the module's {attribute} is not the configuration's"
    for module_type, (kind, forward) in _ARITHMETIC.items():
        if lab.fixed_by(_right_arithmetic(model, first.pair, module_type, forward)):
            return kind, f"{module_type.__name__} computes something else than TensorFlow does"
    lines = [f"{rule.target} ← {', '.join(rule.sources)}" for rule in _rules(model, first.pair)]
    return (
        "unknown, perhaps the rules",
        "weights, attributes and arithmetic are what they should be, so porting/rules.py may be wrong here: "
        + ("; ".join(lines) or "it has no rule for this layer"),
    )


class _Laboratory:
    """Runs the comparison again under a repair and looks at the faulty layer only."""

    def __init__(
        self, model: EfficientDet, reference: Reference, images: np.ndarray, first: TapResult
    ) -> None:
        self.model, self.first = model, first
        self.expected: dict[str, np.ndarray] = {}
        reference(self.expected.__setitem__)
        parameter = next(model.parameters())
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(parameter)

    def fixed_by(self, repair: AbstractContextManager[bool]) -> bool:
        """Is the isolated error within tolerance while ``repair`` lasts? Not if it changes nothing."""
        with repair as applied:
            if not applied:
                return False
            error = self._isolated_error()
        return error <= tolerances(self.first.dtype)[1]

    def _isolated_error(self) -> float:
        """Run on the reference's activations up to the faulty layer, and no further."""

        def visit(pair: TapPair, ours: Tensor) -> Tensor:
            expected = self.expected[pair.tap]
            if pair == self.first.pair:
                raise _ReachedError(difference(ours.permute(0, 2, 3, 1).cpu().numpy(), expected).relative)
            return torch.from_numpy(expected).to(ours).permute(0, 3, 1, 2)

        try:
            with tapped(self.model, visit), torch.no_grad():
                self.model(self.images)
        except _ReachedError as reached:
            return reached.error
        raise AssertionError(f"{self.first.pair.tap} was never reached")


class _ReachedError(Exception):
    """Ends a run at the layer of interest, carrying its error."""

    def __init__(self, error: float) -> None:
        self.error = error


# --- the layer ----------------------------------------------------------------------------------------


def _segment(pair: TapPair) -> tuple[str, ...]:
    """Module paths that compute this tap from the taps before it. A prefix covers all below it."""
    module = pair.module
    parts = module.split(".")
    if pair.output is not None:  # class_net, box_net: from the last batch norm to the output
        return (f"{module}.predict", f"{module}.")
    if parts[1:2] == ["bns"]:
        return (module, f"{parts[0]}.convs.{parts[2]}", f"{parts[0]}.")
    if module.startswith("backbone.blocks.") and len(parts) == 3:
        return (f"{module}.",)  # the block's own addition; its parts have taps of their own
    if module.startswith("bifpn.") and len(parts) == 5:
        return (f"{module}.", f"{module}.act", f"{module}.conv", f"{module}.bn")
    return (module,)


def _modules(model: EfficientDet, pair: TapPair) -> Iterator[tuple[str, nn.Module]]:
    segment = _segment(pair)
    for name, module in model.named_modules():
        if any(name == s.rstrip(".") or (name.startswith(s + ".") and not s.endswith(".")) for s in segment):
            yield name, module


def _rules(model: EfficientDet, pair: TapPair) -> list[Rule]:
    """The rules that fill this layer's tensors."""
    prefixes = tuple(f"{s}." for s in _segment(pair) if not s.endswith("."))
    return [rule for rule in rules(model.config) if rule.target.startswith(prefixes) and rule.sources]


def _expected(model: EfficientDet, variables: Mapping[str, np.ndarray], pair: TapPair) -> dict[str, Tensor]:
    tensors = apply_rules(_rules(model, pair), variables, "float64")
    state = model.state_dict()
    return {key: value.to(state[key]) for key, value in tensors.items()}


def _statistics(
    model: EfficientDet, variables: Mapping[str, np.ndarray], pair: TapPair
) -> tuple[Statistics, ...]:
    state = model.state_dict()
    found = []
    for rule in _rules(model, pair):
        expected = apply_rules([rule], variables, "float64")[rule.target]
        ours = state[rule.target].to("cpu", torch.float64)
        relative = float((ours - expected).norm() / expected.norm().clamp_min(1e-300))
        found.append(Statistics(rule.target, rule.sources, _summary(ours), _summary(expected), relative))
    return tuple(sorted(found, key=lambda s: -s.relative if s.relative == s.relative else -np.inf))


def _summary(tensor: Tensor) -> tuple[float, float, float, float]:
    deviation = float(tensor.std()) if tensor.numel() > 1 else 0.0
    return float(tensor.min()), float(tensor.max()), float(tensor.mean()), deviation


def _weights_finite(model: EfficientDet, pair: TapPair) -> bool:
    state = model.state_dict()
    return all(bool(state[rule.target].isfinite().all()) for rule in _rules(model, pair))


# --- repairs ------------------------------------------------------------------------------------------


@contextmanager
def _right_weights(model: EfficientDet, variables: Mapping[str, np.ndarray], pair: TapPair) -> Iterator[bool]:
    state = model.state_dict()
    right = _expected(model, variables, pair)
    before = {key: state[key].clone() for key in right}
    with torch.no_grad():
        for key, value in right.items():
            state[key].copy_(value)
    try:
        yield bool(right)
    finally:
        with torch.no_grad():
            for key, value in before.items():
                state[key].copy_(value)


#: Attributes a module may have wrong, and what to call it.
_ATTRIBUTES = {
    "eps": "wrong batch-norm epsilon",
    "act": "wrong activation",
    "has_residual": "residual connection missing or added",
    "method": "fusion weights not normalised as configured",
    "conv_after_downsample": "convolution and pooling in the wrong order",
    "act_last": "activation and convolution in the wrong order",
    "stride": "wrong stride",
    "node": "wrong inputs of a BiFPN node",
}


@contextmanager
def _right_attribute(model: EfficientDet, pair: TapPair, attribute: str) -> Iterator[bool]:
    """Set ``attribute`` of the layer's modules to that of a fresh model. Yields False if none differs."""
    with torch.device("meta"):
        fresh = dict(EfficientDet(model.config).eval().named_modules())
    changed: list[tuple[nn.Module, Any]] = []
    for name, module in _modules(model, pair):
        right, now = getattr(fresh[name], attribute, None), getattr(module, attribute, None)
        same = type(right) is type(now) if isinstance(right, nn.Module) else right == now
        if right is not None and not same:
            changed.append((module, now))
            setattr(module, attribute, right)
    try:
        yield bool(changed)
    finally:
        for module, value in changed:
            setattr(module, attribute, value)


@contextmanager
def _evaluation_mode(
    model: EfficientDet, variables: Mapping[str, np.ndarray], pair: TapPair
) -> Iterator[bool]:
    """Out of training mode, and with the running statistics that training mode has moved set back."""
    with (
        _right_attribute(model, pair, "training") as changed,
        _right_weights(model, variables, pair),
    ):
        yield changed


@contextmanager
def _right_arithmetic(
    model: EfficientDet, pair: TapPair, module_type: type[nn.Module], forward: Callable[..., Tensor]
) -> Iterator[bool]:
    """Replace the forward pass of the layer's modules of one type by the plain one below."""
    with ExitStack() as stack:
        found = False
        for _, module in _modules(model, pair):
            if isinstance(module, module_type):
                found = True
                stack.enter_context(_forward_replaced(module, forward))
        yield found


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = lambda *inputs: forward(module, *inputs)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _padded(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], value: float) -> Tensor:
    padding: list[int] = []
    for axis in (-1, -2):
        total = (-(-x.shape[axis] // stride[axis]) - 1) * stride[axis] + kernel[axis] - x.shape[axis]
        total = max(total, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding, value=value)


def _plain_conv(module: Any, x: Tensor) -> Tensor:
    x = _padded(x, module.kernel_size, module.stride, 0.0)
    return F.conv2d(x, module.weight, module.bias, module.stride, 0, 1, module.groups)


def _plain_batch_norm(module: Any, x: Tensor) -> Tensor:
    shape = (1, -1, 1, 1)
    scale = module.weight / torch.sqrt(module.running_var + module.eps)
    return (x - module.running_mean.reshape(shape)) * scale.reshape(shape) + module.bias.reshape(shape)


def _plain_squeeze_excite(module: Any, x: Tensor) -> Tensor:
    gate = module.expand(module.act(module.reduce(x.mean((2, 3), keepdim=True))))
    return x / (1 + torch.exp(-gate))


def _plain_fuse(module: Any, inputs: list[Tensor]) -> Tensor:
    if module.weights is None:
        return torch.stack(inputs).sum(0)
    weights = module.weights.reshape(len(inputs), 1, -1, 1, 1)
    if module.method.endswith("fastattn"):
        weights = weights.clamp_min(0)
        weights = weights / (weights.sum(0) + bifpn.FASTATTN_EPSILON)
    else:
        weights = weights.softmax(0)
    return (torch.stack(inputs) * weights).sum(0)


def _plain_resample(module: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = x.shape[-2:]
    shrinks = height > size[0]
    if not (shrinks and module.conv_after_downsample):
        x = module.match_width(x)
    if shrinks:
        stride = ((height - 1) // size[0] + 1, (width - 1) // size[1] + 1)
        kernel = (stride[0] + 1, stride[1] + 1)
        x = F.max_pool2d(_padded(x, kernel, stride, -torch.inf), kernel, stride)
        return module.match_width(x) if module.conv_after_downsample else x
    rows = torch.arange(size[0], device=x.device) * height // size[0]
    columns = torch.arange(size[1], device=x.device) * width // size[1]
    return x[:, :, rows][:, :, :, columns]


_ARITHMETIC: dict[type[nn.Module], tuple[str, Callable[..., Tensor]]] = {
    Conv2dSame: ("padding on the wrong side", _plain_conv),
    nn.BatchNorm2d: ("batch-norm arithmetic", _plain_batch_norm),
    SqueezeExcite: ("squeeze-and-excitation arithmetic", _plain_squeeze_excite),
    bifpn.Fuse: ("fusion weights unnormalised", _plain_fuse),
    bifpn.Resample: ("wrong resizing or pooling", _plain_resample),
}


# --- kinds of wrong weights ---------------------------------------------------------------------------


def _kind_of_weights(
    model: EfficientDet,
    variables: Mapping[str, np.ndarray],
    raw_variables: Mapping[str, np.ndarray] | None,
    pair: TapPair,
) -> tuple[str, str]:
    """Compare the layer's tensors with what the classic mistakes would have made."""
    state = model.state_dict()
    wrong = []
    for rule in _rules(model, pair):
        expected = apply_rules([rule], variables, "float64")[rule.target].numpy()
        ours = state[rule.target].cpu().double().numpy()
        if not _close(ours, expected):
            wrong.append((rule, ours, expected))
    for rule, ours, expected in wrong:
        for kind, made in _mistakes(rule, expected, variables, raw_variables, model):
            if made.shape == ours.shape and _close(ours, made):
                return kind, f"{rule.target} is what that makes of {' and '.join(rule.sources)}"
    names = ", ".join(rule.target for rule, _, _ in wrong)
    return "wrong values in the weights", f"{names}: not what the rules make of the variables"


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-5, atol=1e-7))


def _mistakes(
    rule: Rule,
    expected: np.ndarray,
    variables: Mapping[str, np.ndarray],
    raw_variables: Mapping[str, np.ndarray] | None,
    model: EfficientDet,
) -> Iterator[tuple[str, np.ndarray]]:
    """(kind, the tensor it would have given)."""
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
    """The tensor of a neighbour: the same leaf at another level, or another leaf of the same batch norm."""
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
        yield kind, apply_rules([other], variables, "float64")[other.target].numpy()
