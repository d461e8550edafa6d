"""The meaning of hyper-parameters: which field each one sets, and which values it may have."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porting.errors import ConfigError, Reason
from porting.hparams.history import HPARAMS, NAMES, RUNNING, SUPPRESSION, TRAINING, with_effect
from porting.hparams.label_map import LABEL_MAP_NAMES, NotFoundReason, read_label_map
from porting.hparams.text import in_message
from pytorch_model.config import (
    ACTIVATIONS,
    BOUNDS,
    MODELS,
    MOST_ASPECT_RATIOS,
    WEIGHT_METHODS,
    BackboneConfig,
    EfficientDetConfig,
    backbone_config,
    model_config,
)
from pytorch_model.detection.settings import SCOPES, NMSConfig

#: Hyper-parameters on which neither weights nor activations nor boxes depend.
IGNORED = with_effect(NAMES, RUNNING, SUPPRESSION, TRAINING) - {"nms_configs"}

_IGNORED_DICTIONARIES = ("device",)

#: Hyper-parameters that would change the network to one that this project does not build, with the values
#: that are accepted.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "apply_bn_for_resampling": (True,),
    "backbone_config": (None,),
    "conv_bn_relu_pattern": (False,),
    "fpn_config": (None,),
    "heads": (
        ["object_detection"],
        "object_detection",
        ["object_detection", "segmentation"],  # conversion leaves the second head out, and says so
        ["segmentation", "object_detection"],
    ),
    "model_optimizations": ({}, None),
    "pooling_type": (None, "max"),
    "separable_conv": (True,),
    "use_native_resize_op": (False, True),  # two ways to write the same nearest-neighbour resize
}

#: What ``fpn_name`` says of ``fpn_weight_method``, which it decided alone in AutoML's first months; None:
#: nothing. Source: AutoML ``fpn_configs.py`` and, older, ``efficientdet_arch.py``.
FPN_NAMES: Mapping[str | None, str | None] = {
    None: None,
    "bifpn": None,
    "bifpn_dyn": None,
    "bifpn_fa": "fastattn",
    "bifpn_sum": "sum",
}


@dataclass(frozen=True)
class Hparams:
    """Hyper-parameters in this project's terms.

    ``model``: the model variant in ``name``, or None. ``overrides``: fields of ``EfficientDetConfig``.
    ``nms``: fields of ``NMSConfig``, on which no weight depends. ``ignored``: names without effect here.
    ``label_map``: class id → name, see :func:`porting.hparams.label_map.given_names`.
    """

    model: str | None
    overrides: Mapping[str, Any]
    nms: Mapping[str, Any]
    ignored: tuple[str, ...]
    label_map: Mapping[int, str] | None = None


def nms_and_size(
    hparams: Hparams, config: EfficientDetConfig, scope: str = "per-class"
) -> tuple[NMSConfig, tuple[int, int]]:
    """The suppression and the input size (height, width) to use with weights that are already ported.

    ``scope``: one of ``SCOPES``, whose settings hold where ``hparams`` have none.
    Raises :class:`ConfigError` if ``hparams`` describe a network different from ``config``.
    """
    if hparams.model not in (None, config.name):
        raise ConfigError(f"--hparams name the model {hparams.model}, the weights are of {config.name}")
    for name, value in hparams.overrides.items():
        if name != "image_size" and getattr(config, name) != value:
            raise ConfigError(
                f"--hparams say {name}={value}, the weights were ported with {getattr(config, name)}; leave "
                "it out, or port them again with --hparams"
            )
    nms = NMSConfig(scope=scope, **{**SCOPES[scope], **hparams.nms})
    return nms, hparams.overrides.get("image_size", config.image_size)


class _Wrong(Reason):
    """Internal: says what a value must be; the caller adds the name and the value and raises."""


def interpret(values: dict[str, Any], folders: Sequence[Path] = (Path(),), strict: bool = False) -> Hparams:
    """Check every name and value and convert them. Raises :class:`ConfigError`.

    A label map's file is looked for in ``folders``. If it is not there, it is among the ignored names, or an
    error if ``strict``.
    """
    overrides: dict[str, Any] = {}
    nms: dict[str, Any] = {}
    ignored: list[str] = []
    model = label_map = None
    for name, value in _flatten(values):
        root = name.partition(".")[0]
        try:
            if name in FIELDS:
                field, convert = FIELDS[name]
                overrides[field] = convert(value)
            elif name in NMS_FIELDS:
                nms[name.partition(".")[2]] = NMS_FIELDS[name](value)
            elif name == "name":
                model = _one_of(*MODELS)(value)
            elif name == "scale_range":
                _boolean(value)  # its effect depends on two others, see below
            elif name in LABEL_MAP_NAMES:
                names, problem = _label_map(value, folders, strict)
                label_map = names or label_map
                if not names:
                    ignored.append(name + problem)
            elif name == "fpn_name":
                _check_fpn_name(value)  # likewise
            elif root in FIXED:
                _require_fixed(name, value)
            elif name in IGNORED or root in _IGNORED_DICTIONARIES:
                ignored.append(name)
            else:
                raise ConfigError(_unknown(name))
        except _Wrong as wrong:
            raise ConfigError(f"{name} is {in_message(value)}, must be {wrong}") from None
        except Reason as reason:
            raise ConfigError(
                f"{name} is {in_message(value)}: {reason}; correct it or leave it out"
            ) from None
    if values.get("scale_range"):
        overrides.update(_scaled_range(overrides))
    if fusion := FPN_NAMES[values.get("fpn_name")]:
        overrides["fpn_weight_method"] = _named_fusion(fusion, values)
    NMSConfig(**nms)  # rejects settings that do not fit each other
    return Hparams(model, overrides, nms, tuple(ignored), label_map)


def _flatten(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names as in AutoML's text form: ``nms_configs.method`` for a name inside a dictionary.

    But a label map's ids (``label_map.1=ant``) become one dictionary.
    """
    for name in LABEL_MAP_NAMES:
        dotted = {key: value for key, value in values.items() if key.startswith(f"{name}.")}
        if dotted and name not in values:
            values = {key: value for key, value in values.items() if key not in dotted}
            values[name] = {key.partition(".")[2]: value for key, value in dotted.items()}
    for name, value in values.items():
        if name == "nms_configs" and isinstance(value, dict):
            for inner, inner_value in value.items():
                yield f"{name}.{inner}", inner_value
        else:
            yield name, value


