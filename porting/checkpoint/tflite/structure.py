"""The parts of an EfficientDet, as found in a TFLite graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from porting.checkpoint.tflite.flow import Step
from porting.checkpoint.tflite.graph import Operator, Tensor
from pytorch_model.config import EfficientDetConfig

BOX_VALUES = 4  # ty, tx, th, tw


@dataclass(frozen=True)
class Convolution:
    """A convolution. ``kernel`` is [out, h, w, in], or [1, h, w, channels] if depthwise; ``bias`` [out]."""

    step: Step
    kernel: Tensor
    bias: Tensor | None
    depthwise: bool
    size: int
    stride: int
    in_filters: int
    out_filters: int

    @property
    def output(self) -> int:
        return self.step.output


@dataclass(frozen=True)
class BlockMatch:
    """One MBConv block. ``se``: its squeeze-and-excitation. ``output``: the tensor that it writes."""

    expand: Convolution | None
    depthwise: Convolution
    se: tuple[Convolution, Convolution] | None
    project: Convolution
    output: int


@dataclass(frozen=True)
class Separable:
    """A separable convolution: the depthwise one and the pointwise one after it."""

    depthwise: Convolution
    pointwise: Convolution

    @property
    def output(self) -> int:
        return self.pointwise.output


@dataclass(frozen=True)
class NodeMatch:
    """A node of a BiFPN cell.

    ``resample``: number of an input → its 1×1 convolution, if it has one. ``weights``: the factor of each
    input as the graph has it, a number or one per channel; None for an input without one.
    """

    resample: dict[int, Convolution]
    conv: Separable
    weights: tuple[np.ndarray | None, ...]

    @property
    def is_weighted(self) -> bool:
        return any(weight is not None for weight in self.weights)


@dataclass(frozen=True)
class Head:
    """The class net or the box net.

    ``levels``: for each level, finest first, the separable convolutions; the last one predicts. ``values``:
    the number of values per prediction (4, or the number of classes); None if the graph does not contain it.
    """

    levels: tuple[tuple[Separable, ...], ...]
    values: int | None

    @property
    def out_filters(self) -> int:
        return self.levels[0][-1].pointwise.out_filters


class Normalisation(NamedTuple):
    """What a graph subtracts from grey levels, and then divides by, for each colour."""

    mean_rgb: tuple[float, float, float]
    stddev_rgb: tuple[float, float, float]


@dataclass(frozen=True)
class Structure:
    """The whole network. ``config`` has defaults for anchors, and for normalisation if ``pixels`` is None.

    ``postprocess``: TFLite's operator that turns predictions into detections, None without it. ``anchors``:
    float64 [A, 4] of centre y, centre x, height, width, as fractions of the image; None if unknown.
    ``pixels``: mean and standard deviation, if the graph begins with an image in grey levels.
    """

    config: EfficientDetConfig
    stem: Convolution
    blocks: tuple[BlockMatch, ...]
    extra_level: Convolution | None
    cells: tuple[tuple[NodeMatch, ...], ...]
    class_net: Head
    box_net: Head
    postprocess: Operator | None
    anchors: np.ndarray | None
    pixels: Normalisation | None

    @property
    def num_anchors(self) -> int:
        """Anchors per location."""
        return self.box_net.out_filters // BOX_VALUES
