"""What the exports of a program, not only of weights, start from: the network, an example, a comparison."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from porting.errors import CheckFailedError
from porting.export import Weights
from porting.synthetic import synthetic_image
from pytorch_model.anchors import generate_anchors
from pytorch_model.config import EfficientDetConfig
from pytorch_model.detection.postprocess import postprocess_per_class
from pytorch_model.detection.preprocess import normalise_array
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.efficientdet import EfficientDet

#: How many times PyTorch's own float32 rounding a float32 program may be off.
ROUNDING = 10
FLOAT32_EPSILON = 1e-6  # where PyTorch happens to be exact
EXAMPLES = 2  # images in the batch a program is traced with; more than one, so that the batch stays free


class DetectingNetwork(nn.Module):
    """The network and AutoML's postprocessing: images and scales → boxes, scores, labels.

    ``images``: float32 [N, 3, H, W], normalised, H and W the configuration's. ``image_scales``: float32 [N],
    original pixels per network pixel. Returns boxes_yxyx float32 [N, M, 4] in original pixels, scores float32
    [N, M], classes int64 [N, M] from 1, valid_len int64 [N].
    """

    def __init__(self, network: EfficientDet, nms: NMSConfig) -> None:
        super().__init__()
        self.network = network
        self.nms = nms
        self.anchors_yxyx: Tensor
        anchors_yxyx = generate_anchors(network.config, network.config.image_size)
        self.register_buffer("anchors_yxyx", anchors_yxyx, persistent=False)

    def forward(self, images: Tensor, image_scales: Tensor) -> tuple[Tensor, ...]:
        class_outputs, box_outputs = self.network(images)
        return tuple(
            postprocess_per_class(class_outputs, box_outputs, self.anchors_yxyx, self.nms, image_scales)
        )


def loaded(weights: Weights) -> EfficientDet:
    """The float32 network with ``weights``, ready to evaluate."""
    state_dict = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in weights.state_dict.items()
    }
    return EfficientDet.from_state_dict(state_dict, weights.config).requires_grad_(False)


def example_images(config: EfficientDetConfig, count: int = EXAMPLES) -> Tensor:
    """Drawn pictures, normalised. float32 [count, 3, H, W]."""
    pictures = np.stack([synthetic_image(*config.image_size, seed=seed) for seed in range(count)])
    return torch.from_numpy(normalise_array(pictures, config)).permute(0, 3, 1, 2).contiguous()


def head_names(config: EfficientDetConfig) -> list[str]:
    """``class_p3``…, ``box_p3``…, in the order of the network's outputs."""
    return [f"{head}_p{level}" for head in ("class", "box") for level in config.levels]


class Comparison:
    """What ``network`` computes for ``images``, in float64 and float32, to hold a program against."""

    def __init__(self, network: EfficientDet, images: Tensor) -> None:
        self.names = head_names(network.config)
        self._single = _outputs(network, images)
        self._double = _outputs(copy.deepcopy(network).double(), images.double())

    def check(self, found: Sequence[Tensor]) -> float:
        """The largest relative L2 of ``found`` to the float32 network. Raises CheckFailedError if too large.

        Allowed at each output: :data:`ROUNDING` times what float32 itself is off there. A program sums in
        another order, and how much that matters depends on the weights; a wrong layer is off by percents.
        """
        worst = 0.0
        for name, single, double, theirs in zip(self.names, self._single, self._double, found, strict=True):
            error, own = relative_l2(theirs, double), relative_l2(single, double)
            if not error <= ROUNDING * own + FLOAT32_EPSILON:
                raise CheckFailedError(
                    f"the exported program's {name} is off by {error:.1e} (relative L2), PyTorch's float32 "
                    f"by {own:.1e}; nothing was written, try another version of torch or onnx"
                )
            worst = max(worst, relative_l2(theirs, single))
        return worst


def relative_l2(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    norm = torch.linalg.vector_norm
    return float(norm(found.double() - expected) / norm(expected))


def _outputs(network: EfficientDet, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        class_outputs, box_outputs = network(images)
    return class_outputs + box_outputs


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters' remarks about themselves say nothing to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
