"""Which category of a data set each class of a model stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from pytorch_model.detection.labels import ClassNames, find_names
from pytorch_model.evaluation.dataset import Dataset, DatasetError
from pytorch_model.labels.known import canonical


def class_to_category(
    dataset: Dataset, num_classes: int, labels: Path | None, own: Sequence[str] | None = None
) -> dict[int, int]:
    """The model's class id, from 1, → the category id; some classes may have none.

    With ``labels``, a file with the names of the model's classes, a class stands for the category of the same
    name. Without it a class id is the category id: COCO's 90 ids, and custom data sets with ids from 1; if
    that contradicts the names that the model has of its ``own``, names decide. A category without annotations
    that has no class is left out. Raises :class:`DatasetError` if a category with annotations has no class,
    if the class with its id has another name, or if names are needed and two categories have the same one.
    """
    names = find_names(labels, num_classes, own)
    if labels is not None:
        return _by_name(dataset, names, f"--labels {labels}")
    fitting = [id_ for id_ in dataset.categories if 1 <= id_ <= num_classes or id_ in dataset.used_categories]
    problem = _misfit(dataset, fitting, names)
    if problem is None:
        return {category: category for category in fitting}
    if own is None:
        raise problem
    return _by_name(dataset, names, "the label map of the model")


def left_out(dataset: Dataset, categories: Mapping[int, int]) -> list[str]:
    """A note for each category of ``dataset`` that no class stands for: ``categories`` class → category."""
    return [
        f"category {id_} ({name}) has no annotations and no class: left out"
        for id_, name in dataset.categories.items()
        if id_ not in categories.values()
    ]


def _misfit(dataset: Dataset, categories: Sequence[int], names: ClassNames) -> DatasetError | None:
    """Why the ids of ``categories`` are not those of the classes; None if they are."""
    num_classes, file = len(names.names), dataset.annotations.name
    outside = [category for category in categories if not 1 <= category <= num_classes]
    if outside:
        return DatasetError(
            f"{file} has category id {outside[0]} ({dataset.categories[outside[0]]}), but the model has "
            f"classes 1 to {num_classes}; if classes should be matched by name, give --labels"
        )
    for category in categories:
        name, expected = dataset.categories[category], names.names[category - 1]
        if canonical(name) != canonical(expected) and (expected or names.assumed):
            return DatasetError(
                f"category {category} of {file} is {name!r}, but class {category} of a model with "
                f"{num_classes} classes is COCO's {expected or 'nothing'!r}; give the names of the model's "
                "classes with --labels"
            )
    return None


def _by_name(dataset: Dataset, names: ClassNames, source: str) -> dict[int, int]:
    """``source``: what gives the names, for errors."""
    file = dataset.annotations.name
    used = {id_: name for id_, name in dataset.categories.items() if id_ in dataset.used_categories}
    twice = [name for name, count in Counter(used.values()).items() if count > 1]
    if twice:
        raise DatasetError(
            f"{file} has two categories {twice[0]!r}, so names cannot match them to classes; rename one"
        )
    key = _spelling(used.values(), names)
    class_of = {key(name): index for index, name in names.named.items()}
    missing = [name for name in used.values() if key(name) not in class_of]
    if missing or len(class_of) < len(names.named):
        problem = f"does not name {missing[0]!r}" if missing else "gives two classes the same name"
        raise DatasetError(f"{source} {problem}; it must name each category of {file} once")
    unused = {id_: name for id_, name in dataset.categories.items() if id_ not in used}
    found = {class_of[key(name)]: id_ for id_, name in unused.items() if key(name) in class_of}
    return found | {class_of[key(name)]: id_ for id_, name in used.items()}


def _spelling(categories: Collection[str], names: ClassNames) -> Callable[[str], str]:
    """How names are compared: as they are, or if some then have no class, without regard to spelling.

    The latter only where it keeps all names apart.
    """
    named = names.named.values()
    exact = set(categories) <= set(named)
    apart = all(len(set(map(canonical, some))) == len(some) for some in (categories, named))
    return canonical if apart and not exact else str
