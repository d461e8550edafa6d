"""YAML, read safely and within bounds: no objects of Python's, no references, a limited number of values."""

from __future__ import annotations

from typing import Any

import yaml

from pytorch_model.errors import Reason

MOST_VALUES = 10_000  # names included; PyYAML takes half a kilobyte for each


def load_yaml(content: bytes | str) -> Any:
    """The value that ``content`` holds; None if it is empty.

    The tuples that AutoML's training writes (image_size, as height, width) are read too. Raises
    :class:`Reason`, a sentence that lacks its subject: "is not YAML: line 1: …".
    """
    return _load(_Loader, content)


def load_texts(content: bytes | str) -> Any:
    """Like :func:`load_yaml`, but every scalar is the text that stands there: ``no`` and ``010`` are names.

    A mapping with a key twice raises :class:`Reason` too.
    """
    return _load(_TextLoader, content)


class _Bounded:
    """Mixed into a loader. Rejects references and more than :data:`MOST_VALUES` values.

    A few references, each twice the one before, would stand for more values than any memory holds.
    """

    values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.values += 1
        if self.values > MOST_VALUES:
            raise Reason(f"holds more than {MOST_VALUES:,} values; is it the right file?")
        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]
            event = self.peek_event()  # type: ignore[attr-defined]
            raise Reason(
                f"in line {event.start_mark.line + 1} refers to another value (*{event.anchor}); write it out"
            )
        return super().compose_node(parent, index)  # type: ignore[misc]


class _Loader(_Bounded, yaml.SafeLoader):
    def construct_python_tuple(self, node: Any) -> tuple[Any, ...]:
        return tuple(self.construct_sequence(node, deep=True))


class _TextLoader(_Bounded, yaml.BaseLoader):
    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise Reason(f"has the key {key.value[:40]!r} twice, again in line {line}")
                seen.add(key.value)
        return node


_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _Loader.construct_python_tuple)


def _load(loader: type[yaml.SafeLoader | yaml.BaseLoader], content: bytes | str) -> Any:
    try:
        return loader(content).get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise Reason(f"is not YAML: {where}{problem}") from None
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, LookupError) as error:
        # PyYAML passes on the errors of its converters: impossible dates, numbers, very deep nesting.
        raise Reason(f"holds a value that means nothing: {str(error)[:80]!r}") from None
