"""The operations, over variables looked up by AutoML name. Tensors are [N, H, W, C], float32 or float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from pytorch_model.config import BN_EPSILON

Tensor = Any  # tf.Tensor; TensorFlow ships no types mypy can follow
Tap = Callable[[str, Tensor], Tensor]


def keep(name: str, x: Tensor) -> Tensor:
    """The tap that does nothing."""
    return x


@dataclass(frozen=True)
class Network:
    """What every layer needs: the variables by name, and the tap.

    ``tap(name, x)`` is called at every named point and returns what flows on: it may record ``x``
    or replace it.
    """

    variables: Mapping[str, Tensor]
    tap: Tap = keep

    def __getitem__(self, name: str) -> Tensor:
        return self.variables[name]


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e⁻ˣ), spelt out.

    TensorFlow 2.21's ``tf.sigmoid`` in float32 on a CPU is off by up to 4.1e-7 relative and leans one way
    (mean −1.9e-8); this is off by 1.5e-7 and does not. Over the depth of D4 the lean doubles the error.
    """
    return 1 / (1 + tf.exp(-x))


def activation(x: Tensor, act_type: str) -> Tensor:
    """AutoML ``utils.activation_fn``. Raises ``ValueError`` on a name it does not know."""
    if act_type in ("swish", "silu", "swish_native"):
        return x * sigmoid(x)
    if act_type == "relu":
        return tf.nn.relu(x)
    if act_type == "relu6":
        return tf.nn.relu6(x)
    if act_type == "hswish":
        return x * tf.nn.relu6(x + 3) / 6
    if act_type == "mish":
        return x * tf.tanh(tf.math.softplus(x))
    raise ValueError(f"unknown activation {act_type!r}")


def conv(net: Network, x: Tensor, scope: str, stride: int = 1) -> Tensor:
    """``scope/kernel`` [h, w, in, out], and ``scope/bias`` where there is one."""
    x = tf.nn.conv2d(x, net[f"{scope}/kernel"], stride, "SAME")
    bias = f"{scope}/bias"
    return x + net[bias] if bias in net.variables else x


def depthwise_conv(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """``kernel`` [h, w, C, 1]."""
    return tf.nn.depthwise_conv2d(x, kernel, [1, stride, stride, 1], "SAME")


def separable_conv(net: Network, x: Tensor, scope: str) -> Tensor:
    """Depthwise 3×3, pointwise 1×1, and ``scope/bias`` where there is one."""
    x = depthwise_conv(x, net[f"{scope}/depthwise_kernel"])
    x = tf.nn.conv2d(x, net[f"{scope}/pointwise_kernel"], 1, "SAME")
    bias = f"{scope}/bias"
    return x + net[bias] if bias in net.variables else x


def batch_norm(net: Network, x: Tensor, scope: str) -> Tensor:
    """Evaluation-mode batch norm, epsilon 1e-3."""
    scale = net[f"{scope}/gamma"] * tf.math.rsqrt(net[f"{scope}/moving_variance"] + BN_EPSILON)
    return (x - net[f"{scope}/moving_mean"]) * scale + net[f"{scope}/beta"]


def size_of(x: Tensor) -> tuple[int, int]:
    return int(x.shape[1]), int(x.shape[2])


def max_pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Stride ``(n - 1) // target + 1``, window one larger, SAME padding."""
    strides = [(n - 1) // target + 1 for n, target in zip(size_of(x), size, strict=True)]
    return tf.nn.max_pool2d(x, [stride + 1 for stride in strides], strides, "SAME")


def nearest_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """``tf.image.resize`` as AutoML calls it reads input pixel ``floor(i · in / out)``.

    Gathered by index here: exact in any float type, where AutoML goes through float32.
    """
    rows, columns = (
        [i * n // target for i in range(target)] for n, target in zip(size_of(x), size, strict=True)
    )
    return tf.gather(tf.gather(x, rows, axis=1), columns, axis=2)
