"""Find the taps in a TensorFlow graph by the variables that each operation reads, not by its name.

Operation names change with TensorFlow's version and with the code that built the graph. But exactly one
convolution reads ``efficientnet-b0/blocks_3/conv2d/kernel``, and from there a tap is one or two steps along
the tensors. Taps that cannot be identified for certain are left out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from porting.errors import EfficientDetError
from porting.rules import taps
from pytorch_model.config import Block, EfficientDetConfig, Node

Tensor = Any  # tf.Tensor and tf.Operation; TensorFlow ships no types mypy can follow
Operation = Any

#: Operations that pass on their first input unchanged.
SAME_VALUE = frozenset({"Identity", "ReadVariableOp", "StopGradient", "PreventGradient", "Enter", "Snapshot"})

_RESHAPED = SAME_VALUE | {"Cast", "Reshape", "ExpandDims"}
_SCALED = frozenset({"Mul", "RealDiv", "Div", "DivNoNan"})
_ADDED = frozenset({"Add", "AddV2", "AddN"})
_FURTHEST = 40  # operations that an activation or a batch norm may consist of


def find_taps(graph: Any, variables: Mapping[str, str], config: EfficientDetConfig) -> dict[str, Tensor]:
    """Tap name → tensor [N, H, W, C], in the order of :func:`porting.rules.taps`, for the taps found.

    ``graph``: a ``tf.Graph`` whose shapes are known. ``variables``: name of the operation that holds a
    variable → AutoML's name of it. Raises :class:`EfficientDetError` unless all outputs of the network are
    found.
    """
    finder = _Finder(graph, variables, config)
    finder.backbone()
    finder.extra_levels()
    for cell in range(config.fpn_cell_repeats):
        for number, node in enumerate(config.bifpn_nodes):
            finder.node(f"fpn_cells/cell_{cell}/fnode{number}", node)
    for kind in ("class", "box"):
        finder.head(kind)
    order = [pair.tap for pair in taps(config)]
    missing = [name for name in order if "_outputs/" in name and name not in finder.found]
    if missing:
        raise EfficientDetError(
            f"the graph does not show {missing[0]} ({len(missing)} of {2 * len(config.levels)} outputs are "
            "missing); it is another model's graph, or use --reference ops"
        )
    return {name: finder.found[name] for name in order if name in finder.found}


class _Finder:
    """``found``: the taps so far. ``uses``: variable → (operation, number of its input) that reads it."""

    def __init__(self, graph: Any, variables: Mapping[str, str], config: EfficientDetConfig) -> None:
        self.config = config
        self.variables = variables
        self.found: dict[str, Tensor] = {}
        self.uses: dict[str, list[tuple[Operation, int]]] = {}
        for operation in graph.get_operations():
            for number, tensor in enumerate(operation.inputs):
                source = _source(tensor)
                name = variables.get(source.op.name)
                if name is not None and operation.type not in _RESHAPED:
                    self.uses.setdefault(name, []).append((operation, number))

    def keep(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """``tensor``, or None for a tap that was not found."""
        if tensor is not None and _rank(tensor) == 4:
            self.found[name] = tensor
            return tensor
        return None

    # --- by variable ---

    def convolution(self, kernel: str) -> Operation | None:
        return _only(op for op, number in self.uses.get(kernel, ()) if number == 1 and "Conv" in op.type)

    def convolved(self, kernel: str) -> Tensor | None:
        """The input of the convolution with ``kernel``, before any padding."""
        operation = self.convolution(kernel)
        if operation is None:
            return None
        tensor = operation.inputs[0]
        return tensor.op.inputs[0] if tensor.op.type in ("Pad", "PadV2") else tensor

    def batch_norm(self, scope: str) -> Tensor | None:
        """The batch norm's output: the first map after its beta, whether it is one operation or several."""
        return _only(
            {
                id(t): t for op, _ in self.uses.get(f"{scope}/beta", ()) if (t := _first_map(op)) is not None
            }.values()
        )

    # --- the parts of the network ---

    def backbone(self) -> None:
        name, blocks = self.config.backbone.name, self.config.backbone.blocks
        inputs = [
            self.convolved(f"{name}/blocks_{i}/{_first_kernel(block)}") for i, block in enumerate(blocks)
        ]
        self.keep(f"{name}/stem", inputs[0])
        for i, block in enumerate(blocks):
            self.block(f"{name}/blocks_{i}", block, inputs[i])

    def block(self, scope: str, block: Block, x: Tensor | None) -> None:
        bn = f"{scope}/tpu_batch_normalization"
        norms = iter((bn, f"{bn}_1", f"{bn}_2"))
        projected = "conv2d"
        if block.expand_ratio != 1:
            self.keep(next(norms), self.convolved(f"{scope}/depthwise_conv2d/depthwise_kernel"))
            projected = "conv2d_1"
        gated = self.convolved(f"{scope}/{projected}/kernel")
        if block.se_filters:
            pooled = self.convolved(f"{scope}/se/conv2d/kernel")
            self.keep(next(norms), pooled.op.inputs[0] if pooled is not None and pooled.op.inputs else None)
            self.keep(f"{scope}/se", gated)
        else:
            self.keep(next(norms), gated)
        out = self.keep(project := next(norms), self.batch_norm(project))
        if out is not None and block.has_residual:
            out = _only(
                consumer.outputs[0]
                for consumer in _consumers(out)
                if consumer.type in _ADDED and x is not None and _has_input(consumer, x)
            )
        self.keep(scope, out)

    def extra_levels(self) -> None:
        last: Tensor | None = self.found.get(
            f"{self.config.backbone.name}/blocks_{len(self.config.backbone.blocks) - 1}"
        )
        for level in self.config.extra_levels:
            scope = f"resample_p{level}"
            matched = self.batch_norm(f"{scope}/bn")
            if matched is not None and self.config.conv_after_downsample:
                last = matched
            else:
                last = _pooled(matched if matched is not None else last)
            last = self.keep(scope, last)

    def node(self, scope: str, node: Node) -> None:
        after = f"{scope}/op_after_combine{node.id}"
        fused = self.sum_before(self.convolved(f"{after}/conv/depthwise_kernel"))
        if fused is not None:
            for number, (source, x) in enumerate(
                zip(node.inputs, self.terms(fused, len(node.inputs)), strict=False)
            ):
                self.keep(f"{scope}/resample_{number}_{source}_{node.id}", x)
            self.keep(f"{scope}/fuse", fused)
        # If a node's activation comes last, nothing distinguishes its last operation from the next ones.
        if not self.config.conv_bn_act_pattern or self.config.act_type == "identity":
            self.keep(scope, self.batch_norm(f"{after}/bn"))

    def sum_before(self, x: Tensor | None) -> Tensor | None:
        """The sum of maps from which ``x``, or the activation that made it, is computed."""
        for operation in [] if x is None else _upstream(x):
            inputs = [_rank(tensor) for tensor in operation.inputs]
            if operation.type in _ADDED and len(inputs) == len(operation.inputs) and set(inputs) == {4}:
                return operation.outputs[0]
            if operation.type == "Sum" and inputs[0] == 5:
                return operation.outputs[0]
        return None

    def terms(self, fused: Tensor, count: int) -> list[Tensor]:
        """The ``count`` maps that a fusion adds, in order, before their weighting; empty if fewer."""
        operation = fused.op
        if operation.type == "Sum":  # over a stack of the inputs, times their weights
            packs = [op for op in _upstream(operation.inputs[0]) if op.type == "Pack"]
            terms = list(packs[0].inputs) if packs else []
        else:
            terms = list(operation.inputs)
            while len(terms) < count and terms[0].op.type in _ADDED:  # added two at a time: (a + b) + c
                terms[:1] = terms[0].op.inputs
        return [self.unweighted(x) for x in terms] if len(terms) == count else []

    def unweighted(self, x: Tensor) -> Tensor:
        """``x`` before its multiplication or division by values computed from fusion weights."""
        while x.op.type in _SCALED:
            maps = [y for y in x.op.inputs if _rank(y) == 4]
            others = [y for y in x.op.inputs if _rank(y) != 4]
            if len(maps) != 1 or not all(self.is_weight(y) for y in others):
                break
            x = maps[0]
        return x

    def is_weight(self, x: Tensor) -> bool:
        behind = _walk(x.op, lambda op: [y.op for y in op.inputs])
        return any("/WSM" in self.variables.get(op.name, "") for op in behind)

    def head(self, kind: str) -> None:
        level_of: dict[str, int] = {}
        for level in self.config.levels:
            for i in range(self.config.box_class_repeats):
                name = f"{kind}_net/{kind}-{i}-bn-{level}"
                x = self.keep(name, self.batch_norm(name))
                if x is not None:
                    level_of[x.op.name] = level
        for operation, _ in self.uses.get(f"{kind}_net/{kind}-predict/bias", ()):
            out = _first_map(operation)
            nearest = (
                None if out is None else next((op for op in _upstream(out) if op.name in level_of), None)
            )
            if nearest is not None:
                self.keep(f"{kind}_outputs/{level_of[nearest.name]}", out)


