"""The parts of an EfficientDet-Lite, as found in a TFLite graph."""

from __future__ import annotations

from dataclasses import dataclass

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
    """One MBConv block; ``output`` is the tensor that it writes."""

    expand: Convolution | None
    depthwise: Convolution
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
    """A node of a BiFPN cell. ``resample``: number of an input → its 1×1 convolution, if it has one."""

    resample: dict[int, Convolution]
    conv: Separable


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


@dataclass(frozen=True)
class Structure:
    """The whole network. ``config`` has defaults for normalisation and anchors, which a graph may lack.

    ``postprocess``: the operator that turns predictions into detections; ``anchors``: its constant, [A, 4] of
    centre y, centre x, height, width, as fractions of the image. Both are None if the graph ends with the
    heads.
    """

    config: EfficientDetConfig
    stem: Convolution
    blocks: tuple[BlockMatch, ...]
    extra_level: Convolution | None
    cells: tuple[tuple[NodeMatch, ...], ...]
    class_net: Head
    box_net: Head
    postprocess: Operator | None
    anchors: Tensor | None

    @property
    def num_anchors(self) -> int:
        """Anchors per location."""
        return self.box_net.out_filters // BOX_VALUES
