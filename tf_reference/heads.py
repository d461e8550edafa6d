"""Class net and box net (AutoML ``keras/efficientdet_keras.py``). Tensors are [N, H, W, C]."""

from __future__ import annotations

from pytorch_model.config import EfficientDetConfig
from tf_reference.layers import Network, Tensor, activation, batch_norm, separable_conv


def head(net: Network, features: list[Tensor], kind: str, config: EfficientDetConfig) -> list[Tensor]:
    """``kind`` is ``class`` or ``box``. One prediction [N, H_l, W_l, outputs] per level."""
    outputs = []
    for level, x in zip(config.levels, features, strict=True):
        for i in range(config.box_class_repeats):
            shortcut = x
            scope = f"{kind}_net/{kind}-{i}"
            bn = f"{scope}-bn-{level}"
            x = net.tap(bn, batch_norm(net, separable_conv(net, x, scope), bn))
            x = activation(x, config.act_type)
            if i > 0 and config.survival_prob:
                x = x + shortcut
        x = separable_conv(net, x, f"{kind}_net/{kind}-predict")
        outputs.append(net.tap(f"{kind}_outputs/{level}", x))
    return outputs
