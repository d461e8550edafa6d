"""AutoML's ``--hparams``: ``num_classes=20,image_size=640x480`` or a ``.yaml`` file, as main.py takes them.

Source of the names, the defaults and the syntax: AutoML ``hparams_config.py``.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porting.errors import ConfigError, Reason
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
    shown,
)
from pytorch_model.detection.settings import NMSConfig
from pytorch_model.files import read_bounded

_YAML_SUFFIXES = (".yaml", ".yml")
_MOST_BYTES = 64 << 10  # of a yaml file; AutoML's have 2 kB, a label_map of LVIS's 1,203 classes 30 kB
_MOST_VALUES = 10_000  # in it, names among them; PyYAML takes half a kilobyte for each

#: Hyper-parameters of training, data and evaluation. No weight and no activation depends on them.
IGNORED = frozenset(
    """
    alpha augmix_params autoaugment_policy box_loss_weight ckpt_var_scope clip_gradients_norm data_format
    dataset_type delta device drop_remainder each_epoch_in_separate_process first_lr_drop_epoch gamma
    grad_checkpoint grid_mask img_summary_steps input_rand_hflip iou_loss_type iou_loss_weight is_training_bn
    jitter_max jitter_min label_map label_smoothing learning_rate loss_scale lr_decay_method lr_warmup_epoch
    lr_warmup_init map_freq max_instances_per_image mixed_precision momentum moving_average_decay num_epochs
    optimizer poly_lr_power positives_momentum regenerate_source_id resnet_depth sample_image save_freq
    second_lr_drop_epoch seg_num_classes skip_crowd_during_training skip_mismatch strategy target_size
    tflite_max_detections train_scale_max train_scale_min use_augmix use_bfloat16 use_keras_model
    var_exclude_expr var_freeze_expr verbose weight_decay
    """.split()  # noqa: SIM905 - sixty lines would hide the rest of the module
)

_IGNORED_DICTIONARIES = ("device", "label_map")

#: Hyper-parameters that make another network than this project builds, with what they may be here.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "apply_bn_for_resampling": (True,),
    "backbone_config": (None,),
    "conv_bn_relu_pattern": (False,),
    "fpn_config": (None,),
    "fpn_name": (None, "bifpn"),
    "heads": (["object_detection"], "object_detection"),
    "model_optimizations": ({}, None),
    "pooling_type": (None,),
    "separable_conv": (True,),
    "use_native_resize_op": (False,),
}


@dataclass(frozen=True)
class Hparams:
    """What hyper-parameters mean here.

    ``model``: the variant that ``name`` says, or None. ``overrides``: fields of ``EfficientDetConfig``.
    ``nms``: fields of ``NMSConfig``, on which no weight depends. ``ignored``: given, and without effect here.
    """

    model: str | None
    overrides: Mapping[str, Any]
    nms: Mapping[str, Any]
    ignored: tuple[str, ...]


def read_hparams(text: str) -> Hparams:
    """Read ``name=value,…``, or the ``.yaml`` file that ``text`` names.

    Values are Python's and ``true``, ``false``; lists stand in brackets or are split by ``*``; an image size
    is a number or ``WIDTHxHEIGHT``. Raises :class:`ConfigError` on an unknown name, a value of a wrong kind,
    and on what would be another network than this project builds.
    """
    if text.lower().endswith(_YAML_SUFFIXES) and ("=" not in text or os.path.isfile(text)):
        return _interpret(_read_yaml(Path(text)))
    return _interpret(_read_text(text))


def nms_and_size(hparams: Hparams, config: EfficientDetConfig) -> tuple[NMSConfig, tuple[int, int]]:
    """What ``--hparams`` mean for weights that are ported already: the suppression, the input's size.

    Raises :class:`ConfigError` where they ask for another network than the weights are.
    """
    if hparams.model not in (None, config.name):
        raise ConfigError(f"--hparams name the model {hparams.model}, the weights are of {config.name}")
    for name, value in hparams.overrides.items():
        if name != "image_size" and getattr(config, name) != value:
            raise ConfigError(
                f"--hparams say {name}={value}, the weights were ported with {getattr(config, name)}; leave "
                "it out, or port them again with --hparams"
            )
    return NMSConfig(**hparams.nms), hparams.overrides.get("image_size", config.image_size)


# Syntax


def _read_text(text: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in _split(text):
        if not item.strip():
            continue
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(
                f"--hparams has {_shown(item.strip())} where NAME=VALUE belongs; write "
                "num_classes=20,image_size=640x480, or name a .yaml file"
            )
        if name in values:
            raise ConfigError(f"--hparams gives {_shown(name)} twice; leave one out")
        values[name] = _parse_value(value.strip())
    return values


def _split(text: str) -> Iterator[str]:
    """The pieces of ``text`` between commas, but not those in brackets or quotes."""
    start, depth, quote = 0, 0, ""
    for position, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            yield text[start:position]
            start = position + 1
        if depth < 0:
            break
    if depth or quote:
        raise ConfigError(f"--hparams has a bracket or quote without its other half: {_shown(text[start:])}")
    yield text[start:]


def _parse_value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if "*" in text:  # AutoML's own way to write a list
        return [_parse_value(part) for part in text.split("*")]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = read_bounded(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--hparams {path} cannot be read: {reason}; check the path") from None
    values = _load_yaml(path, content)
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"--hparams {path} is not a list of NAME: VALUE lines; is it the right file?")
    return values


def _load_yaml(path: Path, content: bytes) -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            f"--hparams {path} needs PyYAML, which is not installed: pip install pyyaml"
        ) from None

    class Loader(yaml.SafeLoader):
        """Safe, and able to read the tuples that AutoML's training writes (image_size, as height, width).

        References are refused, which nothing of AutoML's has: few of them, each twice the one before, would
        stand for more values than any memory holds. So are values beyond :data:`_MOST_VALUES`.
        """

        values = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.values += 1
            if self.values > _MOST_VALUES:
                raise ConfigError(
                    f"--hparams {path} holds more than {_MOST_VALUES:,} values; is it the right file?"
                )
            if self.check_event(yaml.AliasEvent):
                event = self.peek_event()  # type: ignore[no-untyped-call]
                raise ConfigError(
                    f"--hparams {path} in line {event.start_mark.line + 1} refers to another value "
                    f"(*{event.anchor}); write it out"
                )
            return super().compose_node(parent, index)

    def construct_tuple(loader: Loader, node: Any) -> tuple[Any, ...]:
        return tuple(loader.construct_sequence(node, deep=True))

    Loader.add_constructor("tag:yaml.org,2002:python/tuple", construct_tuple)
    try:
        return yaml.load(content, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"--hparams {path} is not YAML: {where}{problem}") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, LookupError) as error:
        # PyYAML lets through what its converters meet: impossible dates, numbers, very deep nesting.
        raise ConfigError(
            f"--hparams {path} holds a value that means nothing: {_shown(str(error))}"
        ) from None


# Meaning


class _Wrong(Reason):
    """What a value must be."""


def _interpret(values: dict[str, Any]) -> Hparams:
    overrides: dict[str, Any] = {}
    nms: dict[str, Any] = {}
    ignored: list[str] = []
    model = None
    for name, value in _flatten(values):
        root = name.partition(".")[0]
        try:
            if name in _FIELDS:
                field, convert = _FIELDS[name]
                overrides[field] = convert(value)
            elif name in _NMS_FIELDS:
                nms[name.partition(".")[2]] = _NMS_FIELDS[name](value)
            elif name == "name":
                model = _one_of(*MODELS)(value)
            elif name == "scale_range":
                _boolean(value)  # what it does depends on two others
            elif root in FIXED:
                _require_fixed(name, value)
            elif name in IGNORED or root in _IGNORED_DICTIONARIES:
                ignored.append(name)
            else:
                raise ConfigError(_unknown(name))
        except _Wrong as wrong:
            raise ConfigError(f"{name} is {_shown(value)}, must be {wrong}") from None
    if values.get("scale_range"):
        overrides.update(_scaled_range(overrides))
    NMSConfig(**nms)  # refuses what no suppression can be
    return Hparams(model, overrides, nms, tuple(ignored))


def _flatten(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names as AutoML's text form writes them, ``nms_configs.method`` for one in a dictionary."""
    for name, value in values.items():
        if name == "nms_configs" and isinstance(value, dict):
            for inner, inner_value in value.items():
                yield f"{name}.{inner}", inner_value
        else:
            yield name, value