def _label_map(value: Any, folders: Sequence[Path], strict: bool) -> tuple[Mapping[int, str] | None, str]:
    """The label map, or None and why there is none. Raises :class:`Reason`."""
    try:
        return read_label_map(value, folders), ""
    except NotFoundReason as reason:
        if strict:
            raise
        return None, f" ({in_message(value)}: {reason})"


def _unknown(name: str) -> str:
    if name == "nms_configs":
        return "nms_configs is not a mapping; write nms_configs.method=hard and the like, or a .yaml file"
    known = [*HPARAMS, *NMS_FIELDS, *LABEL_MAP_NAMES]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see AutoML's hparams_config.py for the known names"
    return f"{in_message(name)} is not a hyper-parameter of AutoML's EfficientDet; {hint}"


def _require_fixed(name: str, value: Any) -> None:
    allowed = FIXED.get(name, ())
    if not any(type(value) is type(standard) and value == standard for standard in allowed):
        advice = f"only {name}={allowed[0]} is supported" if allowed else "leave it out"
        raise ConfigError(
            f"{name}={in_message(value)} makes a network that this project does not build; {advice}"
        )


def _check_fpn_name(value: Any) -> None:
    if value is None or (isinstance(value, str) and value in FPN_NAMES):
        return
    what = "a QuFPN, a network" if isinstance(value, str) and value.startswith("qufpn") else "a network"
    raise ConfigError(
        f"fpn_name={in_message(value)} makes {what} that this project does not build; only "
        f"{', '.join(name for name in FPN_NAMES if name)} are supported"
    )


def _named_fusion(fusion: str, values: Mapping[str, Any]) -> str:
    """The fusion that ``fpn_name`` names, unless ``fpn_weight_method`` is another."""
    method = values.get("fpn_weight_method")
    if method not in (None, fusion):
        raise ConfigError(
            f"fpn_name={values['fpn_name']} and fpn_weight_method={in_message(method)} contradict each "
            "other; leave one out"
        )
    return fusion


