"""BiFPN (AutoML ``keras/efficientdet_keras.py``, ``keras/fpn_configs.py``). Tensors are [N, H, W, C]."""

from __future__ import annotations

import tensorflow as tf

from pytorch_model.config import EfficientDetConfig, Node
from tf_reference.layers import (
    Network,
    Tensor,
    activation,
    batch_norm,
    conv,
    max_pool_to,
    nearest_resize,
    separable_conv,
    size_of,
)


def resample(
    net: Network, x: Tensor, scope: str, config: EfficientDetConfig, size: tuple[int, int]
) -> Tensor:
    """Change ``x`` to ``config.fpn_num_filters`` channels and to ``size``.

    The 1×1 convolution exists only if the channels differ. Raises ``ValueError`` if one axis would grow and
    the other shrink.
    """

    def match_width(x: Tensor) -> Tensor:
        if x.shape[-1] == config.fpn_num_filters:
            return x
        return batch_norm(net, conv(net, x, f"{scope}/conv2d"), f"{scope}/bn")

    (height, width), (target_height, target_width) = size_of(x), size
    if height > target_height and width > target_width:
        if config.conv_after_downsample:
            x = match_width(max_pool_to(x, size))
        else:
            x = max_pool_to(match_width(x), size)
    elif height <= target_height and width <= target_width:
        x = match_width(x)
        if (height, width) != size:
            x = nearest_resize(x, size)
    else:
        raise ValueError(f"{scope}: cannot resample {height}x{width} to {target_height}x{target_width}")
    return net.tap(scope, x)


def fuse(net: Network, inputs: list[Tensor], scope: str, method: str) -> Tensor:
    """Weighted fusion with ``scope/WSM``, ``WSM_1``, …: scalars, or one value per channel."""
    if method == "sum":
        return net.tap(f"{scope}/fuse", tf.add_n(inputs))
    names = [f"{scope}/WSM" + (f"_{i}" if i else "") for i in range(len(inputs))]
    weights = [net[name] for name in names]
    if method in ("fastattn", "channel_fastattn"):
        weights = [tf.nn.relu(w) for w in weights]
        total = tf.add_n(weights) + 1e-4
        x = tf.add_n([x * w / total for x, w in zip(inputs, weights, strict=True)])
    else:
        normalised = tf.unstack(tf.nn.softmax(tf.stack(weights, -1), axis=-1), axis=-1)
        x = tf.add_n([x * w for x, w in zip(inputs, normalised, strict=True)])
    return net.tap(f"{scope}/fuse", x)


def node(
    net: Network,
    nodes: list[Tensor],
    scope: str,
    config: EfficientDetConfig,
    node: Node,
    size: tuple[int, int],
) -> Tensor:
    """Resample, fuse, activation → separable convolution → batch norm (or the activation last)."""
    inputs = [
        resample(net, nodes[source], f"{scope}/resample_{i}_{source}_{len(nodes)}", config, size)
        for i, source in enumerate(node.inputs)
    ]
    x = fuse(net, inputs, scope, config.fpn_weight_method)
    after = f"{scope}/op_after_combine{len(nodes)}"
    if not config.conv_bn_act_pattern:
        x = activation(x, config.act_type)
    x = batch_norm(net, separable_conv(net, x, f"{after}/conv"), f"{after}/bn")
    if config.conv_bn_act_pattern:
        x = activation(x, config.act_type)
    return net.tap(scope, x)


def cell(net: Network, features: list[Tensor], scope: str, config: EfficientDetConfig) -> list[Tensor]:
    """One top-down and one bottom-up pass. One tensor per level in and out."""
    nodes = list(features)
    sizes = {level: size_of(x) for level, x in zip(config.levels, features, strict=True)}
    output_of_level: dict[int, Tensor] = {}
    for i, node_config in enumerate(config.bifpn_nodes):
        x = node(net, nodes, f"{scope}/fnode{i}", config, node_config, sizes[node_config.level])
        nodes.append(x)
        output_of_level[node_config.level] = x
    return [output_of_level[level] for level in config.levels]
