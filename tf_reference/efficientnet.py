"""The backbone (AutoML ``backbone/efficientnet_model.py``). Tensors are [N, H, W, C]."""

from __future__ import annotations

import tensorflow as tf

from pytorch_model.config import BackboneConfig, Block
from tf_reference.layers import Network, Tensor, activation, batch_norm, conv, depthwise_conv, sigmoid


def block(net: Network, x: Tensor, scope: str, config: Block, act_type: str) -> Tensor:
    """One MBConv block. Convolutions and batch norms are numbered in the order they were built."""
    shortcut = x
    numbers = iter(("", "_1", "_2"))

    def unit(x: Tensor, act: str | None) -> Tensor:
        bn = f"{scope}/tpu_batch_normalization{next(numbers)}"
        x = batch_norm(net, x, bn)
        return net.tap(bn, activation(x, act) if act else x)

    project = "conv2d"
    if config.expand_ratio != 1:
        x = unit(conv(net, x, f"{scope}/conv2d"), act_type)
        project = "conv2d_1"
    kernel = net[f"{scope}/depthwise_conv2d/depthwise_kernel"]
    x = unit(depthwise_conv(x, kernel, config.stride), act_type)
    if config.se_filters:
        gate = tf.reduce_mean(x, [1, 2], keepdims=True)
        gate = activation(conv(net, gate, f"{scope}/se/conv2d"), act_type)
        gate = conv(net, gate, f"{scope}/se/conv2d_1")
        x = net.tap(f"{scope}/se", x * sigmoid(gate))
    x = unit(conv(net, x, f"{scope}/{project}"), None)
    if config.has_residual:
        x = x + shortcut
    return net.tap(scope, x)


def efficientnet(net: Network, images: Tensor, config: BackboneConfig, act_type: str) -> dict[int, Tensor]:
    """Images [N, H, W, 3] → level 1…5 → the output of the block that ``config`` names for it."""
    scope = config.name
    x = batch_norm(
        net, conv(net, images, f"{scope}/stem/conv2d", stride=2), f"{scope}/stem/tpu_batch_normalization"
    )
    x = net.tap(f"{scope}/stem", activation(x, act_type))
    endpoints: dict[int, Tensor] = {}
    levels = {index: level for level, index in config.reduction_blocks.items()}
    for index, block_config in enumerate(config.blocks):
        x = block(net, x, f"{scope}/blocks_{index}", block_config, act_type)
        if index in levels:
            endpoints[levels[index]] = x
    return endpoints