def _scaled_range(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``scale_range`` maps 0…255 to [-1, 1]. AutoML uses it for AdvProp, with mean 0 and deviation 1."""
    if overrides.get("mean_rgb") != (0.0,) * 3 or overrides.get("stddev_rgb") != (1.0,) * 3:
        raise ConfigError(
            "scale_range=true needs mean_rgb=0.0,stddev_rgb=1.0, as in AutoML's AdvProp models; give "
            "all three, or only mean_rgb and stddev_rgb"
        )
    return {"mean_rgb": (127.5,) * 3, "stddev_rgb": (127.5,) * 3}


# Kinds of values

Convert = Callable[[Any], Any]


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong("true or false")
    return value


def _whole(least: int, most: int) -> Convert:
    """A whole number. The upper bounds are far above any model, but catch typing errors."""

    def convert(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _Wrong(f"a whole number from {least} to {most}")
        return value

    return convert


def _real(within: Callable[[float], bool], what: str) -> Convert:
    def convert(value: Any) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and within(value):
            return float(value)
        raise _Wrong(what)

    return convert


_number = _real(lambda value: abs(value) < 1e9, "a number")  # not nan
_positive = _real(lambda value: 0 < value < 1e9, "a number above 0")
_fraction = _real(lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _optional(convert: Convert) -> Convert:
    def convert_or_none(value: Any) -> Any:
        return None if value is None else convert(value)

    return convert_or_none


def _one_of(*names: str) -> Convert:
    def convert(value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            raise _Wrong(f"one of {', '.join(names)}")
        return value

    return convert


def _image_size(value: Any) -> tuple[int, int]:
    """(height, width) in pixels. AutoML's text form puts the width first, its tuple (in YAML) the height."""
    size: tuple[Any, ...] = (value, value)
    if isinstance(value, tuple) and len(value) == 2:
        size = value
    elif isinstance(value, str) and (match := re.fullmatch(r"([0-9]{1,9})[xX]([0-9]{1,9})", value)):
        size = int(match[2]), int(match[1])
    try:
        height, width = map(_whole(*BOUNDS["image_size"]), size)
    except _Wrong as wrong:
        raise _Wrong(f"{wrong}, or two as WIDTHxHEIGHT") from None
    return height, width


def _aspect_ratios(value: Any) -> tuple[float | tuple[float, float], ...]:
    """Numbers, or pairs, which early versions of AutoML took: factors of the anchor's width and height."""
    wrong = _Wrong("a list of numbers above 0 (each width by height), such as [1.0,2.0,0.5], or of pairs")
    if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MOST_ASPECT_RATIOS:
        raise wrong
    try:
        return tuple(
            _pair(ratio) if isinstance(ratio, (list, tuple)) else _positive(ratio) for ratio in value
        )
    except (_Wrong, ValueError):
        raise wrong from None


def _pair(value: Any) -> tuple[float, float]:
    width, height = map(_positive, value)
    return width, height


def _anchor_scale(value: Any) -> float | tuple[float, ...]:
    """One number, or one for each level."""
    if isinstance(value, (list, tuple)) and 1 <= len(value) <= 12:
        return tuple(map(_positive, value))
    return _positive(value)


def _rgb(convert: Convert) -> Convert:
    """Three numbers, or one for all three channels, in grey levels."""

    def convert_three(value: Any) -> tuple[float, ...]:
        three = list(value) if isinstance(value, (list, tuple)) else list(itertools.repeat(value, 3))
        try:
            if len(three) == 3:
                return tuple(map(convert, three))
        except _Wrong as wrong:
            raise _Wrong(f"{wrong}, or a list of three") from None
        raise _Wrong("a number, or a list of three")

    return convert_three


def _weight_method(value: Any) -> str:
    return "fastattn" if value is None else str(_one_of(*WEIGHT_METHODS)(value))  # AutoML's own default


def _survival_prob(value: Any) -> float | None:
    return (_fraction(value) or None) if value is not None else None  # AutoML only checks whether it is set


def _backbone(value: Any) -> BackboneConfig:
    return backbone_config(_one_of(*_BACKBONES)(value))


_BACKBONES = tuple(dict.fromkeys(model_config(name).backbone.name for name in MODELS))
FIELDS: Mapping[str, tuple[str, Convert]] = {
    "act_type": ("act_type", _one_of(*ACTIVATIONS)),
    "anchor_scale": ("anchor_scale", _anchor_scale),
    "aspect_ratios": ("aspect_ratios", _aspect_ratios),
    "backbone_name": ("backbone", _backbone),
    "box_class_repeats": ("box_class_repeats", _whole(*BOUNDS["box_class_repeats"])),
    "conv_after_downsample": ("conv_after_downsample", _boolean),
    "conv_bn_act_pattern": ("conv_bn_act_pattern", _boolean),
    "fpn_cell_repeats": ("fpn_cell_repeats", _whole(*BOUNDS["fpn_cell_repeats"])),
    "fpn_num_filters": ("fpn_num_filters", _whole(*BOUNDS["fpn_num_filters"])),
    "fpn_weight_method": ("fpn_weight_method", _weight_method),
    "image_size": ("image_size", _image_size),
    "max_level": ("max_level", _whole(*BOUNDS["max_level"])),
    "mean_rgb": ("mean_rgb", _rgb(_number)),
    "min_level": ("min_level", _whole(*BOUNDS["min_level"])),
    "num_classes": ("num_classes", _whole(*BOUNDS["num_classes"])),
    "num_scales": ("num_scales", _whole(*BOUNDS["num_scales"])),
    "stddev_rgb": ("stddev_rgb", _rgb(_positive)),
    "survival_prob": ("survival_prob", _survival_prob),
}
NMS_FIELDS: Mapping[str, Convert] = {
    "nms_configs.iou_thresh": _optional(_fraction),
    "nms_configs.max_nms_inputs": _whole(0, 10_000_000),
    "nms_configs.max_output_size": _whole(1, 10_000_000),
    "nms_configs.method": _one_of("gaussian", "hard", "linear", "diou"),
    "nms_configs.pyfunc": _boolean,
    "nms_configs.score_thresh": lambda value: 0.0 if value is None else _fraction(value),
    "nms_configs.sigma": _optional(_positive),
}
