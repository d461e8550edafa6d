"""Infer the configuration of a checkpoint from the names and shapes of its variables.

Fields that determine a variable are read from the variables. Fields that leave no trace in them (image size,
anchor scale, activation, normalisation, strides) are taken from the nearest released variant and listed as
assumed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from porting.checkpoint import Checkpoint
from porting.errors import ConfigError, ConversionError
from porting.hparams import UNSEEN
from porting.structure import Shapes, Structure, model_variables
from pytorch_model.config import MODELS, BackboneConfig, EfficientDetConfig, model_config
from tf_reference.variables import variable_shapes

#: Fusion methods with the same variables: they cannot be told apart by the weights.
INDISTINGUISHABLE = ({"fastattn", "attn"}, {"channel_fastattn", "channel_attn"})

#: Fields that the variables show; fpn_weight_method only in part (:data:`INDISTINGUISHABLE`).
_STRUCTURE = frozenset(
    """
    backbone box_class_repeats conv_bn_act_pattern fpn_cell_repeats fpn_num_filters fpn_weight_method
    max_level min_level num_classes
    """.split()  # noqa: SIM905
)

ADVPROP = {"mean_rgb": (127.5, 127.5, 127.5), "stddev_rgb": (127.5, 127.5, 127.5)}


@dataclass(frozen=True)
class Inference:
    """An inferred configuration.

    ``variant``: the released model with these variables, or None. ``assumed``: one line for each field that
    neither the weights nor anyone else states. ``unseen``: those fields among them that decide what the
    network computes (:data:`porting.hparams.UNSEEN`). Our own reference takes them from ``config`` too, so a
    comparison with it does not see them.
    """

    config: EfficientDetConfig
    variant: str | None
    assumed: tuple[str, ...]
    unseen: tuple[str, ...] = ()

    def confirmed(self) -> Inference:
        """After a comparison with the original graph: the function is known."""
        lines = set(setting_lines(self.config, self.unseen))
        return replace(self, assumed=tuple(line for line in self.assumed if line not in lines), unseen=())


def configure(
    checkpoint: Checkpoint, overrides: Mapping[str, Any] | None = None, model: str | None = None, by: str = ""
) -> Inference:
    """The configuration of ``checkpoint``, with all that it states besides its variables.

    ``overrides``: as in :func:`infer_config`. ``model``: the variant that the user names, ``by`` which means
    (``--model``); None: it is inferred. Raises as :func:`infer_config` and :func:`named_config`.
    """
    stated = checkpoint.settings, checkpoint.stated_by
    if model is None:
        return infer_config(checkpoint.shapes, checkpoint.source, overrides, *stated)
    return named_config(model, checkpoint.shapes, overrides, checkpoint.source, *stated, by=by)


def infer_config(
    shapes: Shapes,
    source: str = "",
    overrides: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    stated_by: Mapping[str, str] | None = None,
) -> Inference:
    """The configuration whose variables have these names and ``shapes``.

    ``shapes`` may include moving averages and optimizer slots. ``source`` is the checkpoint's path: its name
    may distinguish models with the same variables (d6 and d7, AdvProp or not, a 640-pixel d2). ``overrides``
    are fields given by the user, ``settings`` are fields stated by the checkpoint besides its variables
    (:attr:`Checkpoint.settings`, with :attr:`Checkpoint.stated_by`). The user's fields win; neither kind is
    listed as assumed. Raises :class:`ConversionError` if this is not an EfficientDet, is one that this
    project does not build, or is one that the fields contradict.
    """
    given, endpoints, named = _given(overrides, settings)
    overrides = dict(overrides or {})
    model = model_variables(shapes)
    found = Structure(model).read()
    if endpoints:
        found["backbone"] = found["backbone"].ending_at(endpoints)
        if "backbone" in given:
            given["backbone"] = given["backbone"].ending_at(endpoints)
    stated_by = stated_by or {}
    for key, value in given.items():
        if key in found and not _fits(key, value, found):
            witness = None if key in overrides else stated_by.get(key, source)
            raise ConversionError(_contradiction(key, value, found, source, witness))
    base, variant, notes = _nearest_variant(found, source, named)
    if named and base.name != named:
        _check_named(named, found, given, source, stated_by.get("model", source))
    hints = _hints(variant, source, notes)
    anchors = found.pop("num_anchors")
    fields: dict[str, Any] = {**found, **hints, **given}
    config = base.replace(name=variant or "custom", **fields)
    _check_anchors(config, anchors, stated_by)
    return _inference(config, variant, notes, given)


def _inference(
    config: EfficientDetConfig, variant: str | None, notes: list[str], given: Mapping[str, Any]
) -> Inference:
    lines = _setting_lines(config)
    unseen = tuple(name for name in UNSEEN if name in lines and name not in given)
    assumed = (line for name, line in lines.items() if name not in given)
    return Inference(config, variant, (*notes, *assumed), unseen)


def _given(
    overrides: Mapping[str, Any] | None, settings: Mapping[str, Any] | None
) -> tuple[dict[str, Any], tuple[int, int, int] | None, str | None]:
    """The fields that are given; the backbone's endpoints and the variant's name if they are among them."""
    given = {**(settings or {}), **(overrides or {})}
    return given, given.pop("endpoints", None), given.pop("model", None)


def _fits(key: str, value: Any, found: Mapping[str, Any]) -> bool:
    return bool(found[key] == value) or {found[key], value} in INDISTINGUISHABLE


def _contradiction(key: str, value: Any, found: Mapping[str, Any], source: str, witness: str | None) -> str:
    """``witness``: the file that states ``value``; None if the user does."""
    variables = f"the variables in {source or 'the checkpoint'} say {_field_text(found[key])}"
    if witness is None:
        return f"{key} was given as {_field_text(value)}, but {variables}; leave it out"
    return (
        f"{witness} says {key} is {_field_text(value)}, but {variables}; it is of another model, so "
        "move it away"
    )


def _check_named(
    named: str, found: Mapping[str, Any], given: Mapping[str, Any], source: str, witness: str
) -> None:
    """A variant that is named beside the checkpoint has its own fields, except those stated there too.

    Raises :class:`ConversionError` if the variables say something else.
    """
    config = model_config(named)
    for key in found.keys() - given.keys() - {"num_anchors", "num_classes"}:
        if not _fits(key, getattr(config, key), found):
            raise ConversionError(
                f"{witness} says the model is {named}, whose {key} is "
                f"{_field_text(getattr(config, key))}, but the variables in {source or 'the checkpoint'} "
                f"say {_field_text(found[key])}; it is of another model, so move it away"
            )


def _check_anchors(config: EfficientDetConfig, anchors: int, stated_by: Mapping[str, str] | None) -> None:
    if config.num_anchors != anchors:
        witnesses = dict.fromkeys((stated_by or {}).get(name) for name in ("num_scales", "aspect_ratios"))
        by = " and ".join(witness for witness in witnesses if witness)
        raise ConversionError(
            f"the box net predicts {anchors} anchors per location, but num_scales={config.num_scales} and "
            f"{len(config.aspect_ratios)} aspect_ratios{f', stated by {by},' if by else ''} make "
            f"{config.num_anchors}; give --hparams num_scales=…,aspect_ratios=…*…*…"
        )


def setting_lines(config: EfficientDetConfig, fields: Iterable[str]) -> tuple[str, ...]:
    """What ``config`` says of ``fields``, in words: ``activation swish``."""
    lines = _setting_lines(config)
    return tuple(lines[name] for name in fields if name in lines)


def _setting_lines(config: EfficientDetConfig) -> dict[str, str]:
    """Field → a line about it, for each field that variables do not show."""
    ratios = ", ".join(_number_or_numbers(ratio) for ratio in config.aspect_ratios)
    lines = {
        "image_size": f"image size {config.image_size[0]}×{config.image_size[1]}",
        "anchor_scale": f"anchor scale {_number_or_numbers(config.anchor_scale)}",
        "num_scales": f"{config.num_scales} scales of aspect ratios {ratios}",
        "act_type": f"activation {config.act_type}",
        "survival_prob": f"{'a' if config.survival_prob else 'no'} residual in the heads",
        "conv_after_downsample": (
            f"pooling {'before' if config.conv_after_downsample else 'after'} resampling convolutions"
        ),
        "mean_rgb": f"mean {_triple(config.mean_rgb)}",
        "stddev_rgb": f"standard deviation {_triple(config.stddev_rgb)}",
    }
    if config.fpn_weight_method != "sum":  # without fusion weights, the method is known
        lines["fpn_weight_method"] = f"fusion {config.fpn_weight_method}"
    return lines


def _number_or_numbers(value: float | tuple[float, ...]) -> str:
    return "×".join(f"{n:g}" for n in value) if isinstance(value, tuple) else f"{value:g}"


def _field_text(value: Any) -> str:
    """A field's value as a message shows it."""
    return value.name if isinstance(value, BackboneConfig) else repr(value)


