"""Repairs: each corrects one thing in one layer while it lasts, and yields whether anything changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from porting.parity.diagnosis.layer import expected_tensors, modules_of
from porting.rules import TapPair
from pytorch_model import bifpn
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.efficientnet import SqueezeExcite
from pytorch_model.layers import Conv2dSame


@contextmanager
def right_weights(model: EfficientDet, variables: Mapping[str, np.ndarray], pair: TapPair) -> Iterator[bool]:
    """The layer's tensors as the rules make them."""
    state = model.state_dict()
    right = expected_tensors(model, variables, pair)
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


#: Attribute that may be wrong in a module → the kind of fault.
ATTRIBUTES = {
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
def right_attribute(model: EfficientDet, pair: TapPair, attribute: str) -> Iterator[bool]:
    """``attribute`` of the layer's modules as a new model has it."""
    with torch.device("meta"):
        fresh = dict(EfficientDet(model.config).eval().named_modules())
    changed: list[tuple[nn.Module, Any]] = []
    for name, module in modules_of(model, pair):
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
def evaluation_mode(
    model: EfficientDet, variables: Mapping[str, np.ndarray], pair: TapPair
) -> Iterator[bool]:
    """Evaluation mode, with the running statistics that training mode has changed set back."""
    with (
        right_attribute(model, pair, "training") as changed,
        right_weights(model, variables, pair),
    ):
        yield changed


@contextmanager
def right_arithmetic(
    model: EfficientDet, pair: TapPair, module_type: type[nn.Module], forward: Callable[..., Tensor]
) -> Iterator[bool]:
    """The plain ``forward`` pass, one of those below, in the layer's modules of one type."""
    with ExitStack() as stack:
        found = False
        for _, module in modules_of(model, pair):
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


#: Type of module → (the kind of fault, the right forward pass).
ARITHMETIC: dict[type[nn.Module], tuple[str, Callable[..., Tensor]]] = {
    Conv2dSame: ("padding on the wrong side", _plain_conv),
    nn.BatchNorm2d: ("batch-norm arithmetic", _plain_batch_norm),
    SqueezeExcite: ("squeeze-and-excitation arithmetic", _plain_squeeze_excite),
    bifpn.Fuse: ("fusion weights unnormalised", _plain_fuse),
    bifpn.Resample: ("wrong resizing or pooling", _plain_resample),
}
