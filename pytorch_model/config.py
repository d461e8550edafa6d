"""The architecture as data: one frozen dataclass per network, and the table of AutoML's model variants.

Sources: EfficientDet (Tan, Pang, Le, CVPR 2020) tables 1 and 2; EfficientNet (Tan, Le, ICML 2019)
table 1; AutoML ``hparams_config.py``, ``backbone/efficientnet_builder.py`` and
``backbone/efficientnet_lite_builder.py``. Field names are AutoML's hyper-parameter names.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pytorch_model.errors import ConfigError

WEIGHT_METHODS = ("fastattn", "attn", "channel_fastattn", "channel_attn", "sum")
ACTIVATIONS = ("swish", "swish_native", "silu", "relu", "relu6", "hswish", "mish")
#: Rule → what it does to an image. ``detection/preprocess.py`` has a function for each.
RESIZE_RULES: Mapping[str, str] = {
    "automl": "AutoML's: fitted into the input",
    "fixed_shape": "stretched to the input's shape",
    "keep_aspect_ratio": "fitted into the input as the Object Detection API does",
}
#: Rules for the stride and the first centre of the anchors. ``anchors.py`` has a function for each.
ANCHOR_STRIDES = ("size_ratio", "power_of_two")

BN_EPSILON = 1e-3
BN_MOMENTUM = 0.01  # PyTorch's convention; TensorFlow writes the same number as 0.99
LAST_SURVIVAL_PROB = 0.8  # towards which stochastic depth in a backbone falls
MAX_BACKBONE_LEVEL = 5  # P3…P5 come from the backbone, P6 and up are resampled from P5
ENDPOINT_LEVELS = (3, 4, 5)

#: Field → (least, most). A configuration may come from a file or a user, and a network is built from it. The
#: largest model, D7x, has 8 cells, 5 repeats, 384 filters, 90 classes, level 8, 1536 pixels and a backbone of
#: 55 blocks and 640 filters. The bounds are far above that, and low enough that the variables of such a
#: network are listed in seconds.
BOUNDS: Mapping[str, tuple[int, int]] = {
    "box_class_repeats": (0, 100),
    "fpn_cell_repeats": (1, 100),
    "fpn_num_filters": (1, 10_000),
    "image_size": (1, 16_384),
    "max_level": (1, 12),
    "min_level": (1, 12),
    "num_classes": (1, 100_000),
    "min_dimension": (1, 16_384),
    "num_scales": (1, 100),
    "pad_to_multiple": (1, 16_384),
    "stem_filters": (1, 10_000),
    "repeats": (0, 100),  # 0: for a moment in BackboneConfig.ending_at
    "kernel_size": (1, 31),
    "stride": (1, 2),
    "expand_ratio": (1, 100),
    "out_filters": (1, 10_000),
}
MOST_BLOCKS = 1_000
MOST_ASPECT_RATIOS = 100
NUMBER_LIMIT = 1e9  # far above any scale, ratio or grey level; also excludes infinity


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < NUMBER_LIMIT


def shown(value: Any) -> str:
    """``value`` for a message, shortened if it is long."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not print numbers of thousands of digits
        return "a number too long to show"


def _check_whole(where: str, what: str, value: Any) -> None:
    """Raise :class:`ConfigError` unless ``value`` is within the :data:`BOUNDS` of the field ``what``."""
    least, most = BOUNDS[what]
    if type(value) is not int or not least <= value <= most:
        raise ConfigError(f"{where}: {what} is {shown(value)}, must be a whole number from {least} to {most}")


@dataclass(frozen=True)
class Stage:
    """A run of MBConv blocks of one width (EfficientNet table 1, one row).

    Only the first block has the stride and changes the width; the others keep ``out_filters``.
    """

    repeats: int
    kernel_size: int
    stride: int
    expand_ratio: int
    out_filters: int

    def __post_init__(self) -> None:
        for what, value in vars(self).items():
            _check_whole("stage", what, value)


