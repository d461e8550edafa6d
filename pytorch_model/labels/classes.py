"""Which class of a model each name of a label file belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pytorch_model.errors import Reason
from pytorch_model.labels.files import Names
from pytorch_model.labels.known import COCO_NAMES, canonical, is_coco_80, is_hole, is_no_class


def class_names(names: Mapping[int, str], num_classes: int) -> tuple[str, ...]:
    """One name for each class id from 1, empty where it has none, as ``EfficientDetConfig.class_names``.

    ``names``: id → name, what :func:`pytorch_model.labels.files.parse_names` returns. A list must have as
    many entries as the model has classes, after entries for no class (``background``, ``???``) at its start.
    Ids count from 1; an entry for no class with the id 0 is left out. Ids from 0 to ``num_classes`` - 1 count
    from 0. COCO's 80 names in COCO's order, listed or numbered without gaps, are those of COCO's ids on a
    model of 90 classes. Raises :class:`Reason` otherwise.
    """
    if isinstance(names, Names) and names.listed:
        found = _of_list(list(names.values()), num_classes)
    else:
        found = _of_ids(names, num_classes)
    named = (found.get(index, "") for index in range(1, num_classes + 1))
    return tuple("" if is_hole(name) else name for name in named)


def _of_list(names: Sequence[str], num_classes: int) -> dict[int, str]:
    most = least = len(names)
    while least and not names[least - 1]:  # empty lines at the end may stand for classes without a name
        least -= 1
    start = 0  # the number of entries for no class; an empty line is a class without a name
    while start < least and names[start] and is_no_class(names[start]):
        start += 1
    if num_classes == len(COCO_NAMES) and is_coco_80(names[start:least]):
        return _coco_ids(names[start:least])
    if least - start <= num_classes <= most - start:
        return dict(enumerate(names[start:], start=1))
    if start and least - start < num_classes <= most:
        raise Reason(
            f"it lists {least} names for {num_classes} classes, but the first is {names[0]!r}, so it may "
            "count from class 0 or from class 1; write lines `id: name`"
        )
    counted = f"{least - start} names" + (f" after {names[0]!r}" if start else "")
    raise Reason(
        f"it lists {counted}, but the model has {num_classes} classes; list one for each, or write lines "
        "`id: name` for some"
    )


def _of_ids(names: Mapping[int, str], num_classes: int) -> dict[int, str]:
    found = dict(sorted(names.items()))
    from_zero = range(num_classes)
    unused = names.unused if isinstance(names, Names) else frozenset()
    if is_no_class(found.get(0, "")):
        found.pop(0, None)
    elif 0 in unused and list(found) == list(from_zero):
        raise Reason(
            f"no annotation has its category 0 ({found[0]!r}), so its ids may be those of the classes or "
            "count them from 0; write lines `id: name`"
        )
    for index in unused:
        if not 1 <= index <= num_classes:
            found.pop(index, None)
    if num_classes == len(COCO_NAMES):
        ids = list(found)
        if ids in (list(range(80)), list(range(1, 81))) and is_coco_80(found.values()):
            return _coco_ids(list(found.values()))
        if _are_cocos_from_zero(found):
            return {index + 1: name for index, name in found.items()}
    least, most = min(found, default=1), max(found, default=1)
    if least == 0 and most == from_zero[-1]:
        return {index + 1: name for index, name in found.items()}
    if least == 0:
        raise Reason(
            f"its ids are 0 ({found[0]!r}) to {most}, but the model has classes 1 to {num_classes}, or 0 to "
            f"{num_classes - 1} if counted from 0"
        )
    if most > num_classes:
        raise Reason(f"it names class {most}, but the model has classes 1 to {num_classes}")
    return found


def _coco_ids(names: Sequence[str]) -> dict[int, str]:
    ids = (index for index, name in enumerate(COCO_NAMES, start=1) if name)
    return dict(zip(ids, names, strict=True))


def _are_cocos_from_zero(names: Mapping[int, str]) -> bool:
    """Whether the names are COCO's, each for the class one above its id."""
    named = {index: name for index, name in names.items() if not is_hole(name)}
    return bool(named) and all(
        index < len(COCO_NAMES) and canonical(name) == canonical(COCO_NAMES[index])
        for index, name in named.items()
    )
