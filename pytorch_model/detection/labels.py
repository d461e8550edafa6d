"""The names of a model's classes: given in a file, kept with the weights, or assumed to be COCO's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytorch_model.errors import EfficientDetError, Reason
from pytorch_model.files import read_bounded
from pytorch_model.labels.classes import class_names
from pytorch_model.labels.files import FORMS, parse_names
from pytorch_model.labels.known import COCO_NAMES

#: Bytes of a label file, which may be a data set's annotations: those of COCO's train2017 have 0.5 GB.
MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class ClassNames:
    """``names``: one for each class id from 1, empty where a class has none.

    ``source`` says where they are from; ``assumed``: nothing but the number of classes says so.
    """

    names: tuple[str, ...]
    source: str
    assumed: bool = False

    @property
    def named(self) -> Mapping[int, str]:
        """Class id → name, of the classes that have one."""
        return {index: name for index, name in enumerate(self.names, start=1) if name}

    @property
    def shown(self) -> Mapping[int, str]:
        """Class id → name; a class without a name is called ``class ID``."""
        return {index: name or f"class {index}" for index, name in enumerate(self.names, start=1)}


def find_names(
    path: Path | None, num_classes: int, own: Sequence[str] | None = None, given: Sequence[str] | None = None
) -> ClassNames:
    """The names in the file at ``path``, else those ``given`` with ``--hparams``, else the model's ``own``.

    Else a model of 90 classes is assumed to have COCO's, and the classes of another have none. Raises
    :class:`EfficientDetError` if the file cannot be read, has an unknown form, or does not fit.
    """
    if path is not None:
        return ClassNames(read_names(path, num_classes), path.name)
    if given is not None:
        return ClassNames(tuple(given), "the label_map of --hparams")
    if own is not None:
        return ClassNames(tuple(own), "kept with the weights")
    if num_classes == len(COCO_NAMES):
        return ClassNames(COCO_NAMES, "COCO's, assumed for 90 classes", assumed=True)
    return ClassNames(("",) * num_classes, "not known")


def read_names(path: Path, num_classes: int) -> tuple[str, ...]:
    """The names of a model's classes from a label file of any form, as :attr:`ClassNames.names`.

    See :mod:`pytorch_model.labels.files` for the forms, and :func:`class_names` for which class a name
    belongs to. Raises :class:`EfficientDetError`.
    """
    try:
        content = read_bounded(path, MOST_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise EfficientDetError(
            f"--labels {path} cannot be read: {reason}; give a file of class names"
        ) from None
    try:
        names = parse_names(content, path.suffix)
    except Reason as reason:
        raise EfficientDetError(f"--labels {path} is not a label file: {reason}; {FORMS}") from None
    try:
        return class_names(names, num_classes)
    except Reason as reason:
        raise EfficientDetError(f"--labels {path} does not fit this model: {reason}") from None
