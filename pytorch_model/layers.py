"""Layers that PyTorch lacks: TensorFlow's SAME padding, AutoML's separable convolution and resizing.

All tensors are float, [N, C, H, W]. Padding is computed from the input size at run time, so one model
works for every image size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytorch_model.config import BN_EPSILON, BN_MOMENTUM

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "swish_native": nn.SiLU,  # AutoML's two swishes differ only in the memory of their gradients
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hswish": nn.Hardswish,
    "mish": nn.Mish,
    "identity": nn.Identity,
}


def activation(act_type: str) -> nn.Module:
    """The activation that AutoML calls ``act_type`` (``utils.activation_fn``)."""
    return _ACTIVATIONS[act_type]()


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding of one axis, (before, after): the odd element goes after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def _pad_same(x: Tensor, kernel: tuple[int, int], stride: tuple[int, int], value: float) -> Tensor:
    top, bottom = same_padding(x.shape[-2], kernel[0], stride[0])
    left, right = same_padding(x.shape[-1], kernel[1], stride[1])
    if top == bottom == left == right == 0:
        return x
    return F.pad(x, (left, right, top, bottom), value=value)


class Conv2dSame(nn.Conv2d):
    """``nn.Conv2d`` with TensorFlow's SAME padding, for any stride and input size."""

    def __init__(
        self,
        in_filters: int,
        out_filters: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        # At stride 1 an odd kernel pads both sides equally. nn.Conv2d can do that itself, and faster.
        self.symmetric = stride == 1 and kernel_size % 2 == 1
        padding = kernel_size // 2 if self.symmetric else 0
        super().__init__(in_filters, out_filters, kernel_size, stride, padding, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if not self.symmetric:
            x = _pad_same(
                x, (self.kernel_size[0], self.kernel_size[1]), (self.stride[0], self.stride[1]), 0.0
            )
        return super().forward(x)


def drop_connect(x: Tensor, survival_prob: float, draws: Tensor) -> Tensor:
    """Stochastic depth: ``x`` without some images, the others scaled up for that. [N, C, H, W] → same.

    ``draws``: float [N], uniform in [0, 1); an image is kept where ``survival_prob + draw`` reaches 1 (AutoML
    ``utils.drop_connect``; Huang et al., Deep Networks with Stochastic Depth, ECCV 2016).
    """
    kept = torch.floor(survival_prob + draws).to(x.dtype)
    return x / survival_prob * kept[:, None, None, None]


def batch_norm(filters: int) -> nn.BatchNorm2d:
    """AutoML's batch norm: epsilon 1e-3, momentum 0.99 (0.01 as PyTorch counts it)."""
    return nn.BatchNorm2d(filters, eps=BN_EPSILON, momentum=BN_MOMENTUM)


class ConvBnAct(nn.Module):
    """Bias-free convolution → batch norm → activation. [N, in, H, W] → [N, out, ⌈H/stride⌉, ⌈W/stride⌉]."""

    def __init__(
        self,
        in_filters: int,
        out_filters: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        act_type: str = "identity",
    ) -> None:
        super().__init__()
        self.conv = Conv2dSame(in_filters, out_filters, kernel_size, stride, groups)
        self.bn = batch_norm(out_filters)
        self.act = activation(act_type)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class SeparableConv(nn.Module):
    """3×3 depthwise, then 1×1 pointwise convolution, which has the bias. [N, in, H, W] → [N, out, H, W]."""

    def __init__(self, in_filters: int, out_filters: int, bias: bool) -> None:
        super().__init__()
        self.depthwise = Conv2dSame(in_filters, in_filters, 3, groups=in_filters)
        self.pointwise = Conv2dSame(in_filters, out_filters, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


def max_pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Max-pool [N, C, H, W] down to ``size`` (height, width) as AutoML's ``ResampleFeatureMap`` does.

    Stride ``(n - 1) // target + 1``, window one larger, SAME padding with −inf.
    """
    stride = ((x.shape[-2] - 1) // size[0] + 1, (x.shape[-1] - 1) // size[1] + 1)
    kernel = (stride[0] + 1, stride[1] + 1)
    return F.max_pool2d(_pad_same(x, kernel, stride, -torch.inf), kernel, stride)


def nearest_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [N, C, H, W] to ``size``: output pixel i reads input pixel ``floor(i · in / out)``."""
    return F.interpolate(x, size=size, mode="nearest")
