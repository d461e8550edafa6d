"""For exports of a program, not only of weights: the network, example images, a comparison of outputs."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from porting.errors import CheckFailedError
from porting.export import Weights
from porting.parity.measure import difference
from porting.synthetic import synthetic_image
from pytorch_model.anchors import generate_anchors
from pytorch_model.config import EfficientDetConfig
from pytorch_model.detection.postprocess import postprocess_per_class
from pytorch_model.detection.preprocess import normalise_array
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.efficientdet import EfficientDet

ROUNDING = 10  # an exported float32 program may be off by this many times PyTorch's own float32 error
FLOAT32_EPSILON = 1e-6  # and by this, because PyTorch may happen to be exact
EXAMPLES = 2  # images with which a program is traced; more than one, so that the batch stays free
COUNTS = (1, 3)  # numbers of images on which a program is compared


class Postprocessing(nn.Module):
    """AutoML's postprocessing: head outputs, then image scales → boxes, scores, classes, valid_len.

    The outputs are those of every level, classes first; ``image_scales``: float32 [N] or [N, 2]. See
    :func:`postprocess_per_class`.
    """

    def __init__(self, config: EfficientDetConfig, nms: NMSConfig) -> None:
        super().__init__()
        self.levels = len(config.levels)
        self.nms = nms
        self.anchors_yxyx: Tensor
        self.register_buffer("anchors_yxyx", generate_anchors(config, config.image_size), persistent=False)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        *outputs, image_scales = tensors
        class_outputs, box_outputs = outputs[: self.levels], outputs[self.levels :]
        anchors_yxyx = self.anchors_yxyx
        return tuple(postprocess_per_class(class_outputs, box_outputs, anchors_yxyx, self.nms, image_scales))


def loaded(weights: Weights) -> EfficientDet:
    """The float32 network with ``weights``, in evaluation mode."""
    state_dict = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in weights.tensors.items()
    }
    network = EfficientDet.from_state_dict(state_dict, weights.config, "the weights")
    return network.requires_grad_(False)


def example_images(config: EfficientDetConfig, count: int = EXAMPLES) -> Tensor:
    """Seeded, normalised images of the configuration's input size. float32 [count, 3, H, W]."""
    images = np.stack([synthetic_image(*config.input_size, seed=seed) for seed in range(count)])
    return torch.from_numpy(normalise_array(images, config)).permute(0, 3, 1, 2).contiguous()


def head_names(config: EfficientDetConfig) -> list[str]:
    """``class_p3``…, ``box_p3``…, in the order of the network's outputs."""
    return [f"{head}_p{level}" for head in ("class", "box") for level in config.levels]


def compare_outputs(network: EfficientDet, run: Callable[[Tensor], Sequence[Tensor]]) -> float:
    """The largest relative L2 between the exported program ``run`` and the float32 ``network``.

    ``run`` takes images and returns the class and box outputs of every level; it is tried on each of
    :data:`COUNTS` images. Raises :class:`CheckFailedError` if an output differs by more than rounding
    explains.
    """
    worst = 0.0
    double_network = copy.deepcopy(network).double()
    for count in COUNTS:
        images = example_images(network.config, count)
        outputs = (head_outputs(network, images), head_outputs(double_network, images.double()), run(images))
        for name, single, double, found in zip(head_names(network.config), *outputs, strict=True):
            error, own = relative_l2(found, double), relative_l2(single, double)
            require_rounding(f"{name} is off by {error:.1e} (relative L2)", error, own)
            worst = max(worst, relative_l2(found, single))
    return worst


def require_rounding(finding: str, error: float, own: float) -> None:
    """Raise :class:`CheckFailedError` with ``finding`` if ``error`` is more than rounding explains.

    ``own`` is the error of PyTorch's float32 at the same place; both are errors to float64. A program sums in
    a different order, and how much that matters depends on the weights. A wrong layer is off by percents.
    """
    if not error <= ROUNDING * own + FLOAT32_EPSILON < math.inf:
        raise CheckFailedError(
            f"the exported program's {finding}, PyTorch's float32 by {own:.1e}; nothing was written, try "
            "another version of torch or onnx"
        )


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return difference(found.numpy(), expected.numpy()).relative


def head_outputs(network: EfficientDet, images: Tensor) -> list[Tensor]:
    """Every level's class outputs, then its box outputs."""
    with torch.no_grad():
        class_outputs, box_outputs = network(images)
    return class_outputs + box_outputs


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the exporters' warnings about themselves, which mean nothing to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
