"""One side of a comparison of weights, from a file of this project or of any other program."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pytorch_model.config import EfficientDetConfig
from pytorch_model.errors import WeightsError
from pytorch_model.weights.checks import plain_tensors
from pytorch_model.weights.files import check_file, read_weights
from pytorch_model.weights.pickles import load_pth


@dataclass(frozen=True)
class ComparedWeights:
    """One side of a comparison. ``source``: its name. ``config``: None if the file has no configuration."""

    source: str
    state_dict: Mapping[str, Tensor]
    config: EfficientDetConfig | None = None


def read_weight_file(path: str | os.PathLike[str]) -> ComparedWeights:
    """Read a weight file of this project, or any ``.pth``, ``.pt`` or ``.safetensors`` of named tensors.

    A plain file may hold the tensors at its top or under ``state_dict`` or ``model``, and has no
    configuration. Code in a file is never run. Raises :class:`WeightsError`.
    """
    path = Path(path)
    check_file(path)
    try:
        state_dict, config, _ = read_weights(path)
    except WeightsError:
        plain = _read_plain(path)
        if plain is None:
            raise
        return ComparedWeights(str(path), plain)
    return ComparedWeights(str(path), state_dict, config)


def _read_plain(path: Path) -> dict[str, Tensor] | None:
    """The named tensors in a file without a configuration; None if there are none or it is damaged."""
    try:
        content = _load(path)
    except WeightsError:
        raise
    except Exception:  # both libraries raise many types; the caller has a better message
        return None
    if not isinstance(content, dict) or "config" in content:
        return None
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not content or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        return None
    return plain_tensors(content, str(path), path.stat().st_size)


def _load(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return load_pth(path)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return {**(file.metadata() or {}), "state_dict": tensors}
