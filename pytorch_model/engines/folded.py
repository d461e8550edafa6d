"""The folded network in PyTorch: channels last, and a large batch in chunks that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines.choose import Network
from pytorch_model.engines.inference import Feature, network
from pytorch_model.engines.weights import FoldedWeights
from pytorch_model.layers import activation, max_pool_to, nearest_resize, same_padding

Value = Feature[Tensor]

#: Images that a CPU computes at once: the activations of more do not fit into its caches.
CHUNK = 1

_IN_PLACE: Mapping[str, Callable[..., Tensor]] = {
    "swish": F.silu,
    "swish_native": F.silu,
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "hswish": F.hardswish,
    "mish": F.mish,
}


class TorchOps(nn.Module):
    """Computes each operation when it is called. Folded weights are made once and kept as buffers."""

    def __init__(self, weights: FoldedWeights) -> None:
        super().__init__()
        self._weights: FoldedWeights | None = weights

    def conv(
        self,
        x: Value,
        conv: str,
        bn: str | None = None,
        *,
        filters: int,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        act: str | None = None,
    ) -> Value:
        key = (bn or conv).replace(".", "_")
        if self._weights is not None and key not in self._buffers:
            self._keep(key, *self._weights.conv(conv, bn))
        (top, bottom), (left, right) = (same_padding(side, kernel, stride) for side in x.size)
        value, padding = x.value, (top, left)
        if (top, left) != (bottom, right):
            value, padding = F.pad(value, (left, right, top, bottom)), (0, 0)
        weight, bias = self._buffers[key], self._buffers[f"{key}_bias"]
        assert weight is not None
        value = F.conv2d(value, weight, bias, stride, padding, 1, filters if depthwise else 1)
        size = (-(-x.size[0] // stride), -(-x.size[1] // stride))
        return Feature(_activated_in_place(value, act) if act else value, filters, size)

    def act(self, x: Value, act: str) -> Value:
        return Feature(activation(act)(x.value), x.channels, x.size)

    def gate(self, x: Value, se: str, filters: int, act: str) -> Value:
        mean = Feature(x.value.mean(dim=(2, 3), keepdim=True), x.channels, (1, 1))
        inner = self.conv(mean, f"{se}.reduce", filters=filters, act=act)
        gate = self.conv(inner, f"{se}.expand", filters=x.channels).value.sigmoid_()
        return Feature(x.value.mul_(gate), x.channels, x.size)

    def add(self, x: Value, y: Value) -> Value:
        return Feature(x.value.add_(y.value), x.channels, x.size)

    def fuse(self, inputs: list[Value], weights: str | None) -> Value:
        first, *others = (x.value for x in inputs)
        if weights is None:
            total = first + others[0]
            for value in others[1:]:
                total += value
            return Feature(total, inputs[0].channels, inputs[0].size)
        key = weights.replace(".", "_")
        if self._weights is not None and key not in self._buffers:
            self.register_buffer(key, self._weights.fusion(weights))
        fusion = self._buffers[key]
        assert fusion is not None
        total = first * fusion[0]
        for value, weight in zip(others, fusion[1:], strict=True):
            total.addcmul_(value, weight)
        return Feature(total, inputs[0].channels, inputs[0].size)

    def max_pool(self, x: Value, size: tuple[int, int]) -> Value:
        return Feature(max_pool_to(x.value, size), x.channels, size)

    def resize(self, x: Value, size: tuple[int, int]) -> Value:
        return Feature(nearest_resize(x.value, size), x.channels, size)

    def seal(self) -> None:
        """No more weights are made: the unfolded ones are let go."""
        self._weights = None

    def _keep(self, key: str, weight: Tensor, bias: Tensor | None) -> None:
        self.register_buffer(key, weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer(f"{key}_bias", bias)


def _activated_in_place(x: Tensor, act: str) -> Tensor:
    return _IN_PLACE[act](x, inplace=True)


class FoldedNetwork(nn.Module):
    """:func:`~pytorch_model.engines.inference.network` in PyTorch, for images of one size."""

    def __init__(self, model: EfficientDet, image_size: tuple[int, int]) -> None:
        super().__init__()
        parameter = next(model.parameters())
        self.config, self.image_size, self.dtype = model.config, image_size, parameter.dtype
        weights = FoldedWeights(model.state_dict(), self.config.fpn_weight_method, self.dtype)
        self.ops = TorchOps(weights)
        with torch.no_grad():  # one pass makes the weights
            self(torch.zeros(1, 3, *image_size, device=parameter.device, dtype=self.dtype))
        self.ops.seal()

    def forward(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        images = images.contiguous(memory_format=torch.channels_last)
        found = network(self.config, self.ops, Feature(images, 3, self.image_size))
        class_outputs, box_outputs = ([x.value for x in features] for features in found)
        return class_outputs, box_outputs


def folded_network(model: EfficientDet, image_size: tuple[int, int]) -> FoldedNetwork:
    """A folded copy of ``model`` on its device and in its dtype."""
    return FoldedNetwork(model, image_size).eval()


def make(model: EfficientDet, image_size: tuple[int, int]) -> Network:
    """The folded copy. On a CPU a batch is run in chunks of :data:`CHUNK` images."""
    folded = folded_network(model, image_size)
    on_cpu = next(model.parameters()).device.type == "cpu"

    @torch.no_grad()
    def run(images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        images = images.to(folded.dtype)
        if not on_cpu or len(images) <= CHUNK:
            return folded(images)
        found = [folded(chunk) for chunk in torch.split(images, CHUNK)]
        class_outputs, box_outputs = (
            [torch.cat(level) for level in zip(*outputs, strict=True)] for outputs in zip(*found, strict=True)
        )
        return class_outputs, box_outputs

    return run
