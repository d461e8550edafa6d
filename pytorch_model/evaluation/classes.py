"""Which category of a data set each class of a model stands for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pytorch_model.detection.labels import given_names
from pytorch_model.evaluation.dataset import Dataset, DatasetError


def class_to_category(dataset: Dataset, num_classes: int, labels: Path | None) -> dict[int, int]:
    """The category id that each of the model's class ids, from 1, stands for; some may stand for none.

    Without ``labels`` a class id is the category id: COCO's 90-id space, and custom data sets whose ids run
    from 1. With ``labels``, the names of the model's classes, classes and categories of one name go together.
    Raises :class:`DatasetError` where a category has no class, or another class has its id, or two
    categories to be told apart by name have the same.
    """
    names = given_names(labels, num_classes)
    categories, file = dataset.categories, dataset.annotations.name
    if labels is not None:
        twice = [name for name, count in Counter(categories.values()).items() if count > 1]
        if twice:
            raise DatasetError(
                f"{file} has two categories {twice[0]!r}, so names do not tell which is meant; rename one"
            )
        by_name = {name: index for index, name in names.items()}
        missing = [name for name in categories.values() if name not in by_name]
        if missing or len(by_name) < len(names):
            what = f"does not name {missing[0]!r}" if missing else "names two classes alike"
            raise DatasetError(f"--labels {labels} {what}; have it name each category of {file}, once")
        return {by_name[name]: category for category, name in categories.items()}
    outside = [category for category in categories if not 1 <= category <= num_classes]
    if outside:
        raise DatasetError(
            f"{file} has category id {outside[0]} ({categories[outside[0]]}), but the model has classes 1 to "
            f"{num_classes}; if its classes go by name, give them with --labels"
        )
    for category, name in categories.items():
        if names and names.get(category) != name:
            raise DatasetError(
                f"category {category} of {file} is {name!r}, but class {category} of a model with "
                f"{num_classes} classes is COCO's {names.get(category, 'nothing')!r}; give the names of the "
                "model's classes with --labels"
            )
    return {category: category for category in categories}
