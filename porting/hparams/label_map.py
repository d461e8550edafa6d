"""AutoML's ``label_map``, formerly ``label_id_mapping``: the names of the classes.

Source: AutoML ``label_util.py``: a dictionary from id, 1 and up, to name; the name of a known data set; or a
YAML file with such a dictionary.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porting.errors import ConfigError, Reason
from pytorch_model.files import read_bounded
from pytorch_model.labels.classes import class_names
from pytorch_model.labels.files import Names, parse_names, parse_pairs
from pytorch_model.labels.known import LABEL_MAPS, is_no_class

if TYPE_CHECKING:
    from porting.hparams.meaning import Hparams

#: The names of this hyper-parameter, today's and the former one.
LABEL_MAP_NAMES = ("label_map", "label_id_mapping")

_MOST_BYTES = 1 << 20


class NotFoundReason(Reason):
    """Internal: the file or data set is not there; it may be on the machine that trained the model."""


def read_label_map(value: Any, folders: Sequence[Path]) -> Mapping[int, str] | None:
    """Id → name; None if ``value`` is empty. A file is looked for in ``folders``, in their order.

    Raises :class:`NotFoundReason` if it is in none of them, :class:`Reason` for a value that means nothing.
    """
    if value in (None, "", {}):
        return None
    if isinstance(value, dict):
        names: Mapping[int, str] = parse_pairs(value)
    elif isinstance(value, str) and value in LABEL_MAPS:
        names = LABEL_MAPS[value]
    elif isinstance(value, str):
        names = parse_names(value.encode(), ".yaml") if value.startswith("{") else _from_file(value, folders)
    else:
        raise Reason("it must be {id: name}, coco, voc, waymo, or a .yaml file")
    if not is_no_class(names.get(0, "")):
        raise Reason(f"it names class 0 ({names[0]!r}), but AutoML's classes count from 1")
    return names


def given_names(hparams: Hparams, num_classes: int) -> tuple[str, ...] | None:
    """The names of the classes in ``hparams``, as ``EfficientDetConfig.class_names``; None without a map.

    Raises :class:`ConfigError` if they are for another number of classes.
    """
    if hparams.label_map is None:
        return None
    try:
        return class_names(hparams.label_map, num_classes)
    except Reason as reason:
        raise ConfigError(f"the label_map of --hparams does not fit this model: {reason}") from None


def _from_file(name: str, folders: Iterable[Path]) -> Names:
    for path in (folder / name for folder in folders):
        if os.path.exists(path):
            try:
                return parse_names(read_bounded(path, _MOST_BYTES), path.suffix)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise Reason(f"{path} cannot be read: {reason}") from None
            except Reason as reason:
                raise Reason(f"{path} is not a label map: {reason}") from None
    raise NotFoundReason(f"there is no file of that name, and it is none of {', '.join(LABEL_MAPS)}")
