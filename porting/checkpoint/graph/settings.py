"""What an exported graph states besides its weights: the image, its normalisation, anchors, suppression.

Everything is found by what operations do with constants, never by the names of operations, in the graph and
in its functions. A setting is taken only if all places in the graph agree.

Source: AutoML ``dataloader.py`` (normalisation), ``keras/anchors.py``, ``keras/postprocess.py``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from porting.checkpoint.graph.anchors import anchor_settings
from porting.checkpoint.graph.nodes import GraphNode
from porting.errors import ConfigError
from pytorch_model.config import BOUNDS, model_config
from pytorch_model.formats.wire import Malformed

Scope = Mapping[str, GraphNode]  # the nodes of the graph, or of one of its functions, by name
Found = TypeVar("Found")

_COLOURS = 3
_PASSED_ON = frozenset({"Identity", "Enter", "Cast", "ReadVariableOp"})
_DIVISIONS = ("RealDiv", "Div", "Mul")

# Suppression → the numbers of its inputs: most boxes, IoU threshold, score threshold, sigma
_SUPPRESSIONS: dict[str, tuple[int, ...]] = {
    "NonMaxSuppressionV2": (2, 3),
    "NonMaxSuppressionV3": (2, 3, 4),
    "NonMaxSuppressionV4": (2, 3, 4),
    "NonMaxSuppressionV5": (2, 3, 4, 5),
    "CombinedNonMaxSuppression": (3, 4, 5),
}
_PARTS = ("at most {:g} boxes", "IoU threshold {:g}", "score threshold {:g}", "sigma {:g}")


class GraphSettings(NamedTuple):
    """``fields`` of ``EfficientDetConfig``; ``notes``, sentences for the user."""

    fields: dict[str, Any]
    notes: tuple[str, ...]


def read_settings(nodes: Iterable[GraphNode]) -> GraphSettings:
    """The settings in the graph of ``nodes``. What cannot be read, or is stated twice, is left out."""
    by_function: dict[str, dict[str, GraphNode]] = defaultdict(dict)
    for node in nodes:
        by_function[node.function][node.name] = node
    scopes = list(by_function.values())
    fields: dict[str, Any] = {}
    for find in (_normalisations, _anchors):
        fields.update(_agreed(found for scope in scopes for found in find(scope)) or {})
    suppressions = list(dict.fromkeys(text for scope in scopes for text in _suppressions(scope)))
    notes = []
    if fields:
        notes.append(f"{', '.join(sorted(fields))}: read from the constants of the graph")
    if len(suppressions) == 1:
        notes.append(f"the graph suppresses boxes by {suppressions[0]}; this is not part of the weights")
    return GraphSettings(fields, tuple(notes))


def _agreed(found: Iterable[Found]) -> Found | None:
    """The one thing that was found; None if there are none or different ones."""
    different: list[Found] = []
    for item in found:
        if item not in different:
            different.append(item)
    return different[0] if len(different) == 1 else None


def _value(scope: Scope, name: str, most: int) -> np.ndarray | None:
    """The constant at ``name``, of at most ``most`` numbers, float64 [n]; None for anything else."""
    node = scope.get(name)
    for _ in range(20):
        if node is None or node.op not in _PASSED_ON or not node.inputs:
            break
        node = scope.get(node.inputs[0])
    if node is None or node.op != "Const":
        return None
    try:
        constant = node.constant()
        if np.prod(constant.shape, dtype=float) > most:
            return None
        return constant.array().astype(np.float64).reshape(-1)
    except Malformed:
        return None  # a text, or a type that holds no setting


# --- normalisation ------------------------------------------------------------------------------------


def _normalisations(scope: Scope) -> Iterator[dict[str, Any]]:
    """Mean and standard deviation of each (image − mean) / deviation, or times its inverse."""
    means = {}
    for node in scope.values():
        if node.op == "Sub" and len(node.inputs) == 2:
            mean = _colours(scope, node.inputs[1])
            if mean is not None:
                means[node.name] = mean
    for node in scope.values():
        source = node.inputs[0] if node.op in _DIVISIONS and len(node.inputs) == 2 else ""
        if source in means:
            deviation = _colours(scope, node.inputs[1])
            if deviation is not None and (deviation > 0).all():
                if node.op == "Mul":
                    deviation = 1 / deviation
                yield {"mean_rgb": _shortest(means[source]), "stddev_rgb": _shortest(deviation)}


def _colours(scope: Scope, name: str) -> np.ndarray | None:
    value = _value(scope, name, _COLOURS)
    return value if value is not None and len(value) == _COLOURS and np.isfinite(value).all() else None


def _shortest(values: np.ndarray) -> tuple[float, ...]:
    """The decimal numbers that are these float32."""
    return tuple(float(str(np.float32(value))) for value in values)


# --- anchors ------------------------------------------------------------------------------------------


def _anchors(scope: Scope) -> Iterator[dict[str, Any]]:
    for node in scope.values():
        boxes = _boxes(node) if node.op == "Const" else None
        found = None if boxes is None else settings_of_boxes(boxes)
        if found is not None:
            yield found


def _boxes(node: GraphNode) -> np.ndarray | None:
    """A constant of float32 [A, 4], as float64; None for another one, and for one shorter in the file."""
    try:
        constant = node.constant()
    except Malformed:
        return None
    is_list = constant.dtype == np.float32 and len(constant.shape) == 2 and constant.shape[1] == 4
    if not is_list or len(constant.content) != 16 * constant.shape[0]:
        return None
    return constant.array().astype(np.float64)


@np.errstate(all="ignore")
def settings_of_boxes(boxes_yxyx: np.ndarray) -> dict[str, Any] | None:
    """Image size and anchor settings of AutoML's anchors, float64 [A, 4] in pixels; None for other boxes."""
    if len(boxes_yxyx) < 2 or not np.isfinite(boxes_yxyx).all():
        return None
    centres = (boxes_yxyx[:, :2] + boxes_yxyx[:, 2:]) / 2
    # Centres are half a stride from the border at the finest level, whose centres reach furthest.
    size = centres.min(axis=0) + centres.max(axis=0)
    stride = 2 * centres.min(axis=0)
    least, most = BOUNDS["image_size"]
    if not ((size >= least) & (size <= most) & (stride > 0)).all():
        return None
    height, width = (int(side) for side in np.rint(size))
    rows, columns = np.rint(size / stride)
    same = np.abs(centres - centres[0]).max(axis=1) < stride.min() / 4
    per_location = len(same) if same.all() else int(np.argmin(same))
    locations, rest = divmod(len(boxes_yxyx), per_location)
    levels = None if rest else _levels((height, width), (rows, columns), locations)
    if levels is None:
        return None
    sizes = np.concatenate([centres, boxes_yxyx[:, 2:] - boxes_yxyx[:, :2]], axis=1)
    try:
        config = model_config(
            "efficientdet-d0", image_size=(height, width), min_level=levels[0], max_level=levels[1]
        )
        found = anchor_settings(sizes / (height, width, height, width), config)
    except ConfigError:
        return None
    return found and {"image_size": (height, width), **found}


def _levels(
    image_size: tuple[int, int], finest: tuple[float, float], locations: int
) -> tuple[int, int] | None:
    """(finest level, coarsest level) whose maps have ``locations`` in all; None if there are none."""
    height, width = image_size
    first, total = 0, 0
    for level in range(1, BOUNDS["max_level"][1] + 1):
        height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
        if not first and (height, width) == finest:
            first = level
        if first:
            total += height * width
            if total >= locations:
                return (first, level) if total == locations else None
    return None


# --- suppression --------------------------------------------------------------------------------------


def _suppressions(scope: Scope) -> Iterator[str]:
    for node in scope.values():
        if node.op in _SUPPRESSIONS:
            texts = [node.op]
            for part, index in zip(_PARTS, _SUPPRESSIONS[node.op], strict=False):
                value = _value(scope, node.inputs[index], 1) if index < len(node.inputs) else None
                if value is not None and value.size:
                    texts.append(part.format(value[0]))
            yield ", ".join(texts)