def _unknown(name: str) -> str:
    known = [*_FIELDS, *_NMS_FIELDS, *FIXED, *IGNORED, "name", "scale_range"]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "see AutoML's hparams_config.py for those there are"
    return f"{_shown(name)} is not a hyper-parameter of AutoML's EfficientDet; {hint}"


def _require_fixed(name: str, value: Any) -> None:
    allowed = FIXED.get(name, ())
    if not any(type(value) is type(standard) and value == standard for standard in allowed):
        advice = f"only {name}={allowed[0]} is supported" if allowed else "leave it out"
        raise ConfigError(
            f"{name}={_shown(value)} makes a network that this project does not build; {advice}"
        )


def _scaled_range(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """``scale_range`` maps 0…255 to [-1, 1]. AutoML uses it for AdvProp, with mean 0 and deviation 1."""
    if overrides.get("mean_rgb") != (0.0,) * 3 or overrides.get("stddev_rgb") != (1.0,) * 3:
        raise ConfigError(
            "scale_range=true goes with mean_rgb=0.0,stddev_rgb=1.0, as in AutoML's AdvProp models; give "
            "all three, or mean_rgb and stddev_rgb alone"
        )
    return {"mean_rgb": (127.5,) * 3, "stddev_rgb": (127.5,) * 3}


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else f"{value[:80]}…")
    return shown(value)