@dataclass(frozen=True)
class Block:
    """One MBConv block: ``in_filters`` → expand → depthwise → squeeze-excite → project → ``out_filters``."""

    kernel_size: int
    stride: int
    expand_ratio: int
    in_filters: int
    out_filters: int
    se_filters: int  # 0: no squeeze-and-excitation (Lite)

    @property
    def expanded_filters(self) -> int:
        return self.in_filters * self.expand_ratio

    @property
    def has_residual(self) -> bool:
        return self.stride == 1 and self.in_filters == self.out_filters


@dataclass(frozen=True)
class BackboneConfig:
    """EfficientNet without its classifier. Widths and repeats are final numbers, after scaling.

    ``name`` is also the outermost TensorFlow variable scope (``efficientnet-b0/…``).
    """

    name: str
    stem_filters: int
    stages: tuple[Stage, ...]
    se_ratio: float = 0.25  # 0: none
    endpoints: tuple[int, int, int] | None = None  # the blocks of P3, P4, P5; None: AutoML's choice

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_whole("backbone", "stem_filters", self.stem_filters)
        blocks = sum(stage.repeats for stage in self.stages)
        if max(blocks, len(self.stages)) > MOST_BLOCKS:
            raise ConfigError(f"backbone: it has {blocks} blocks, must have at most {MOST_BLOCKS}")
        ratio = self.se_ratio
        if not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise ConfigError(f"backbone: se_ratio is {shown(ratio)}, must be from 0 (none) to 1")

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every block in execution order; its index is AutoML's ``blocks_N``."""
        blocks: list[Block] = []
        filters = self.stem_filters
        for stage in self.stages:
            for repeat in range(stage.repeats):
                blocks.append(
                    Block(
                        kernel_size=stage.kernel_size,
                        stride=stage.stride if repeat == 0 else 1,
                        expand_ratio=stage.expand_ratio,
                        in_filters=filters,
                        out_filters=stage.out_filters,
                        # AutoML applies the ratio to the block's input width, before expansion.
                        se_filters=max(1, int(filters * self.se_ratio)) if self.se_ratio else 0,
                    )
                )
                filters = stage.out_filters
        return tuple(blocks)

    @cached_property
    def block_levels(self) -> tuple[int, ...]:
        """Block → the level l of its output, whose stride is 2**l (1…5)."""
        strides = itertools.accumulate((block.stride == 2 for block in self.blocks), initial=1)  # 1: the stem
        return tuple(strides)[1:]

    @cached_property
    def reduction_blocks(self) -> dict[int, int]:
        """Level → index of its block: the last one of stride 2**level, unless ``endpoints`` names another."""
        last = {level: index for index, level in enumerate(self.block_levels)}
        return {**last, **dict(zip(ENDPOINT_LEVELS, self.endpoints or (), strict=False))}

    @cached_property
    def survival_probs(self) -> tuple[float, ...] | None:
        """Block → the probability that it counts in training, if it has a residual (stochastic depth).

        It falls linearly from 1, as AutoML lays down for its b1…b7 and lite0…lite4. None: every block always
        counts, in b0 and in a backbone that AutoML does not know.
        """
        if self.name not in _BACKBONES or self.name == "efficientnet-b0":
            return None
        fall = 1 - LAST_SURVIVAL_PROB
        return tuple(1 - fall * index / len(self.blocks) for index in range(len(self.blocks)))

    def ending_at(self, endpoints: tuple[int, int, int]) -> BackboneConfig:
        """This network with P3, P4 and P5 taken from the given blocks, and cut after the last of them."""
        stages = []
        left = endpoints[-1] + 1
        for stage in self.stages:
            stages.append(dataclasses.replace(stage, repeats=min(stage.repeats, left)))
            left -= stages[-1].repeats
        cut = dataclasses.replace(self, stages=tuple(s for s in stages if s.repeats), endpoints=None)
        usual = tuple(cut.reduction_blocks[level] for level in ENDPOINT_LEVELS)
        return cut if usual == endpoints else dataclasses.replace(cut, endpoints=endpoints)

    def filters_at(self, level: int) -> int:
        """Channels of the backbone's output at ``level``."""
        return self.blocks[self.reduction_blocks[level]].out_filters


