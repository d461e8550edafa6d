"""From the folded convolutions of a TFLite file to AutoML's variables, with checks.

A convolution with a folded batch norm becomes the folded kernel and a batch norm that only adds the folded
bias. The heads are different: AutoML shares one kernel over all levels, with a batch norm for each level. So
the file has one folded kernel per level, and each is a multiple of the shared kernel, output channel by
output channel. From them the shared kernel and the scales of the batch norms are computed; damage shows as a
kernel that is not a multiple.

Source: TensorFlow Lite 8-bit quantization specification: weights are symmetric, with one scale per output
channel; the scale of a bias is the product of the scales of input and kernel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from porting.checkpoint.tflite.flow import Mismatch
from porting.checkpoint.tflite.graph import Graph, Tensor
from porting.checkpoint.tflite.structure import Convolution, NodeMatch
from pytorch_model.config import BN_EPSILON
from pytorch_model.formats.wire import Malformed

# Half a step between float weights, as a fraction of the largest weight of the output channel: the rounding
# error of folding a batch norm. float32: two products of 2^-24 each, doubled; float16: one rounding.
_HALF_STEP = {np.dtype("<f4"): 2.0**-22, np.dtype("<f2"): 2.0**-11}
_SMALLEST_HALF_STEP = {np.dtype("<f4"): 2.0**-126, np.dtype("<f2"): 2.0**-25}

_FUSION_EPSILON = 1e-4  # AutoML's, in fast attention
_ROUNDING = 2.0**-22  # of a sum of float32 factors near 1

# TFLite multiplies the scales of input and kernel in float32; a larger difference means damage.
_SCALE_TOLERANCE = 1e-6

# A kernel that all levels share is counted once per level; nothing else in a real file is used twice.
_MOST_REUSE = 16


class Layer(NamedTuple):
    """A convolution of the file with its AutoML names; ``bn`` is a scope. None: AutoML has none.

    ``factor``: what else is folded into the convolution after its batch norm, a number.
    """

    convolution: Convolution
    kernel: str
    bias: str | None
    bn: str | None
    factor: float = 1.0


class Variable(NamedTuple):
    """An AutoML variable. ``read`` gives its value as an array that broadcasts to ``shape``."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def variables(layers: Sequence[Layer]) -> Iterator[Variable]:
    """AutoML's variables of ``layers``. Layers with the same kernel are the levels of a head, finest first.

    Raises :class:`Malformed` if levels that share a kernel or a bias in AutoML do not share it here.
    """
    by_kernel: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers:
        by_kernel[layer.kernel].append(layer)
    for shared in by_kernel.values():
        first = shared[0]
        if first.bn is None:
            yield from _without_bn(shared)
            continue
        if len(shared) == 1:
            yield _kernel_variable(first, partial(_kernel, first.convolution))
            yield from _bn_variables(first, np.ones(()))
        else:
            kernel, scales = shared_kernel(shared)
            yield _kernel_variable(first, partial(_as_automl, kernel))
            for layer, scale in zip(shared, scales, strict=True):
                yield from _bn_variables(layer, scale)
        if first.bias is not None:
            yield _constant(first.bias, first.convolution, np.zeros(()))


def _without_bn(shared: list[Layer]) -> Iterator[Variable]:
    """A kernel that is the same at every level, and its bias if AutoML has one."""
    first = shared[0]
    kernel = first.convolution.kernel
    for layer in shared[1:]:
        other = layer.convolution.kernel
        if other is not kernel and not np.array_equal(other.values(), kernel.values()):
            raise Malformed(f"{first.kernel} is one kernel in AutoML but differs from level to level")
    yield _kernel_variable(first, partial(_kernel, first.convolution))
    if first.bias is not None:
        yield _constant(first.bias, first.convolution, shared_bias(shared))
    elif any(_bias(layer.convolution).any() for layer in shared):
        raise Malformed(f"{first.kernel} has a bias, which a depthwise convolution in AutoML does not have")


def _kernel_variable(layer: Layer, read: Callable[[], np.ndarray]) -> Variable:
    conv = layer.convolution
    out_filters = 1 if conv.depthwise else conv.out_filters
    return Variable(layer.kernel, (conv.size, conv.size, conv.in_filters, out_filters), read)


