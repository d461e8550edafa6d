"""The label map that a ``pipeline.config`` names: the names of the model's classes.

Source: TensorFlow Models ``research/object_detection``: ``protos/input_reader.proto``,
``utils/label_map_util.py`` (ids count from 1; 0 is the background).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from porting.checkpoint.objects.pipeline_config import Pipeline
from porting.errors import Reason
from pytorch_model.config import shown
from pytorch_model.files import read_bounded
from pytorch_model.labels.classes import class_names
from pytorch_model.labels.files import parse_names
from pytorch_model.labels.known import is_no_class

#: Where a label map is looked for: in these folders of the pipeline's own folder, and nowhere else. The paths
#: in a pipeline are those of the machine that trained the model; only their last part is used.
FOLDERS = ("", "annotations", "data")

_MOST_BYTES = 1 << 20  # LVIS's 1,203 classes have 100 kB


def find_class_names(pipeline: Pipeline) -> tuple[tuple[str, ...] | None, str | None]:
    """(one name for each class id from 1, a sentence about where from), None for what there is not.

    A label map that cannot be used is no error, because no weight depends on it: the sentence says why.
    """
    if not pipeline.label_maps:
        return None, None
    names = [re.split(r"[/\\]", path)[-1] for path in pipeline.label_maps]
    folder = pipeline.path.parent
    for place in (folder / inner / name for name in names if name for inner in FOLDERS):
        if os.path.isfile(place):
            try:
                return _read(place, pipeline.num_classes), f"class names are from {place}"
            except Reason as reason:
                return None, f"the class names in {place} are not used: {reason}"
    return None, (
        f"{pipeline.path} names the label map {shown(names[0])}, which is not beside it; put it there, or "
        "give --labels, for the names of the classes"
    )


def _read(path: Path, num_classes: int) -> tuple[str, ...]:
    try:
        names = parse_names(read_bounded(path, _MOST_BYTES), path.suffix)
    except OSError as error:
        raise Reason(f"it cannot be read: {error.strerror or error}") from None
    if not is_no_class(names.get(0, "")):
        raise Reason(f"it names class 0 ({names[0]!r}), but the API's classes count from 1")
    return class_names(names, num_classes)
