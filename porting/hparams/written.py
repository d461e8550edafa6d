"""A configuration as AutoML's hyper-parameters: the YAML file that its ``--hparams`` takes, and ours."""

from __future__ import annotations

from typing import Any

import yaml

from porting.hparams.meaning import FIELDS
from pytorch_model.config import MODELS, EfficientDetConfig, model_config

_BACKBONES = tuple(model_config(name).backbone for name in MODELS)


def hparams_yaml(config: EfficientDetConfig) -> str:
    """Every hyper-parameter of AutoML on which ``config`` depends, one ``NAME: VALUE`` a line.

    AutoML has no name for a model or a backbone that is not its own; such a line is left out. Class names
    become ``label_map``.
    """
    values: dict[str, Any] = {"name": config.name} if config.name in MODELS else {}
    for name, (field, _) in FIELDS.items():
        values[name] = _plain(getattr(config, field))
    height, width = config.image_size
    values["image_size"] = height if height == width else f"{width}x{height}"
    values["backbone_name"] = config.backbone.name
    if config.backbone not in _BACKBONES:
        del values["backbone_name"]
    if config.class_names:
        values["label_map"] = {index: name for index, name in enumerate(config.class_names, start=1) if name}
    return yaml.safe_dump(values, sort_keys=True, allow_unicode=True, default_flow_style=None, width=100)


def _plain(value: Any) -> Any:
    """Lists for tuples, which YAML's safe loaders do not know."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
