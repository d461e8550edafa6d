"""The YAML form of hyper-parameters: a file of ``NAME: VALUE`` lines, as AutoML's training writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from porting.errors import ConfigError
from porting.hparams.text import in_message
from pytorch_model.files import read_bounded

_MOST_BYTES = 64 << 10  # AutoML's files have 2 kB, a label_map of LVIS's 1,203 classes has 30 kB
_MOST_VALUES = 10_000  # in a file, names included; PyYAML takes half a kilobyte for each


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
    values = _load(called, content)
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ConfigError(f"{called} is not a list of NAME: VALUE lines; is it the right file?")
    return values


class _Loader(yaml.SafeLoader):
    """Safe, and able to read the tuples that AutoML's training writes (image_size, as height, width).

    An object of AutoML's class ``Config`` is read as the mapping that it is written as; none is made.

    References are rejected. AutoML writes none, and a few of them, each twice the one before, would stand for
    more values than any memory holds. More than :data:`_MOST_VALUES` values are rejected too.
    """

    def __init__(self, called: str, content: bytes) -> None:
        super().__init__(content)
        self.called = called
        self.values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.values += 1
        if self.values > _MOST_VALUES:
            raise ConfigError(f"{self.called} holds more than {_MOST_VALUES:,} values; is it the right file?")
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise ConfigError(
                f"{self.called} in line {event.start_mark.line + 1} refers to another value "
                f"(*{event.anchor}); write it out"
            )
        return super().compose_node(parent, index)

    def construct_python_tuple(self, node: Any) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))

    def construct_config(self, class_name: str, node: Any) -> Any:
        if class_name.rpartition(".")[2] != "Config":
            return self.construct_undefined(node)  # raises
        return self.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _Loader.construct_python_tuple)
_Loader.add_multi_constructor("tag:yaml.org,2002:python/object:", _Loader.construct_config)


def _load(called: str, content: bytes) -> Any:
    try:
        return _Loader(called, content).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{called} is not YAML: {where}{problem}") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, LookupError) as error:
        # PyYAML passes on the errors of its converters: impossible dates, numbers, very deep nesting.
        raise ConfigError(f"{called} holds a value that means nothing: {in_message(str(error))}") from None
