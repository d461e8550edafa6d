"""The operations. They look up variables by AutoML name. Tensors are [N, H, W, C], float32 or float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from pytorch_model.config import BN_EPSILON, BN_MOMENTUM

Tensor = Any  # tf.Tensor; TensorFlow ships no types mypy can follow
Tap = Callable[[str, Tensor], Tensor]


def keep(name: str, x: Tensor) -> Tensor:
    """The tap that does nothing."""
    return x


@dataclass(frozen=True)
class Network:
    """What every layer needs: the variables by name, the tap, and in training a place for statistics.

    ``tap(name, x)`` is called at every named point and returns the tensor to continue with: it may record
    ``x`` or replace it. ``updates``: None in evaluation; in training, the mapping into which batch norms put
    their new moving statistics, by variable name.
    """

    variables: Mapping[str, Tensor]
    tap: Tap = keep
    updates: MutableMapping[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.variables[name]


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e⁻ˣ), written out.

    The relative error of TensorFlow 2.21's ``tf.sigmoid`` in float32 on a CPU is up to 4.1e-7 and has a bias
    (mean −1.9e-8). The error of this formula is up to 1.5e-7 without a bias. Over the depth of D4 the bias
    doubles the error.
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
    """``scope/kernel`` [h, w, in, out], and ``scope/bias`` if there is one."""
    x = tf.nn.conv2d(x, net[f"{scope}/kernel"], stride, "SAME")
    bias = f"{scope}/bias"
    return x + net[bias] if bias in net.variables else x


def depthwise_conv(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """``kernel`` [h, w, C, 1]."""
    return tf.nn.depthwise_conv2d(x, kernel, [1, stride, stride, 1], "SAME")


def separable_conv(net: Network, x: Tensor, scope: str) -> Tensor:
    """Depthwise 3×3, pointwise 1×1, and ``scope/bias`` if there is one."""
    x = depthwise_conv(x, net[f"{scope}/depthwise_kernel"])
    x = tf.nn.conv2d(x, net[f"{scope}/pointwise_kernel"], 1, "SAME")
    bias = f"{scope}/bias"
    return x + net[bias] if bias in net.variables else x


def batch_norm(net: Network, x: Tensor, scope: str) -> Tensor:
    """Batch norm, epsilon 1e-3, with the moving statistics, or in training with the batch's statistics."""
    if net.updates is None:
        mean, variance = net[f"{scope}/moving_mean"], net[f"{scope}/moving_variance"]
    else:
        mean, variance = batch_statistics(x)
        update_statistics(net, x, mean, variance, scope)
    scale = net[f"{scope}/gamma"] * tf.math.rsqrt(variance + BN_EPSILON)
    return (x - mean) * scale + net[f"{scope}/beta"]


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, [C] each."""
    mean = tf.reduce_mean(x, [0, 1, 2])
    return mean, tf.reduce_mean(tf.square(x - mean), [0, 1, 2])


def update_statistics(net: Network, x: Tensor, mean: Tensor, variance: Tensor, scope: str) -> None:
    """Put ``0.99 · old + 0.01 · batch`` into ``net.updates``.

    The *unbiased* variance enters the average, as in TensorFlow's fused batch norm and in PyTorch's. AutoML's
    TPU and multi-GPU batch norms (``utils.TpuBatchNormalization``, ``SyncBatchNormalization``) use the biased
    variance instead. The gradients are the same.
    """
    assert net.updates is not None
    count = int(x.shape[0]) * int(x.shape[1]) * int(x.shape[2])
    unbiased = variance * (count / max(count - 1, 1))  # the fused kernel also divides by at least 1
    for name, batch in ((f"{scope}/moving_mean", mean), (f"{scope}/moving_variance", unbiased)):
        net.updates[name] = net[name] * (1 - BN_MOMENTUM) + batch * BN_MOMENTUM


def size_of(x: Tensor) -> tuple[int, int]:
    return int(x.shape[1]), int(x.shape[2])


def max_pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Stride ``(n - 1) // target + 1``, window one larger, SAME padding."""
    strides = [(n - 1) // target + 1 for n, target in zip(size_of(x), size, strict=True)]
    return tf.nn.max_pool2d(x, [stride + 1 for stride in strides], strides, "SAME")


def nearest_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest-neighbour resize: output pixel ``i`` is input pixel ``floor(i · in / out)``.

    This is what ``tf.image.resize`` computes as AutoML calls it. Gathering by index is exact in any float
    type; AutoML's way converts to float32.
    """
    rows, columns = (
        [i * n // target for i in range(target)] for n, target in zip(size_of(x), size, strict=True)
    )
    return tf.gather(tf.gather(x, rows, axis=1), columns, axis=2)
