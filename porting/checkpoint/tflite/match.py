"""Match a TFLite graph with EfficientDet: by how operators follow one another, never by their numbers.

Every layer must be as AutoML builds it, and at the end every operator must belong to a layer; otherwise
:class:`Mismatch` is raised. There are no batch norms to match: converters fold them into the convolutions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from porting.checkpoint.tflite.around.pixels import find_pixels
from porting.checkpoint.tflite.flow import ACT_TYPES, ADDS, NONE, RELU6, Mismatch, Step
from porting.checkpoint.tflite.graph import Graph
from porting.checkpoint.tflite.heads import HeadMatcher
from porting.checkpoint.tflite.structure import (
    BOX_VALUES,
    BlockMatch,
    Convolution,
    NodeMatch,
    Structure,
)
from porting.errors import ConfigError
from pytorch_model.config import (
    MAX_BACKBONE_LEVEL,
    MODELS,
    BackboneConfig,
    EfficientDetConfig,
    Node,
    Stage,
    model_config,
)

_RESAMPLERS = ("MAX_POOL_2D", "RESIZE_NEAREST_NEIGHBOR")
_DEFAULT_BACKBONES = {
    False: "efficientnet-lite0",
    True: "efficientnet-b0",
}  # whether it has squeeze-and-excitation
_SE_RATIO = 0.25


def match(graph: Graph) -> Structure:
    """The layers of the EfficientDet in ``graph``.

    Raises :class:`Mismatch`, and :class:`~pytorch_model.formats.wire.Malformed` if a constant is damaged.
    """
    try:
        return _Matcher(graph).network()
    except ConfigError as error:
        raise Mismatch(str(error)) from None


@dataclass(frozen=True)
class _Path:
    """How a term of a sum is made from a map: by a 1×1 convolution, resampling and factors, or without."""

    source: int
    resampler: Step | None
    conv: Step | None
    factors: tuple[Step, ...]


class _Matcher(HeadMatcher):
    def network(self) -> Structure:
        image, size = self.image()
        image, pixels = find_pixels(self, image)
        stem = self.stem(image)
        blocks = tuple(self.blocks(stem.output))
        backbone = _backbone_config(stem, blocks)
        ends = [blocks[i].output for i in backbone.reduction_blocks.values()]
        extra_level, extra = self.extra_levels(ends[-1])
        config = EfficientDetConfig(
            name="custom",
            backbone=backbone,
            image_size=size,
            fpn_num_filters=self.flow.shape(extra[0])[3],
            fpn_cell_repeats=1,
            box_class_repeats=0,
            max_level=MAX_BACKBONE_LEVEL + len(extra),
            fpn_weight_method="sum",
            act_type=ACT_TYPES[self.act],
        )
        features = [*ends[config.min_level - 1 :], *extra]
        cells: list[tuple[NodeMatch, ...]] = []
        while not cells or not self.at_heads(features):
            nodes, features = self.cell(features, config, f"cell_{len(cells)}")
            cells.append(nodes)
        class_net, box_net, end = self.heads(features)
        self.check_all_placed()
        config = config.replace(
            fpn_weight_method=_weight_method(cells),
            fpn_cell_repeats=len(cells),
            box_class_repeats=len(box_net.levels[0]) - 1,
            num_classes=class_net.out_filters // (box_net.out_filters // BOX_VALUES),
        )
        return Structure(
            config,
            stem,
            blocks,
            extra_level,
            tuple(cells),
            class_net,
            box_net,
            end.postprocess,
            self.anchors(end, size),
            pixels,
        )

    def image(self) -> tuple[int, tuple[int, int]]:
        """(the tensor of the input image, its height and width)."""
        if len(self.graph.inputs) != 1:
            raise Mismatch(f"it has {len(self.graph.inputs)} inputs, not one image")
        shape = self.flow.shape(self.graph.inputs[0])
        if len(shape) != 4 or shape[0] != 1 or shape[3] != 3 or 0 in shape:
            raise Mismatch(f"its input has the shape {list(shape)}, not [1, height, width, 3]")
        return self.graph.inputs[0], (shape[1], shape[2])

    def stem(self, image: int) -> Convolution:
        step = self.only(image, "CONV_2D", "the stem")
        self.act = step.activation if step.activation in ACT_TYPES else RELU6
        return self.convolution(step, "the stem", 3, 2, self.act)

    # --- backbone ---

    def blocks(self, x: int) -> Iterator[BlockMatch]:
        for index in itertools.count():
            # A convolution that begins a block has an activation; one that resamples for the BiFPN has none.
            begin = [
                step
                for step in self.reading(x, "CONV_2D", "DEPTHWISE_CONV_2D")
                if step.activation == self.act or step.kind == "DEPTHWISE_CONV_2D"
            ]
            if index and not begin:
                return
            if len(begin) != 1:
                raise Mismatch(f"{self.after(x)}, but blocks_{index} should begin there")
            block = self.block(x, begin[0], f"blocks_{index}")
            yield block
            x = block.output

    def block(self, x: int, begin: Step, where: str) -> BlockMatch:
        expand = None
        if begin.kind == "CONV_2D":
            expand = self.convolution(begin, where, activation=self.act)
            if expand.out_filters % expand.in_filters:
                raise Mismatch(f"{where} expands {expand.in_filters} channels to {expand.out_filters}")
            begin = self.only(expand.output, "DEPTHWISE_CONV_2D", where)
        depthwise = self.convolution(begin, where, None, None, self.act)
        se, gated = self.squeeze_and_excite(depthwise.output, where)
        project = self.convolution(self.only(gated, "CONV_2D", where), where)
        output = project.output
        if depthwise.stride == 1 and self.flow.shape(x) == self.flow.shape(output):
            shortcut = self.reading(output, *ADDS)
            if self.flow.consumers[output] != shortcut or [set(s.inputs) for s in shortcut] != [{x, output}]:
                raise Mismatch(f"{where} does not add its input to its output")
            self.place_sum(shortcut[0], self.flow.shape(x), NONE)
            output = shortcut[0].output
        return BlockMatch(expand, depthwise, se, project, output)

    def squeeze_and_excite(self, x: int, where: str) -> tuple[tuple[Convolution, Convolution] | None, int]:
        """(the two convolutions, the gated map); (None, ``x``) for a block without it."""
        means, products = self.reading(x, "MEAN"), self.reading(x, "MUL")
        if not means and not products:
            return None, x
        where = f"{where}/se"
        if len(means) != 1 or len(products) != 1 or len(self.flow.consumers[x]) != 2:
            raise Mismatch(f"{self.after(x)}, but {where} needs MEAN and MUL")
        shape = self.flow.shape(x)
        self.check_shape(means[0], (1, 1, 1, shape[3]))
        squeeze = self.only(means[0].output, "CONV_2D", where)
        first = self.convolution(squeeze, where, activation=self.act)
        second = self.convolution(self.only(first.output, "CONV_2D", where), where)
        gate = self.only(second.output, "LOGISTIC", where)
        if set(products[0].inputs) != {x, gate.output} or products[0].activation != NONE:
            raise Mismatch(f"{products[0].operator} does not gate its map as {where} does")
        self.check_shape(products[0], shape)
        for step in (means[0], gate, products[0]):
            self.place(step)
        return (first, second), products[0].output

    # --- P6 and up ---

    def extra_levels(self, p5: int) -> tuple[Convolution | None, list[int]]:
        """(the convolution of P6, the maps P6 and up)."""
        found: list[tuple[Step | None, Step]] = [(None, step) for step in self.reading(p5, "MAX_POOL_2D")]
        for step in self.reading(p5, "CONV_2D"):
            after = self.flow.consumers[step.output]
            if [s.kind for s in after] == ["MAX_POOL_2D"]:
                found.append((step, after[0]))
        if len(found) != 1:
            raise Mismatch(f"{len(found)} max-pooled maps follow the backbone, not one for P6")
        before, pool = found[0]
        conv = None if before is None else self.convolution(before, "resample_p6")
        maps: list[int] = []
        pools = [pool]
        while pools:
            level = MAX_BACKBONE_LEVEL + 1 + len(maps)
            if len(pools) > 1:
                raise Mismatch(f"P{level - 1} is max-pooled {len(pools)} times")
            self.place_max_pool(pools[0], f"resample_p{level}")
            maps.append(pools[0].output)
            pools = self.reading(maps[-1], "MAX_POOL_2D")
        return conv, maps

    # --- BiFPN ---

    def at_heads(self, features: list[int]) -> bool:
        """Whether the heads come next: they convolve the top level, another cell would add it to a map."""
        return not self.reading(features[-1], *ADDS, "MUL")

    def cell(
        self, features: list[int], config: EfficientDetConfig, where: str
    ) -> tuple[tuple[NodeMatch, ...], list[int]]:
        """(the nodes of the cell, its output maps)."""
        maps = list(features)
        last: dict[int, int] = {}
        nodes = []
        for n, node in enumerate(config.bifpn_nodes):
            size = self.flow.shape(features[node.level - config.min_level])[1:3]
            found = self.node(maps, node, (1, *size, config.fpn_num_filters), f"{where}/fnode{n}")
            nodes.append(found)
            maps.append(found.conv.output)
            last[node.level] = found.conv.output
        return tuple(nodes), [last[level] for level in config.levels]

    def node(self, maps: list[int], node: Node, shape: tuple[int, ...], where: str) -> NodeMatch:
        ids = {tensor: i for i, tensor in enumerate(maps)}
        fitting = []
        for total in self.sums_of(maps[node.inputs[-1]]):
            paths = [self.trace(leaf, ids) for leaf in self.terms(total)[1]]
            if sorted(path.source if path else -1 for path in paths) == sorted(node.inputs):
                fitting.append((total, {path.source: path for path in paths if path}))
        if len(fitting) != 1:
            raise Mismatch(f"{len(fitting) or 'no'} sums fuse the maps that {where} fuses")
        total, path_from = fitting[0]
        resample = {}
        for i, source in enumerate(node.inputs):
            conv = self.place_path(path_from[source], where)
            if conv is not None:
                resample[i] = conv
        for part in self.terms(total)[0]:
            self.place_sum(part, shape, self.act if part is total else NONE)
        depthwise = self.only(total.output, "DEPTHWISE_CONV_2D", where)
        weights = tuple(self.weight(path_from[source], shape[3]) for source in node.inputs)
        return NodeMatch(resample, self.separable(depthwise, where), weights)

    def weight(self, path: _Path, channels: int) -> np.ndarray | None:
        """The product of the factors on ``path``, a number or one per channel; None without a factor."""
        product: np.ndarray | None = None
        for step in path.factors:
            factor = self.flow.factor(step)
            if factor is None or math.prod(factor.shape) not in (1, channels):
                raise Mismatch(f"{step.operator} weights a map neither as a whole nor channel by channel")
            values = factor.values().reshape(-1)
            product = values if product is None else product * values
        return product

    def sums_of(self, tensor: int) -> list[Step]:
        """The complete sums that ``tensor`` is part of, directly or resampled."""
        near = list(self.flow.consumers[tensor])
        totals = {}
        for step in near:  # grows
            if step.kind in _RESAMPLERS or self.flow.factor(step) is not None:
                near += self.flow.consumers[step.output]
            elif step.kind in ADDS:
                while self.is_part(step):
                    step = self.flow.consumers[step.output][0]
                totals[step.output] = step
        return list(totals.values())

    def is_part(self, step: Step) -> bool:
        """Whether the only use of a sum is in another sum: two additions that make one sum of three."""
        after = self.flow.consumers[step.output]
        return step.activation == NONE and len(after) == 1 and after[0].kind in ADDS

    def terms(self, total: Step) -> tuple[list[Step], list[int]]:
        """(the additions of a sum, the tensors it adds)."""
        parts, leaves = [total], []
        for part in parts:  # grows
            for tensor in part.inputs:
                before = self.flow.producers.get(tensor)
                if before is not None and before.kind in ADDS and self.is_part(before):
                    parts.append(before)
                else:
                    leaves.append(tensor)
        return parts, leaves

    def trace(self, leaf: int, ids: dict[int, int]) -> _Path | None:
        """Follow a term of a sum back to the map it is made from, one of ``ids``; None if there is none."""
        tensor, steps, factors = leaf, list[Step](), list[Step]()
        while (step := self.flow.producers.get(tensor)) and self.flow.factor(step) is not None:
            factors.append(step)
            tensor = step.inputs[0]
        for kinds in (_RESAMPLERS, ("CONV_2D",)):
            step = self.flow.producers.get(tensor)
            if tensor not in ids and step is not None and step.kind in kinds:
                steps.append(step)
                tensor = step.inputs[0]
        if tensor not in ids:
            return None
        conv = next((step for step in steps if step.kind == "CONV_2D"), None)
        resampler = next((step for step in steps if step.kind != "CONV_2D"), None)
        return _Path(ids[tensor], resampler, conv, tuple(factors))

    def place_path(self, path: _Path, where: str) -> Convolution | None:
        for step in path.factors:
            self.check_shape(step, self.flow.shape(step.inputs[0]))
            self.place(step)
        conv = None if path.conv is None else self.convolution(path.conv, where)
        if path.resampler is not None and path.resampler.kind == "MAX_POOL_2D":
            self.place_max_pool(path.resampler, where)
        elif path.resampler is not None:
            self.place_resize(path.resampler, where)
        return conv


def _weight_method(cells: list[tuple[NodeMatch, ...]]) -> str:
    """The fusion: a sum, or weights. Fast attention can express any factors with a sum below 1."""
    nodes = [node for cell in cells for node in cell]
    if not any(node.is_weighted for node in nodes):
        return "sum"
    if not all(node.is_weighted for node in nodes):
        raise Mismatch("some of its nodes weight their inputs and others do not")
    per_channel = any(weight.size > 1 for node in nodes for weight in node.weights if weight is not None)
    return "channel_fastattn" if per_channel else "fastattn"


def _backbone_config(stem: Convolution, blocks: tuple[BlockMatch, ...]) -> BackboneConfig:
    """Group the blocks into stages: the same kernel, expansion and width; a stride begins a new stage."""
    squeezed = [block.se[0].out_filters if block.se else 0 for block in blocks]
    stages: list[Stage] = []
    for block in blocks:
        expand = block.expand.out_filters // block.expand.in_filters if block.expand else 1
        size, out = block.depthwise.size, block.project.out_filters
        if stages and block.depthwise.stride == 1:
            stage = stages[-1]
            if (size, expand, out) == (stage.kernel_size, stage.expand_ratio, stage.out_filters):
                stages[-1] = Stage(stage.repeats + 1, size, stage.stride, expand, out)
                continue
        stages.append(Stage(1, size, block.depthwise.stride, expand, out))
    has_se = any(squeezed)
    ratio = _SE_RATIO if has_se else 0.0
    found = BackboneConfig(_DEFAULT_BACKBONES[has_se], stem.out_filters, tuple(stages), ratio)
    if squeezed != [block.se_filters for block in found.blocks]:
        raise Mismatch("its squeeze-and-excitation does not have a quarter of its block's input filters")
    known = (model_config(name).backbone for name in MODELS)
    return next((b for b in known if dataclasses.replace(found, name=b.name) == b), found)