def _bn_variables(layer: Layer, scale: np.ndarray) -> Iterator[Variable]:
    """A batch norm that computes x · ``scale`` + the convolution's bias, both without the layer's factor."""
    conv = layer.convolution
    yield _constant(f"{layer.bn}/gamma", conv, scale / layer.factor)
    yield Variable(f"{layer.bn}/beta", (conv.out_filters,), lambda: _bias(conv) / layer.factor)
    yield _constant(f"{layer.bn}/moving_mean", conv, np.zeros(()))
    yield _constant(f"{layer.bn}/moving_variance", conv, np.array(1 - BN_EPSILON))


def fusion_weights(node: NodeMatch) -> tuple[list[np.ndarray], dict[int, float]]:
    """Weights w of a node for which fast attention, w / (Σw + 1e-4), gives the factors in the file.

    Returns (float64 [n] of each input, number of an input → its factor). The second are the inputs whose
    factor was folded into their convolution. Its value is free: the convolution's batch norm undoes it.
    Raises :class:`Mismatch` for factors that fast attention cannot give.
    """
    known = [weight for weight in node.weights if weight is not None]
    total = sum(known, np.zeros(()))
    if any((weight < 0).any() for weight in known) or not (total <= 1 + _ROUNDING).all():
        raise Mismatch("the weights of a node are negative or add up to more than 1, which AutoML's do not")
    missing = [i for i, weight in enumerate(node.weights) if weight is None]
    usual = len(node.weights) / (len(node.weights) + _FUSION_EPSILON)  # the sum for weights of 1
    left = max(usual - float(total.max()), float(1 - total.max()) / 2, _ROUNDING)
    free = {i: left / len(missing) for i in missing}
    factors = [np.full(1, free[i]) if weight is None else weight for i, weight in enumerate(node.weights)]
    total = sum(factors, np.zeros(()))
    # factor = w / (Σw + ε), so their sum is Σw / (Σw + ε), and w = factor · ε / (1 - sum)
    scale = _FUSION_EPSILON / np.maximum(1 - total, _ROUNDING)
    return [factor * scale for factor in factors], free


def _constant(name: str, conv: Convolution, value: np.ndarray) -> Variable:
    return Variable(name, (conv.out_filters,), lambda: value)


def _kernel(conv: Convolution) -> np.ndarray:
    return _as_automl(conv.kernel.values())


def _as_automl(kernel: np.ndarray) -> np.ndarray:
    """TFLite's [out, h, w, in] or [1, h, w, channels] → AutoML's [h, w, in, out] or [h, w, channels, 1]."""
    return kernel.transpose(1, 2, 3, 0)


def _bias(conv: Convolution) -> np.ndarray:
    """float64 [out]."""
    return np.zeros(conv.out_filters) if conv.bias is None else conv.bias.values()


# --- kernels and biases shared by the levels of a head ---------------------------------------------------


@np.errstate(all="ignore")
def shared_kernel(layers: Sequence[Layer]) -> tuple[np.ndarray, np.ndarray]:
    """The shared kernel and the factor of each level: float64 ([out, h, w, in], scales [levels, out]).

    Each output channel is taken from the level that stores it with the finest steps. Raises
    :class:`Malformed` if a level's kernel differs from its multiple by more than the rounding of both.
    """
    kernels = np.stack([layer.convolution.kernel.values() for layer in layers])
    levels, channels = kernels.shape[:2]
    flat = kernels.reshape(levels, channels, -1)
    half_steps = np.stack([_half_step(layer.convolution.kernel, channels) for layer in layers])
    largest = np.abs(flat).max(axis=2)
    coarseness = np.where(largest > 0, half_steps / largest, np.inf)
    # Levels that are equally fine up to rounding are equally good; the first is taken, P3 if possible.
    finest = (coarseness <= coarseness.min(axis=0) * (1 + 1e-6)).argmax(axis=0)
    channel = np.arange(channels)
    shared = flat[finest, channel]
    norms = np.square(shared).sum(axis=1)
    scales = np.where(norms > 0, np.einsum("loi,oi->lo", flat, shared) / norms, 1.0)
    allowed = half_steps + np.abs(scales) * half_steps[finest, channel]
    apart = np.abs(flat - scales[..., None] * shared).max(axis=2) / allowed
    wrong = np.argwhere(~(apart <= 1 + 1e-6))  # NaN is wrong too
    if len(wrong):
        level, out = wrong[0]
        raise Malformed(
            f"{layers[0].kernel} is one kernel in AutoML, but output channel {out} of the kernel for "
            f"{layers[level].bn} is not a multiple of the other levels'"
        )
    return shared.reshape(kernels.shape[1:]), scales


