"""Which category of a data set each class of a model stands for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pytorch_model.detection.labels import given_names
from pytorch_model.evaluation.dataset import Dataset, DatasetError


def class_to_category(dataset: Dataset, num_classes: int, labels: Path | None) -> dict[int, int]:
    """The model's class id, from 1, → the category id; some classes may have none.

    Without ``labels`` a class id is the category id: COCO's 90 ids, and custom data sets with ids from 1.
    With ``labels``, a file with the names of the model's classes, a class stands for the category of the same
    name. Raises :class:`DatasetError` if a category has no class, if the class with its id has another name,
    or if names are needed and two categories have the same one.
    """
    names = given_names(labels, num_classes)
    categories, file = dataset.categories, dataset.annotations.name
    if labels is not None:
        twice = [name for name, count in Counter(categories.values()).items() if count > 1]
        if twice:
            raise DatasetError(
                f"{file} has two categories {twice[0]!r}, so names cannot match them to classes; rename one"
            )
        by_name = {name: index for index, name in names.items()}
        missing = [name for name in categories.values() if name not in by_name]
        if missing or len(by_name) < len(names):
            problem = f"does not name {missing[0]!r}" if missing else "gives two classes the same name"
            raise DatasetError(f"--labels {labels} {problem}; it must name each category of {file} once")
        return {by_name[name]: category for category, name in categories.items()}
    outside = [category for category in categories if not 1 <= category <= num_classes]
    if outside:
        raise DatasetError(
            f"{file} has category id {outside[0]} ({categories[outside[0]]}), but the model has classes 1 to "
            f"{num_classes}; if classes should be matched by name, give --labels"
        )
    for category, name in categories.items():
        if names and names.get(category) != name:
            raise DatasetError(
                f"category {category} of {file} is {name!r}, but class {category} of a model with "
                f"{num_classes} classes is COCO's {names.get(category, 'nothing')!r}; give the names of the "
                "model's classes with --labels"
            )
    return {category: category for category in categories}
