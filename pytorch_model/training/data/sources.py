"""Opens a data set by what it is: a COCO folder, an annotation file, TFRecords."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from pytorch_model.evaluation.dataset import DatasetError
from pytorch_model.training.data.coco import open_coco
from pytorch_model.training.data.example import TrainingData
from pytorch_model.training.data.record_data import open_records
from pytorch_model.training.data.records import holds_records

_FORMS = (
    "give a folder in COCO's format (images, and annotations/instances_*.json), its annotation file, or "
    "TFRecords: a folder, a file, or a pattern such as 'train-*.tfrecord'"
)
#: Names that only TFRecords have: what else is in such a file is damage. Other files are looked into.
_RECORD_NAME = re.compile(r"\.(tfrec|tfrecords?|records?)(-[0-9]{5}-of-[0-9]{5})?(\.gz)?$", re.I)
_MAYBE_RECORD_NAME = re.compile(r"rec|-[0-9]{5}-of-[0-9]{5}", re.I)
_SHARD = re.compile(r"-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")


def open_data(
    path: str | os.PathLike[str],
    annotations: Path | None = None,
    images: Path | None = None,
    split: str = "train",
) -> TrainingData:
    """The data set at ``path``, whatever it is.

    ``path`` is a folder in COCO's format or its annotation file; or a folder with TFRecords, one such file, a
    pattern, or the name that shards have in common (``x.record`` for ``x.record-00000-of-00010``).
    ``annotations``, ``images``: those of a COCO data set, where they are not to be found. ``split``: what the
    names contain if there are several annotation files, or several kinds of TFRecords. Raises
    :class:`DatasetError`.
    """
    path = Path(path)
    if annotations is not None:
        return open_coco(path, annotations, images)
    if os.path.isdir(path):  # Path.is_dir raises on a name that is too long
        files = _files_of_split(path, split)
        jsons = any(path.glob("*.json")) or any(path.glob("annotations/*.json"))
        if files and any(path.glob("annotations/*.json")):
            raise DatasetError(
                f"{path} holds both TFRecords and COCO annotations; give the annotation file, or a "
                "pattern of TFRecords"
            )
        if files:
            return _open_shards(files)
        if jsons:
            return open_coco(path, images=images, split=split)
        raise DatasetError(f"{path} holds neither COCO annotations nor TFRecords; {_FORMS}")
    if os.path.lexists(path):
        if path.suffix.lower() == ".json":
            return open_coco(None, path, images)
        if _RECORD_NAME.search(path.name) or holds_records(path):
            return open_records([path])
        raise DatasetError(f"{path} is neither a JSON file nor TFRecords; {_FORMS}")
    found = sorted(map(Path, glob.glob(str(path)) or glob.glob(f"{glob.escape(str(path))}-?????-of-?????*")))
    if not found:
        raise DatasetError(f"there is nothing at {path}; {_FORMS}")
    return _open_shards(found)


def _open_shards(files: Sequence[Path]) -> TrainingData:
    data = open_records(files)
    return replace(data, notes=(*data.notes, *_missing_shards(files)))


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The TFRecords in ``folder``; of several kinds, those whose name contains ``split``."""
    kinds: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if _RECORD_NAME.search(file.name) or (_MAYBE_RECORD_NAME.search(file.name) and holds_records(file)):
            kinds.setdefault(_kind(file.name), []).append(file)
    of_split = [kind for kind in kinds if split in kind.lower()]
    if len(kinds) > 1 and len(of_split) == 1:
        return kinds[of_split[0]]
    if len(kinds) > 1:
        raise DatasetError(
            f"{folder} holds several kinds of TFRecords ({', '.join(list(kinds)[:4])}); give a pattern"
        )
    return next(iter(kinds.values()), [])


def _kind(name: str) -> str:
    """The same for all shards of one series."""
    return _SHARD.sub(r"-*-of-\g<count>", name)


def _missing_shards(files: Iterable[Path]) -> list[str]:
    """A note for each series of shards that is not complete."""
    series: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if match := _SHARD.search(file.name):
            series.setdefault((_kind(str(file)), int(match["count"])), set()).add(int(match["number"]))
    return [
        f"only {len(numbers)} of the {count} shards {kind} are used: the others are not here"
        for (kind, count), numbers in series.items()
        if len(numbers) < count
    ]