def shared_bias(layers: Sequence[Layer]) -> np.ndarray:
    """The bias [out] that every level's is a rounding of, float64: the middle of the range that all allow.

    Raises :class:`Malformed` if the range is empty.
    """
    channels = layers[0].convolution.out_filters
    lower, upper = np.full(channels, -np.inf), np.full(channels, np.inf)
    for layer in layers:
        conv = layer.convolution
        half_step = np.zeros(()) if conv.bias is None else _half_step(conv.bias, channels)
        lower = np.maximum(lower, _bias(conv) - half_step)
        upper = np.minimum(upper, _bias(conv) + half_step)
    if not (lower <= upper).all():
        raise Malformed(f"{layers[0].bias} is one bias in AutoML but differs from level to level")
    return (lower + upper) / 2


def _half_step(tensor: Tensor, channels: int) -> np.ndarray:
    """Half the distance between the values a tensor can hold, float64 [channels] along its channel axis."""
    if tensor.is_quantized:
        return np.broadcast_to(tensor.scale.astype(np.float64) / 2, (channels,))
    dtype = tensor.stored().dtype
    largest = np.abs(tensor.values()).reshape(channels, -1).max(axis=1)
    return np.maximum(largest * _HALF_STEP[dtype], _SMALLEST_HALF_STEP[dtype])


# --- checks ----------------------------------------------------------------------------------------------


def check_layers(layers: Sequence[Layer], graph: Graph, file_size: int) -> None:
    """Check the type, shape and scale of every kernel and bias.

    Raises :class:`Mismatch` or :class:`Malformed`; the latter also if a small file claims many weights.
    """
    used = 0
    for layer in layers:
        conv = layer.convolution
        _check_kernel(conv)
        used += len(conv.kernel.data)
        if conv.bias is not None:
            _check_bias(conv, conv.bias, graph.tensors[conv.step.operator.inputs[0]])
            used += len(conv.bias.data)
    if used > _MOST_REUSE * file_size:
        raise Malformed(f"its convolutions use {used} bytes of weights, {used // file_size} times the file")


def _check_kernel(conv: Convolution) -> None:
    kernel, operator = conv.kernel, conv.step.operator
    if kernel.dtype != np.int8 and kernel.dtype not in _HALF_STEP:
        raise Mismatch(f"the kernel of {operator} is not float32, float16 or int8")
    kernel.stored()
    if kernel.is_quantized != (kernel.dtype == np.int8) or kernel.zero_point.any():
        raise Malformed(f"the kernel of {operator} is not quantised as in TFLite")
    if len(kernel.scale) > 1 and kernel.axis != (3 if conv.depthwise else 0):
        raise Malformed(f"the kernel of {operator} is not quantised along its output channels")


def _check_bias(conv: Convolution, bias: Tensor, x: Tensor) -> None:
    operator = conv.step.operator
    if bias.shape != (conv.out_filters,):
        raise Malformed(f"the bias of {operator} has the shape {list(bias.shape)}, not [{conv.out_filters}]")
    bias.stored()
    if bias.dtype in _HALF_STEP and not bias.is_quantized:
        return
    if bias.dtype not in (np.int32, np.int64) or not bias.is_quantized or bias.zero_point.any():
        raise Malformed(f"the bias of {operator} is neither float nor a quantised int32")
    if len(x.scale) != 1 or not conv.kernel.is_quantized:
        raise Malformed(f"{operator} has a quantised bias without a quantised input and kernel")
    expected = x.scale.astype(np.float64) * conv.kernel.scale
    if not np.allclose(bias.scale, expected, rtol=_SCALE_TOLERANCE, atol=0):
        raise Malformed(f"the scales of input, kernel and bias of {operator} do not agree")
