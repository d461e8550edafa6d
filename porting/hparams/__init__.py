"""AutoML's ``--hparams``: ``num_classes=20,image_size=640x480``, or the name of a ``.yaml`` file.

``text`` and ``yaml_file`` read the two ways to write them; ``meaning`` turns names and values into fields of
our configuration. Source of the names, the defaults and the syntax: AutoML ``hparams_config.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

from porting.hparams.label_map import given_names
from porting.hparams.meaning import Hparams, interpret, nms_and_size
from porting.hparams.text import read_text

__all__ = ["Hparams", "given_names", "nms_and_size", "read_hparams"]

_YAML_SUFFIXES = (".yaml", ".yml")


def read_hparams(text: str) -> Hparams:
    """Read ``name=value,…``, or the ``.yaml`` file that ``text`` names.

    Values are Python's, and ``true`` and ``false``. Lists stand in brackets, or ``*`` separates their items.
    An image size is a number or ``WIDTHxHEIGHT``. Raises :class:`ConfigError` on an unknown name, on a value
    of the wrong kind, and on a value that asks for a network which this project does not build.
    """
    if text.lower().endswith(_YAML_SUFFIXES) and ("=" not in text or os.path.isfile(text)):
        from porting.hparams.yaml_file import read_yaml  # PyYAML is loaded only for YAML

        return interpret(read_yaml(Path(text)), folders=(Path(), Path(text).parent))
    return interpret(read_text(text), strict=True)