# Kinds of values

Convert = Callable[[Any], Any]


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Wrong("true or false")
    return value


def _whole(least: int, most: int) -> Convert:
    """A whole number. The upper bounds are far from any model, and near enough for a typing error to show."""

    def convert(value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _Wrong(f"a whole number from {least} to {most}")
        return value

    return convert


def _number(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9:  # no nan
        return float(value)
    raise _Wrong("a number")


def _positive(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e9:
        return float(value)
    raise _Wrong("a number above 0")


def _fraction(value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise _Wrong("a number from 0 to 1")


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
    """(height, width) in pixels. AutoML's text puts the width first, its tuple (in yaml) the height."""
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
    """Numbers, or the pairs that AutoML's first years took: factors of the anchor's width and height."""
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
    return (_fraction(value) or None) if value is not None else None  # AutoML asks only whether it is set


def _backbone(value: Any) -> BackboneConfig:
    return backbone_config(_one_of(*_BACKBONES)(value))


_BACKBONES = tuple(dict.fromkeys(model_config(name).backbone.name for name in MODELS))
_FIELDS: Mapping[str, tuple[str, Convert]] = {
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
_NMS_FIELDS: Mapping[str, Convert] = {
    "nms_configs.iou_thresh": _optional(_fraction),
    "nms_configs.max_nms_inputs": _whole(0, 10_000_000),
    "nms_configs.max_output_size": _whole(1, 10_000_000),
    "nms_configs.method": _one_of("gaussian", "hard", "linear", "diou"),
    "nms_configs.pyfunc": _boolean,
    "nms_configs.score_thresh": lambda value: 0.0 if value is None else _fraction(value),
    "nms_configs.sigma": _optional(_positive),
}