@dataclass(frozen=True)
class Node:
    """One BiFPN node. ``inputs`` are node ids; ids below the number of levels are the cell's own inputs."""

    level: int
    inputs: tuple[int, ...]
    id: int


@dataclass(frozen=True)
class Resizer:
    """How a normalised image of any size becomes the network's input.

    ``rule``: one of :data:`RESIZE_RULES`; it gives the scaled size. ``min_dimension``: with
    ``keep_aspect_ratio``, the longest that the shorter side may become; None: no limit of its own. ``pad``:
    extend below and to the right to the image size with ``pad_value``, per channel and *not* normalised.
    Without it, which is possible with ``keep_aspect_ratio``, the input's size differs from image to image.
    ``pad_to_multiple``: after that, extend with 0 to a multiple of this many pixels.
    Raises :class:`ConfigError` on a value that is not possible.
    """

    rule: str = "automl"
    min_dimension: int | None = None
    pad: bool = True
    pad_value: tuple[float, float, float] = (0.0, 0.0, 0.0)
    pad_to_multiple: int = 1

    def __post_init__(self) -> None:
        if self.rule not in RESIZE_RULES:
            raise ConfigError(
                f"resizer: rule is {shown(self.rule)}, must be one of {', '.join(RESIZE_RULES)}"
            )
        if self.min_dimension is not None:
            _check_whole("resizer", "min_dimension", self.min_dimension)
        _check_whole("resizer", "pad_to_multiple", self.pad_to_multiple)
        values = self.pad_value
        if not isinstance(values, tuple) or len(values) != 3 or not all(map(_is_number, values)):
            raise ConfigError(
                f"resizer: pad_value is {shown(values)}, must be three numbers, one per channel"
            )
        varies = self.rule == "keep_aspect_ratio" and self.pad_to_multiple == 1
        if self.pad is not True and (self.pad is not False or not varies):
            raise ConfigError(
                f"resizer: pad is {shown(self.pad)}, must be true, or false with the rule keep_aspect_ratio "
                "and without pad_to_multiple"
            )

    def __str__(self) -> str:
        facts = [RESIZE_RULES[self.rule]]
        if self.min_dimension is not None:
            facts.append(f"the shorter side at most {self.min_dimension} pixels")
        if not self.pad:
            facts.append("not padded, so that the input's size varies")
        elif any(self.pad_value):
            facts.append(f"padded with {'/'.join(f'{value:g}' for value in self.pad_value)}")
        if self.pad_to_multiple > 1:
            facts.append(f"then padded to a multiple of {self.pad_to_multiple} pixels")
        return ", ".join(facts)

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """``size`` (height, width), each rounded up to ``pad_to_multiple``."""
        multiple = self.pad_to_multiple
        return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