def _triple(values: tuple[float, float, float]) -> str:
    return "/".join(f"{v:.5g}" for v in values)


def _hints(variant: str | None, source: str, notes: list[str]) -> dict[str, Any]:
    """Fields stated by a release's file name and not by its weights; noted, because a name may be wrong."""
    hints: dict[str, Any] = {}
    if not variant:
        return hints
    if re.search(
        rf"(?<![a-z0-9]){re.escape(variant)}-advprop(?![a-z0-9])|/advprop/{re.escape(variant)}/",
        _tail(source),
    ):
        hints.update(ADVPROP)
        notes.append("AdvProp input range [-1, 1], from the name")
    size = re.search(rf"(?<![a-z0-9]){re.escape(variant)}-640(?![0-9])", _tail(source))
    if size:
        hints["image_size"] = (640, 640)
        notes.append("image size from the name")
    return hints


def _tail(source: str) -> str:
    """The last three parts of a path, which name a checkpoint: ``/advprop/efficientdet-d0/model``."""
    return "/" + "/".join(source.replace("\\", "/").split("/")[-3:]).lower().replace("_", "-")


def _nearest_variant(
    found: dict[str, Any], source: str, stated: str | None
) -> tuple[EfficientDetConfig, str | None, list[str]]:
    """The released model with this structure, or the nearest one: (configuration, name or None, notes).

    The numbers of classes and anchors may differ. ``stated``: the variant stated beside the checkpoint.
    """
    free = {"num_anchors", "num_classes"}
    structure = {key: value for key, value in found.items() if key not in free}
    matches = [
        name
        for name in MODELS
        if all(getattr(model_config(name), key) == value for key, value in structure.items())
    ]
    if stated in matches:
        return model_config(stated), stated, []
    if matches:
        named = _named_in(source, matches)
        name = named or matches[0]
        notes = []
        if len(matches) > 1:
            others = " and ".join(m for m in matches if m != name)
            why = "from the name" if named else "--model chooses"
            notes = [f"{name}, not {others}, which has the same variables ({why})"]
        return model_config(name), name, notes
    backbone = found["backbone"].name
    same_backbone = [name for name in MODELS if model_config(name).backbone.name == backbone]
    lite = "lite" in backbone
    name = stated or next(iter(same_backbone), "efficientdet-lite0" if lite else "efficientdet-d0")
    return (
        model_config(name),
        None,
        [f"no released variant has these variables; what nobody states is as in {name}"],
    )