def _first_kernel(block: Block) -> str:
    return "conv2d/kernel" if block.expand_ratio != 1 else "depthwise_conv2d/depthwise_kernel"


# --- steps along the tensors -------------------------------------------------------------------------


def _rank(tensor: Tensor) -> int | None:
    rank: int | None = tensor.shape.rank
    return rank


def _only(candidates: Iterable[Any]) -> Any | None:
    """The one candidate, or None if there are none or several."""
    found = list(candidates)
    return found[0] if len(found) == 1 else None


def _source(tensor: Tensor) -> Tensor:
    while tensor.op.type in _RESHAPED and tensor.op.inputs:
        tensor = tensor.op.inputs[0]
    return tensor


def _consumers(tensor: Tensor) -> list[Operation]:
    """Operations that read ``tensor``, directly or through operations that only pass it on."""
    found = []
    for consumer in tensor.consumers():
        found += _consumers(consumer.outputs[0]) if consumer.type in SAME_VALUE else [consumer]
    return found


def _has_input(operation: Operation, tensor: Tensor) -> bool:
    def origin(x: Tensor) -> Tensor:
        while x.op.type in SAME_VALUE and x.op.inputs:
            x = x.op.inputs[0]
        return x

    return any(origin(x) is origin(tensor) for x in operation.inputs)


def _walk(start: Operation, onward: Callable[[Operation], Iterable[Operation]]) -> Iterable[Operation]:
    """Breadth first from ``start``, itself included, no further than ``_FURTHEST`` operations."""
    queue, seen = deque([start]), {start.name}
    while queue and len(seen) < _FURTHEST * 4:
        operation = queue.popleft()
        yield operation
        for other in onward(operation):
            if other.name not in seen:
                seen.add(other.name)
                queue.append(other)


def _upstream(tensor: Tensor) -> Iterable[Operation]:
    """Operations from which ``tensor`` is computed, nearest first, along maps only."""
    return _walk(
        tensor.op, lambda op: [x.op for x in op.inputs if (_rank(x) or 0) >= 4 or op.type in ("Mul", "Sum")]
    )


def _first_map(operation: Operation) -> Tensor | None:
    """The first tensor of rank 4 at or after ``operation``."""
    downstream = _walk(operation, lambda op: [user for x in op.outputs for user in x.consumers()])
    return next((op.outputs[0] for op in downstream if op.outputs and _rank(op.outputs[0]) == 4), None)


def _pooled(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return _only(op.outputs[0] for op in _consumers(tensor) if op.type in ("MaxPool", "MaxPoolV2"))
