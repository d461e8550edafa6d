"""Match a TFLite graph with EfficientDet-Lite: by how operators follow one another, never by their numbers.

Every layer must be as AutoML builds it, and at the end every operator must belong to a layer; otherwise
:class:`Mismatch` is raised. There are no batch norms to match: converters fold them into the convolutions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from porting.checkpoint.tflite.flow import ADDS, NONE, POSTPROCESS, RELU6, Mismatch, Step
from porting.checkpoint.tflite.graph import Graph, Operator, Tensor
from porting.checkpoint.tflite.layers import LayerMatcher
from porting.checkpoint.tflite.structure import (
    BOX_VALUES,
    BlockMatch,
    Convolution,
    Head,
    NodeMatch,
    Separable,
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
_RELEASED_ANCHORS = 9  # per location, in every model AutoML released
_DEFAULT_BACKBONE = "efficientnet-lite0"


def match(graph: Graph) -> Structure:
    """The layers of the EfficientDet-Lite in ``graph``.

    Raises :class:`Mismatch`, and :class:`~porting.checkpoint.wire.Malformed` if a constant is damaged.
    """
    try:
        return _Matcher(graph).network()
    except ConfigError as error:
        raise Mismatch(str(error)) from None


@dataclass(frozen=True)
class _Path:
    """How a term of a sum is made from a map: by resampling, a 1×1 convolution, both or neither."""

    source: int
    resampler: Step | None
    conv: Step | None


@dataclass
class _End:
    """What follows a head.

    ``values``: the number of values per prediction. ``is_joined``: the levels are concatenated. ``is_score``:
    a sigmoid is applied. ``position``: the input of ``postprocess`` that reads it, −1 without one.
    """

    values: int | None = None
    is_joined: bool = False
    is_score: bool = False
    postprocess: Operator | None = None
    position: int = -1


class _Matcher(LayerMatcher):
    def network(self) -> Structure:
        image, size = self.image()
        stem = self.convolution(self.only(image, "CONV_2D", "the stem"), "the stem", 3, 2, RELU6)
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
            act_type="relu6",
        )
        features = [*ends[config.min_level - 1 :], *extra]
        cells: list[tuple[NodeMatch, ...]] = []
        while not cells or not self.at_heads(features):
            nodes, features = self.cell(features, config, f"cell_{len(cells)}")
            cells.append(nodes)
        class_net, box_net, postprocess = self.heads(features)
        self.check_all_placed()
        config = config.replace(
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
            postprocess,
            self.anchors(postprocess) if postprocess else None,
        )

    def image(self) -> tuple[int, tuple[int, int]]:
        """(the tensor of the input image, its height and width)."""
        if len(self.graph.inputs) != 1:
            raise Mismatch(f"it has {len(self.graph.inputs)} inputs, not one image")
        shape = self.flow.shape(self.graph.inputs[0])
        if len(shape) != 4 or shape[0] != 1 or shape[3] != 3 or 0 in shape:
            raise Mismatch(f"its input has the shape {list(shape)}, not [1, height, width, 3]")
        return self.graph.inputs[0], (shape[1], shape[2])

    # --- backbone ---

    def blocks(self, x: int) -> Iterator[BlockMatch]:
        for index in itertools.count():
            # A convolution that begins a block has an activation; one that resamples for the BiFPN has none.
            begin = [
                step
                for step in self.reading(x, "CONV_2D", "DEPTHWISE_CONV_2D")
                if step.activation == RELU6 or step.kind == "DEPTHWISE_CONV_2D"
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
            expand = self.convolution(begin, where, activation=RELU6)
            if expand.out_filters % expand.in_filters:
                raise Mismatch(f"{where} expands {expand.in_filters} channels to {expand.out_filters}")
            begin = self.only(expand.output, "DEPTHWISE_CONV_2D", where)
        depthwise = self.convolution(begin, where, None, None, RELU6)
        project = self.convolution(self.only(depthwise.output, "CONV_2D", where), where)
        output = project.output
        if depthwise.stride == 1 and self.flow.shape(x) == self.flow.shape(output):
            shortcut = self.reading(output, *ADDS)
            if self.flow.consumers[output] != shortcut or [set(s.inputs) for s in shortcut] != [{x, output}]:
                raise Mismatch(f"{where} does not add its input to its output")
            self.place_sum(shortcut[0], self.flow.shape(x), NONE)
            output = shortcut[0].output
        return BlockMatch(expand, depthwise, project, output)

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
        return not self.reading(features[-1], *ADDS)

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
            self.place_sum(part, shape, RELU6 if part is total else NONE)
        depthwise = self.only(total.output, "DEPTHWISE_CONV_2D", where)
        return NodeMatch(resample, self.separable(depthwise, where))

    def sums_of(self, tensor: int) -> list[Step]:
        """The complete sums that ``tensor`` is part of, directly or resampled."""
        near = self.flow.consumers[tensor]
        far = [s for step in near if step.kind in _RESAMPLERS for s in self.flow.consumers[step.output]]
        totals = {}
        for step in (*near, *far):
            if step.kind in ADDS:
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
        tensor, steps = leaf, []
        for kinds in (_RESAMPLERS, ("CONV_2D",)):
            step = self.flow.producers.get(tensor)
            if tensor not in ids and step is not None and step.kind in kinds:
                steps.append(step)
                tensor = step.inputs[0]
        if tensor not in ids:
            return None
        conv = next((step for step in steps if step.kind == "CONV_2D"), None)
        resampler = next((step for step in steps if step.kind != "CONV_2D"), None)
        return _Path(ids[tensor], resampler, conv)

    def place_path(self, path: _Path, where: str) -> Convolution | None:
        conv = None if path.conv is None else self.convolution(path.conv, where)
        if path.resampler is not None and path.resampler.kind == "MAX_POOL_2D":
            self.place_max_pool(path.resampler, where)
        elif path.resampler is not None:
            self.place_resize(path.resampler, where)
        return conv

    # --- heads ---

    def heads(self, features: list[int]) -> tuple[Head, Head, Operator | None]:
        """(class net, box net, the postprocessing operator)."""
        chains: dict[str, list[tuple[Separable, ...]]] = {"class": [], "box": []}
        ends: dict[str, list[_End]] = {"class": [], "box": []}
        for level, x in enumerate(features):
            begins = self.reading(x, "DEPTHWISE_CONV_2D")
            if len(begins) != 2:
                raise Mismatch(f"{len(begins)} heads, not two, read level {level} of the last cell")
            pair = [self.head(begin, f"the head at level {level}") for begin in begins]
            pair_ends = [self.end(chain[-1].output, level, len(features)) for chain in pair]
            for kind, chain, end in zip(_kinds_of(pair, pair_ends), pair, pair_ends, strict=True):
                chains[kind].append(chain)
                ends[kind].append(end)
        class_net, box_net = (_head(kind, chains[kind], ends[kind]) for kind in ("class", "box"))
        _check_predictions(class_net, box_net)
        return class_net, box_net, ends["box"][0].postprocess

    def head(self, begin: Step, where: str) -> tuple[Separable, ...]:
        """One head at one level: separable convolutions with ReLU6, then one without it."""
        layers = [self.separable(begin, where, None)]
        while layers[-1].pointwise.step.activation == RELU6:
            begin = self.only(layers[-1].output, "DEPTHWISE_CONV_2D", where)
            layers.append(self.separable(begin, where, None))
        return tuple(layers)

    def end(self, x: int, level: int, levels: int) -> _End:
        """Follow the output ``x`` of a head: it is flattened, joined with other levels, made a score."""
        end = _End()
        size = math.prod(self.flow.shape(x))
        while self.flow.consumers[x] and end.postprocess is None:
            if len(self.flow.consumers[x]) > 1:
                raise Mismatch(f"{self.after(x)} after a head")
            step = self.flow.consumers[x][0]
            shape = self.flow.shape(step.output)
            if step.kind == "RESHAPE" and end.values is None and len(shape) == 3:
                end.values = shape[2]
                fits = shape[0] == 1 and math.prod(shape) == size
            elif step.kind == "CONCATENATION" and end.values and not end.is_joined:
                end.is_joined = True
                fits = len(step.inputs) == levels and step.inputs[level] == x
                fits &= step.operator.option(0, "i") in (1, -2) and step.activation == NONE
            elif step.kind == "LOGISTIC" and not end.is_score:
                end.is_score = fits = True
            else:
                end.postprocess, end.position = step.operator, step.inputs.index(x)
                fits = step.kind == POSTPROCESS and end.is_joined
            if not fits:
                raise Mismatch(f"{step.operator} does not list a head's predictions as AutoML does")
            self.place(step)
            x = step.output
        return end

    def anchors(self, postprocess: Operator) -> Tensor:
        found = self.flow.constants.get((*postprocess.inputs, -1, -1, -1)[2])
        if found is None:
            raise Mismatch(f"{postprocess} has no constant list of anchors")
        return found


def _backbone_config(stem: Convolution, blocks: tuple[BlockMatch, ...]) -> BackboneConfig:
    """Group the blocks into stages: the same kernel, expansion and width; a stride begins a new stage."""
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
    found = BackboneConfig(_DEFAULT_BACKBONE, stem.out_filters, tuple(stages), se_ratio=0.0)
    known = (model_config(name).backbone for name in MODELS)
    return next((b for b in known if dataclasses.replace(found, name=b.name) == b), found)


def _kinds_of(pair: list[tuple[Separable, ...]], ends: list[_End]) -> tuple[str, str]:
    """("class", "box") or the reverse, for the two heads of a level.

    The class net has scores. Without them, the box net is the one whose width fits the 9 released anchors.
    """
    scores = [end.is_score for end in ends]
    if scores == [False, False]:
        widths = [chain[-1].pointwise.out_filters for chain in pair]
        scores = [width != BOX_VALUES * _RELEASED_ANCHORS for width in widths]
    if scores == [True, False]:
        return "class", "box"
    if scores == [False, True]:
        return "box", "class"
    raise Mismatch("its class net and its box net cannot be distinguished")


def _head(kind: str, chains: list[tuple[Separable, ...]], ends: list[_End]) -> Head:
    if len({(len(chain), chain[-1].pointwise.out_filters) for chain in chains}) != 1:
        raise Mismatch(f"its {kind} net differs from level to level")
    if any(end != ends[0] for end in ends):
        raise Mismatch(f"its {kind} net's outputs are treated differently from level to level")
    if ends[0].postprocess is not None and ends[0].position != ("box", "class").index(kind):
        raise Mismatch(f"{ends[0].postprocess} does not take boxes, then scores")
    return Head(tuple(chains), ends[0].values)


def _check_predictions(class_net: Head, box_net: Head) -> None:
    anchors, rest = divmod(box_net.out_filters, BOX_VALUES)
    classes, left = divmod(class_net.out_filters, anchors) if anchors else (0, 1)
    if rest or left or len(class_net.levels[0]) != len(box_net.levels[0]):
        raise Mismatch(
            f"its heads predict {class_net.out_filters} and {box_net.out_filters} values per location, after "
            f"{len(class_net.levels[0])} and {len(box_net.levels[0])} layers"
        )
    if box_net.values not in (None, BOX_VALUES) or class_net.values not in (None, classes):
        raise Mismatch("it does not list its predictions anchor by anchor")
