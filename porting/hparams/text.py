"""The text form of hyper-parameters: ``NAME=VALUE,…``."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator
from typing import Any

from porting.errors import ConfigError
from pytorch_model.config import shown


def read_text(text: str) -> dict[str, Any]:
    """Name → value. Raises :class:`ConfigError` if ``text`` is not of this form."""
    values: dict[str, Any] = {}
    for item in _split(text):
        if not item.strip():
            continue
        name, equals, value = item.partition("=")
        name = name.strip()
        if not equals or not name:
            raise ConfigError(
                f"--hparams has {in_message(item.strip())} where NAME=VALUE belongs; write "
                "num_classes=20,image_size=640x480, or name a .yaml file"
            )
        if name in values:
            raise ConfigError(f"--hparams gives {in_message(name)} twice; leave one out")
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
        raise ConfigError(
            f"--hparams has a bracket or quote without its other half: {in_message(text[start:])}"
        )
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


def in_message(value: Any) -> str:
    """``value`` as an error message shows it, cut if it is long."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else f"{value[:80]}…")
    return shown(value)