def _named_in(source: str, names: list[str]) -> str | None:
    """The one of ``names`` that the end of ``source`` contains; None if there is none or more than one."""
    found = [
        name for name in names if re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", _tail(source))
    ]
    short = [
        name
        for name in names
        if re.search(rf"(?<![a-z0-9]){name.rsplit('-', 1)[-1]}(?![a-z0-9])", _tail(source))
    ]
    return found[0] if len(found) == 1 and set(short) <= set(found) else None


def named_config(
    name: str,
    shapes: Shapes,
    overrides: Mapping[str, Any] | None = None,
    source: str = "",
    settings: Mapping[str, Any] | None = None,
    stated_by: Mapping[str, str] | None = None,
    by: str = "--model",
) -> Inference:
    """The configuration of the variant ``name``, checked against the variables.

    The number of classes comes from the variables unless ``overrides`` give it. ``source``, ``settings`` and
    ``stated_by`` are as in :func:`infer_config`; ``name``, which the user gave ``by`` these means, outranks
    what they say of the network's structure. Raises :class:`ConversionError` if the variables belong to a
    different model, and names that model if it is known; or if ``settings`` name a different one.
    """
    overrides, settings = dict(overrides or {}), dict(settings or {})
    stated = settings.pop("model", name)
    if stated != name and by == "--model":
        witness = (stated_by or {}).get("model", source)
        raise ConversionError(f"--model says {name}, but {witness} says {stated}; leave out --model")
    config = model_config(name)
    structure = {
        key: settings.pop(key)
        for key in _STRUCTURE & settings.keys()
        if key != "fpn_weight_method" or not _fits(key, settings[key], {key: config.fpn_weight_method})
    }
    given, endpoints, _ = _given(overrides, settings)
    notes: list[str] = []
    config = config.replace(**{**_hints(config.name, source, notes), **given})
    variant: str | None = config.name
    backbone = config.backbone.ending_at(endpoints) if endpoints else config.backbone
    if backbone != config.backbone:
        variant, config = None, config.replace(name="custom", backbone=backbone)
    model = model_variables(shapes)
    Structure(model).reject_unsupported_models()
    anchors = math.prod(model.get("box_net/box-predict/bias", (0,))) // 4
    classes = math.prod(model.get("class_net/class-predict/bias", (0,)))
    if anchors and classes % anchors == 0 and classes:
        _check_anchors(config, anchors, stated_by)
        if "num_classes" not in given:
            config = config.replace(num_classes=classes // anchors)
    expected = variable_shapes(config)
    wrong = next((key for key, shape in expected.items() if model.get(key) != shape), None)
    if wrong is not None or model.keys() - expected.keys():
        raise ConversionError(_explain_mismatch(config, model, wrong, overrides, source, by))
    for key, value in structure.items():
        shown = {key: getattr(config, key)}
        if key not in overrides and not _fits(key, value, shown):
            raise ConversionError(
                _contradiction(key, value, shown, source, (stated_by or {}).get(key, source))
            )
    return _inference(config, variant, notes, given)


def _explain_mismatch(
    config: EfficientDetConfig,
    model: Shapes,
    wrong: str | None,
    overrides: Mapping[str, Any],
    source: str,
    by: str,
) -> str:
    if wrong is None:
        extra = min(model.keys() - variable_shapes(config).keys())
        what = f"the checkpoint has {extra}, which {config.name} does not"
    elif wrong not in model:
        what = f"{config.name} needs {wrong}, which the checkpoint lacks"
    else:
        needed = list(variable_shapes(config)[wrong])
        what = f"{wrong} has shape {list(model[wrong])}, {config.name} needs {needed}"
    try:
        found, likely = Structure(model).read(), infer_config(model).config.name
    except (ConfigError, ConversionError):
        return f"{what}; leave out {by} to have it inferred"
    for key, value in overrides.items():
        if likely == config.name and key in found and not _fits(key, value, found):
            return _contradiction(key, value, found, source, None)
    hint = (
        f"leave out {by}"
        if likely in ("custom", config.name)
        else f"these are the variables of {likely}: give --model {likely}"
        + ("" if by == "--model" else f" instead of {by}")
    )
    return f"{what}; {hint}"
