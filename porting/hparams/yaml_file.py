"""The YAML form of hyper-parameters: a file of ``NAME: VALUE`` lines, as AutoML's training writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from porting.errors import ConfigError, Reason
from pytorch_model.files import read_bounded
from pytorch_model.formats.safe_yaml import load_yaml

_MOST_BYTES = 64 << 10  # AutoML's files have 2 kB, a label_map of LVIS's 1,203 classes has 30 kB


def read_yaml(path: Path, called: str = "") -> dict[str, Any]:
    """Name → value. ``called``: the file in messages, by default ``--hparams`` and its path.

    Raises :class:`ConfigError` if the file cannot be read or is not of this form.
    """
    called = called or f"--hparams {path}"
    try:
        content = read_bounded(path, _MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{called} cannot be read: {reason}; check the path") from None
    try:
        values = load_yaml(content)
    except Reason as reason:
        raise ConfigError(f"{called} {reason}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"{called} is not a list of NAME: VALUE lines; is it the right file?")
    return values
