"""A data set in TFRecords, as AutoML's and the Object Detection API's scripts write it."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

from pytorch_model.detection.labels import ClassNames
from pytorch_model.errors import Reason
from pytorch_model.evaluation.dataset import DatasetError
from pytorch_model.files import read_bounded
from pytorch_model.labels.classes import names_of_ids
from pytorch_model.labels.files import parse_names
from pytorch_model.labels.known import canonical, is_no_class
from pytorch_model.training.data.example import (
    Example,
    Survey,
    TrainingData,
    check_boxes,
    check_classes,
)
from pytorch_model.training.data.records import RecordFile
from pytorch_model.training.data.tf_example import KEYS, Values, detection_example, parse_features, texts

_MOST_MAP_BYTES = 16 << 20  # of a label map


class RecordExamples:
    """The examples of several TFRecord files, one file after the other."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [RecordFile(path) for path in files]
        self._ends = list(accumulate(map(len, self._files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        return self.read(index)[1]

    def read(self, index: int) -> tuple[Mapping[str, Values], Example, Counter[str]]:
        """(features, example, reason → boxes left out). Raises :class:`DatasetError`, with the place."""
        number = bisect_right(self._ends, index)
        file, inner = self._files[number], index - (self._ends[number - 1] if number else 0)
        place = file.place(inner)
        record = file.read(inner)
        try:
            features = parse_features(record, KEYS)
            return features, *detection_example(features, place)
        except Reason as reason:
            raise DatasetError(
                f"{place}, is not what AutoML's or the Object Detection API's scripts write: {reason}"
            ) from None


def open_records(files: Sequence[Path]) -> TrainingData:
    """The data set in TFRecord ``files``. Every record is read once: checked, counted, its classes found.

    Class ids are the records' labels. Names come from the only label map (``*.pbtxt``) beside the files, else
    from the texts of the objects. There are as many classes as the largest id of both.
    Raises :class:`DatasetError`, also if there is no record or no box at all.
    """
    examples, survey = RecordExamples(files), Survey()
    named = Counter[tuple[int, str]]()
    if not len(examples):
        raise DatasetError(f"{files[0]} holds no records; give TFRecords of a detection data set")
    for index in range(len(examples)):
        features, example, left_out = examples.read(index)
        survey.add(example, len(example.image), left_out)
        named.update(texts(features))
    source = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    check_boxes(survey.facts, source)
    stated, notes = _label_map(files[0].parent)
    largest = max((*survey.facts.per_class, *stated))
    check_classes(largest, source)
    by_text = _by_text(named)
    if stated:
        notes += _contradictions(stated, by_text)
    else:
        notes.append(f"{largest} classes: the largest label, as no label map says that there are more")
    origin = "the label map" if stated else "the records" if by_text else "nowhere"
    names = ClassNames(names_of_ids(stated or by_text, largest), origin)
    return TrainingData(source, examples, names, survey.facts, tuple(notes), survey.digest)


def _label_map(folder: Path) -> tuple[dict[int, str], list[str]]:
    """(id → name of the only label map in ``folder``, else nothing; notes)."""
    found: dict[str, dict[int, str]] = {}
    notes: list[str] = []
    for path in sorted(folder.glob("*.pbtxt")):
        try:
            names = parse_names(read_bounded(path, _MOST_MAP_BYTES))
            found[path.name] = {index: name for index, name in names.items() if index}
        except OSError as error:
            notes.append(f"{path} is not used: {error.strerror or error}")
        except Reason as reason:
            notes.append(f"{path} is not used, because it is not a label map: {reason}")
    if len(found) > 1:
        notes.append(f"{', '.join(found)} are all label maps: none is used; leave one beside the records")
    return (next(iter(found.values())) if len(found) == 1 else {}), notes


def _by_text(named: Counter[tuple[int, str]]) -> dict[int, str]:
    """Class id → the text that most of its objects have; of equally frequent ones the first in the data."""
    return {label: text for (label, text), _ in reversed(named.most_common())}


def _contradictions(stated: Mapping[int, str], by_text: Mapping[int, str]) -> list[str]:
    """A note if the objects of a class have another text than the label map's name of it."""
    differing = [
        f"{index} is {stated[index]!r}, its objects say {text!r}"
        for index, text in sorted(by_text.items())
        if index in stated and canonical(stated[index]) != canonical(text) and not is_no_class(text)
    ]
    if not differing:
        return []
    return [f"the label map contradicts the texts of {len(differing)} classes: {differing[0]}"]
