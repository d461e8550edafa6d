"""Weights to start training from: a whole fresh model, or a fresh class predictor on trained features.

Sources: AutoML ``backbone/efficientnet_model.py`` (``conv_kernel_initializer``) and
``tf2/efficientdet_keras.py``; Keras' ``VarianceScaling``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pytorch_model.bifpn import Fuse
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.heads import PRIOR_LOGIT

_TRUNCATED = 0.87962566103423978  # the deviation of a standard normal that is cut off at ±2

#: Deviation of the kernel of a ``small`` class predictor; RetinaNet's (Lin et al. 2017, section 4.1).
SMALL_DEVIATION = 0.01


def initialise(model: EfficientDet, generator: torch.Generator | None = None) -> None:
    """Draw every weight of ``model`` as AutoML does, in place; ``generator`` is on the model's device.

    Biases are 0, that of the class predictor gives every anchor the score 0.01. Batch norms are reset and
    fusion weights are 1.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                _KERNELS[name.partition(".")[0]](module, generator)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
            elif isinstance(module, Fuse) and module.weights is not None:
                module.weights.fill_(1)
        _predictor_bias(model).fill_(PRIOR_LOGIT)


def fresh_class_predictor(
    model: EfficientDet, how: str = "small", generator: torch.Generator | None = None
) -> None:
    """Draw the class predictor of ``model`` again, in place, for classes that the other weights do not know.

    ``how``: one of :data:`CLASS_PREDICTORS`. ``automl`` is AutoML's: σ = 0.125 at 64 channels. On trained
    features its logits lie far from the bias, and the first losses may be several hundred. ``small``: the
    loss begins near that of the bias alone. Both keep the depthwise kernel, which has no class axis.
    """
    with torch.no_grad():
        CLASS_PREDICTORS[how](model.class_net.predict.pointwise, generator)
        _predictor_bias(model).fill_(PRIOR_LOGIT)


def _predictor_bias(model: EfficientDet) -> Tensor:
    bias = model.class_net.predict.pointwise.bias
    assert bias is not None
    return bias


def fans(conv: nn.Conv2d) -> tuple[int, int]:
    """The numbers (in, out) of connections as Keras counts them.

    A depthwise kernel is [k, k, C, 1] there, so it counts C inputs, although each output has only one.
    """
    area = conv.kernel_size[0] * conv.kernel_size[1]
    return area * conv.in_channels, area * conv.out_channels // conv.groups


def _by_outputs(conv: nn.Conv2d, generator: torch.Generator | None) -> None:
    conv.weight.normal_(0, math.sqrt(2 / fans(conv)[1]), generator=generator)


def _glorot(conv: nn.Conv2d, generator: torch.Generator | None) -> None:
    limit = math.sqrt(6 / sum(fans(conv)))
    conv.weight.uniform_(-limit, limit, generator=generator)


def _by_inputs(conv: nn.Conv2d, generator: torch.Generator | None) -> None:
    deviation = math.sqrt(1 / fans(conv)[0]) / _TRUNCATED
    cut = 2 * deviation
    nn.init.trunc_normal_(conv.weight, 0, deviation, -cut, cut, generator=generator)


def _small(conv: nn.Conv2d, generator: torch.Generator | None) -> None:
    conv.weight.normal_(0, SMALL_DEVIATION, generator=generator)


_Draw = Callable[[nn.Conv2d, "torch.Generator | None"], None]

#: Part of the network → how its kernels are drawn.
_KERNELS: Mapping[str, _Draw] = {
    "backbone": _by_outputs,
    "resample": _glorot,
    "bifpn": _glorot,
    "class_net": _by_inputs,
    "box_net": _by_inputs,
}

#: How a class predictor for other classes begins.
CLASS_PREDICTORS: Mapping[str, _Draw] = {"small": _small, "automl": _by_inputs}
