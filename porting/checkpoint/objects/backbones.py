"""The released EfficientNets, recognised by the shapes of their variables."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from pytorch_model.config import MODELS, model_config
from tf_reference.variables import variable_shapes


def backbone_named(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The released EfficientNet with exactly these variables (name inside its scope → shape), or None."""
    return next((name for name, known in _known_backbones().items() if known == shapes), None)


@lru_cache(maxsize=1)
def _known_backbones() -> dict[str, dict[str, tuple[int, ...]]]:
    """Name → shapes of its variables, for every released backbone."""
    known = {}
    for model in MODELS:
        config = model_config(model)
        scope = config.backbone.name + "/"
        known[config.backbone.name] = {
            name.removeprefix(scope): shape
            for name, shape in variable_shapes(config).items()
            if name.startswith(scope)
        }
    return known