@dataclass(frozen=True)
class EfficientDetConfig:
    """Everything that defines an EfficientDet: its variables, its function, its input and its anchors.

    ``image_size`` is (height, width): what images are resized into. ``mean_rgb`` and ``stddev_rgb`` are in
    grey levels, 0…255. ``anchor_stride``: one of :data:`ANCHOR_STRIDES`.
    ``class_names``: one for each class id from 1, empty where a class has no name; None if they are unknown.
    They do not take part in comparisons: two networks are equal whatever their classes are called.
    Raises :class:`ConfigError` on a value that cannot be built.
    """

    name: str
    backbone: BackboneConfig
    image_size: tuple[int, int]
    fpn_num_filters: int
    fpn_cell_repeats: int
    box_class_repeats: int
    num_classes: int = 90
    min_level: int = 3
    max_level: int = 7
    num_scales: int = 3
    aspect_ratios: tuple[float | tuple[float, float], ...] = (1.0, 2.0, 0.5)  # or (width, height) factors
    anchor_scale: float | tuple[float, ...] = 4.0  # or one per level
    fpn_weight_method: str = "fastattn"
    act_type: str = "swish"
    conv_after_downsample: bool = False
    conv_bn_act_pattern: bool = False
    survival_prob: float | None = None  # if set, the heads add a residual, also at inference
    mean_rgb: tuple[float, float, float] = (0.485 * 255, 0.456 * 255, 0.406 * 255)
    stddev_rgb: tuple[float, float, float] = (0.229 * 255, 0.224 * 255, 0.225 * 255)
    resizer: Resizer = Resizer()
    anchor_stride: str = "size_ratio"
    class_names: tuple[str, ...] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the network's input: ``image_size`` unless the resizer pads it further."""
        return self.resizer.padded(self.image_size)

    @property
    def levels(self) -> range:
        return range(self.min_level, self.max_level + 1)

    @property
    def num_anchors(self) -> int:
        """Anchors per location."""
        return self.num_scales * len(self.aspect_ratios)

    @property
    def aspect_factors(self) -> tuple[tuple[float, float], ...]:
        """(width, height) factors of each aspect ratio; a single number keeps the area."""
        return tuple(
            ratio if isinstance(ratio, tuple) else (math.sqrt(ratio), 1 / math.sqrt(ratio))
            for ratio in self.aspect_ratios
        )

    @property
    def anchor_scales(self) -> tuple[float, ...]:
        """The anchor scale of each level."""
        scale = self.anchor_scale
        return scale if isinstance(scale, tuple) else (scale,) * len(self.levels)

    @property
    def extra_levels(self) -> range:
        """Levels above the backbone; each is resampled from the level below."""
        return range(MAX_BACKBONE_LEVEL + 1, self.max_level + 1)

    @cached_property
    def level_filters(self) -> tuple[int, ...]:
        """Channels of each of the first BiFPN cell's inputs, in level order."""
        return tuple(
            self.backbone.filters_at(level) if level <= MAX_BACKBONE_LEVEL else self.fpn_num_filters
            for level in self.levels
        )

    @cached_property
    def bifpn_nodes(self) -> tuple[Node, ...]:
        """The nodes of one BiFPN cell in execution order (paper section 3.2; AutoML ``fpn_configs.py``)."""
        ids = {level: [index] for index, level in enumerate(self.levels)}
        next_id = itertools.count(len(self.levels))
        nodes: list[Node] = []

        def add(level: int, inputs: list[int]) -> None:
            node = Node(level, tuple(inputs), next(next_id))
            nodes.append(node)
            ids[level].append(node.id)

        for level in reversed(self.levels[:-1]):  # top-down
            add(level, [ids[level][-1], ids[level + 1][-1]])
        for level in self.levels[1:]:  # bottom-up: everything at this level, and the node below
            add(level, [*ids[level], ids[level - 1][-1]])
        return tuple(nodes)

    def node_input_filters(self, cell: int, node_input: int) -> int:
        """Channels of ``node_input``, an input of a node of ``cell``, before resampling."""
        if cell == 0 and node_input < len(self.levels):
            return self.level_filters[node_input]
        return self.fpn_num_filters

    def feature_sizes(self, image_size: tuple[int, int] | None = None) -> dict[int, tuple[int, int]]:
        """Level → (height, width) of its feature map; each is ``(size - 1) // 2 + 1`` of the one before.

        ``image_size``: of the network's input; None: :attr:`input_size`.
        """
        height, width = image_size or self.input_size
        sizes: dict[int, tuple[int, int]] = {}
        for level in range(1, self.max_level + 1):
            height, width = (height - 1) // 2 + 1, (width - 1) // 2 + 1
            sizes[level] = (height, width)
        return {level: sizes[level] for level in self.levels}

    def replace(self, **changes: Any) -> EfficientDetConfig:
        """A copy with other values. Raises :class:`ConfigError` on an unknown field or a bad value."""
        try:
            return dataclasses.replace(self, **changes)
        except TypeError as error:
            raise ConfigError(f"{self.name}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict; :meth:`from_dict` reads it back.

        Fields that were added later are left out where they have their default: older files stay the same.
        """
        added = {item.name: item.default for item in dataclasses.fields(self) if item.name in _ADDED_LATER}
        usual = {name for name, default in added.items() if getattr(self, name) == default}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in usual}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EfficientDetConfig:
        """Inverse of :meth:`to_dict`. Raises :class:`ConfigError` on a missing, unknown or bad field."""
        try:
            values: dict[str, Any] = {key: _as_tuples(value) for key, value in data.items()}
            backbone = dict(values.pop("backbone"))
            backbone["stages"] = tuple(Stage(**stage) for stage in backbone["stages"])
            backbone["endpoints"] = _as_tuples(backbone.get("endpoints"))
            if "resizer" in values:
                values["resizer"] = Resizer(**{k: _as_tuples(v) for k, v in values["resizer"].items()})
            return cls(backbone=BackboneConfig(**backbone), **values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not an EfficientDet configuration: {error}") from None


_ADDED_LATER = ("resizer", "anchor_stride", "class_names")


def _as_tuples(value: Any) -> Any:
    """``value`` with every list, also nested ones, as a tuple: JSON has no tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _check_name(name: Any) -> None:
    """Raise :class:`ConfigError` unless ``name`` can begin a message of one line."""
    if not isinstance(name, str) or len(name) > 200 or not name.isprintable():
        raise ConfigError(f"name is {shown(name)}, must be one line of text")


def _flat(values: Any) -> tuple[Any, ...]:
    """The numbers in a tuple of numbers and pairs."""
    return tuple(n for value in values for n in (value if isinstance(value, tuple) else (value,)))


#: A condition and the message of the error if it does not hold.
_Require = Callable[[object, str], None]


def _check(config: EfficientDetConfig) -> None:
    """Raise :class:`ConfigError` unless ``config`` can be built. Later checks rely on earlier ones."""

    def require(condition: object, message: str) -> None:
        if not condition:
            raise ConfigError(f"{config.name}: {message}")

    _check_name(config.name)
    _check_numbers(config, require)
    _check_ratios(config.aspect_ratios, require)
    _check_levels(config, require)
    _check_class_names(config, require)
    require(
        config.fpn_weight_method in WEIGHT_METHODS,
        f"fpn_weight_method is {shown(config.fpn_weight_method)}, must be one of {', '.join(WEIGHT_METHODS)}",
    )
    require(
        config.act_type in ACTIVATIONS,
        f"act_type is {shown(config.act_type)}, must be one of {', '.join(ACTIVATIONS)}",
    )
    require(
        config.anchor_stride in ANCHOR_STRIDES,
        f"anchor_stride is {shown(config.anchor_stride)}, must be one of {', '.join(ANCHOR_STRIDES)}",
    )
    require(isinstance(config.resizer, Resizer), f"resizer is {shown(config.resizer)}, must be a Resizer")


def _check_numbers(config: EfficientDetConfig, require: _Require) -> None:
    pair = config.image_size
    require(
        isinstance(pair, tuple) and len(pair) == 2, f"image_size is {shown(pair)}, must be (height, width)"
    )
    for what in (name for name in BOUNDS if name in vars(config) and name != "image_size"):
        _check_whole(config.name, what, getattr(config, what))
    for side in pair:
        _check_whole(config.name, "image_size", side)
    positive = {
        "anchor_scale": _flat((config.anchor_scale,)),
        "aspect_ratios": _flat(config.aspect_ratios),
        "stddev_rgb": config.stddev_rgb,
    }
    for what, values in positive.items():
        fine = isinstance(values, tuple) and all(_is_number(v) and v > 0 for v in values)
        require(fine, f"{what} is {shown(values)}, must be above 0 and below {NUMBER_LIMIT:g}")
    for what in ("mean_rgb", "stddev_rgb"):
        values = getattr(config, what)
        require(
            len(values) == 3 and all(map(_is_number, values)),
            f"{what} must be three numbers, one per channel",
        )
    survival = config.survival_prob
    require(
        survival is None or (isinstance(survival, (int, float)) and 0 <= survival <= 1),
        f"survival_prob is {shown(survival)}, must be a probability or None",
    )


def _check_ratios(ratios: tuple[Any, ...], require: _Require) -> None:
    require(len(ratios) >= 1, "aspect_ratios is empty")
    require(
        len(ratios) <= MOST_ASPECT_RATIOS,
        f"aspect_ratios are {len(ratios)}, must be at most {MOST_ASPECT_RATIOS}",
    )
    require(
        all(not isinstance(ratio, tuple) or len(ratio) == 2 for ratio in ratios),
        f"aspect_ratios is {shown(ratios)}, must be numbers or (width, height) pairs",
    )


def _check_class_names(config: EfficientDetConfig, require: _Require) -> None:
    names = config.class_names
    if names is None:
        return
    fine = isinstance(names, tuple) and all(isinstance(name, str) and len(name) <= 1_000 for name in names)
    require(fine, f"class_names is {shown(names)}, must be a list of short texts")
    require(
        len(names) == config.num_classes,
        f"class_names are {len(names)}, must be one for each of the {config.num_classes} classes",
    )
    for name in names:
        require(not name or name.isprintable(), f"the class name {shown(name)} is not one line of text")


def _check_levels(config: EfficientDetConfig, require: _Require) -> None:
    endpoints = config.backbone.reduction_blocks
    require(
        config.min_level in endpoints and config.min_level <= MAX_BACKBONE_LEVEL,
        f"min_level is {config.min_level}, must be one of the backbone's levels {sorted(endpoints)}",
    )
    require(
        config.max_level > config.min_level,
        f"max_level is {config.max_level}, must be above min_level ({config.min_level})",
    )
    require(
        len(config.anchor_scales) == len(config.levels),
        f"anchor_scale is {shown(config.anchor_scale)}, must be one number or one for each of "
        f"P{config.min_level}–P{config.max_level}",
    )
    require(
        max(endpoints) == MAX_BACKBONE_LEVEL,
        f"the backbone ends at level {max(endpoints)}, must end at {MAX_BACKBONE_LEVEL}",
    )
    given = config.backbone.endpoints
    require(
        given is None
        or (
            len(given) == len(ENDPOINT_LEVELS)
            and all(type(index) is int and 0 <= index < len(config.backbone.blocks) for index in given)
            and tuple(config.backbone.block_levels[index] for index in given) == ENDPOINT_LEVELS
            and given[-1] == len(config.backbone.blocks) - 1
        ),
        f"endpoints are {shown(given)}, must be a block of stride 8, one of stride 16 and the last block",
    )


# ---------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------

_BASE_STEM = 32
_BASE_STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
# backbone → (width coefficient, depth coefficient)
_BACKBONES = {
    "efficientnet-b0": (1.0, 1.0),
    "efficientnet-b1": (1.0, 1.1),
    "efficientnet-b2": (1.1, 1.2),
    "efficientnet-b3": (1.2, 1.4),
    "efficientnet-b4": (1.4, 1.8),
    "efficientnet-b5": (1.6, 2.2),
    "efficientnet-b6": (1.8, 2.6),
    "efficientnet-b7": (2.0, 3.1),
    "efficientnet-lite0": (1.0, 1.0),
    "efficientnet-lite1": (1.0, 1.1),
    "efficientnet-lite2": (1.1, 1.2),
    "efficientnet-lite3": (1.2, 1.4),
    "efficientnet-lite4": (1.4, 1.8),
}


def round_filters(filters: int, width: float) -> int:
    """Scale a width and round it to a multiple of 8, never below 90 % of the scaled value."""
    scaled = filters * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


def backbone_config(name: str) -> BackboneConfig:
    """The EfficientNet called ``name`` (``efficientnet-b0``…``b7``, ``efficientnet-lite0``…``lite4``).

    Raises :class:`ConfigError` for any other name.
    """
    if name not in _BACKBONES:
        raise ConfigError(f"unknown backbone {name!r}; known: {', '.join(_BACKBONES)}")
    width, depth = _BACKBONES[name]
    lite = "lite" in name
    last = len(_BASE_STAGES) - 1

    def repeats(index: int, stage: Stage) -> int:
        # Lite keeps one block in the first and the last stage at every depth.
        return stage.repeats if lite and index in (0, last) else math.ceil(stage.repeats * depth)

    return BackboneConfig(
        name=name,
        stem_filters=_BASE_STEM if lite else round_filters(_BASE_STEM, width),
        stages=tuple(
            dataclasses.replace(
                stage, repeats=repeats(i, stage), out_filters=round_filters(stage.out_filters, width)
            )
            for i, stage in enumerate(_BASE_STAGES)
        ),
        se_ratio=0.0 if lite else 0.25,
    )


@dataclass(frozen=True)
class _Row:
    """One line of the table of models; other fields have AutoML's defaults."""

    backbone: str
    image_size: int
    fpn_num_filters: int
    fpn_cell_repeats: int
    box_class_repeats: int
    extra: Mapping[str, Any] = field(default_factory=dict)


_SUM = {"fpn_weight_method": "sum"}
_LITE = {
    "fpn_weight_method": "sum",
    "act_type": "relu6",
    "mean_rgb": (127.0, 127.0, 127.0),
    "stddev_rgb": (128.0, 128.0, 128.0),
}
_VARIANTS = {
    "efficientdet-d0": _Row("efficientnet-b0", 512, 64, 3, 3),
    "efficientdet-d1": _Row("efficientnet-b1", 640, 88, 4, 3),
    "efficientdet-d2": _Row("efficientnet-b2", 768, 112, 5, 3),
    "efficientdet-d3": _Row("efficientnet-b3", 896, 160, 6, 4),
    "efficientdet-d4": _Row("efficientnet-b4", 1024, 224, 7, 4),
    "efficientdet-d5": _Row("efficientnet-b5", 1280, 288, 7, 4),
    "efficientdet-d6": _Row("efficientnet-b6", 1280, 384, 8, 5, _SUM),
    "efficientdet-d7": _Row("efficientnet-b6", 1536, 384, 8, 5, {**_SUM, "anchor_scale": 5.0}),
    "efficientdet-d7x": _Row("efficientnet-b7", 1536, 384, 8, 5, {**_SUM, "max_level": 8}),
    "efficientdet-lite0": _Row("efficientnet-lite0", 320, 64, 3, 3, {**_LITE, "anchor_scale": 3.0}),
    "efficientdet-lite1": _Row("efficientnet-lite1", 384, 88, 4, 3, {**_LITE, "anchor_scale": 3.0}),
    "efficientdet-lite2": _Row("efficientnet-lite2", 448, 112, 5, 3, {**_LITE, "anchor_scale": 3.0}),
    "efficientdet-lite3": _Row("efficientnet-lite3", 512, 160, 6, 4, _LITE),
    "efficientdet-lite3x": _Row("efficientnet-lite3", 640, 200, 6, 4, {**_LITE, "anchor_scale": 3.0}),
    "efficientdet-lite4": _Row("efficientnet-lite4", 640, 224, 7, 4, _LITE),
}
MODELS = tuple(_VARIANTS)


def model_config(name: str, **overrides: Any) -> EfficientDetConfig:
    """The configuration of a model variant: ``efficientdet-d0`` as in AutoML, or ``efficientdet_d0``.

    ``overrides`` replace fields of :class:`EfficientDetConfig`. Raises :class:`ConfigError` on an unknown
    name or an impossible value.
    """
    key = name.lower().replace("_", "-")
    if key not in _VARIANTS:
        raise ConfigError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    row = _VARIANTS[key]
    values: dict[str, Any] = {
        "name": key,
        "backbone": backbone_config(row.backbone),
        "image_size": (row.image_size, row.image_size),
        "fpn_num_filters": row.fpn_num_filters,
        "fpn_cell_repeats": row.fpn_cell_repeats,
        "box_class_repeats": row.box_class_repeats,
        **row.extra,
    }
    try:
        return EfficientDetConfig(**{**values, **overrides})
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from None
