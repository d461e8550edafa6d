"""Class names in a TFLite file: ``labelmap.txt``, in the zip that metadata append to the FlatBuffer.

Source: TensorFlow Lite metadata, "associated files". The line number, from 0, is the class index.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import PurePosixPath

from porting.errors import Reason
from pytorch_model.labels.classes import class_names
from pytorch_model.labels.files import parse_names

_USUAL = "labelmap.txt"
_MOST_BYTES = 1 << 20  # of the list; LVIS's 1,203 names have 20 kB
_MOST_FILES = 64  # in the zip; a model has one or two
_TAIL = 1 << 24  # the zip is at the end of the file


def read_class_names(data: bytes, num_classes: int) -> tuple[tuple[str, ...] | None, str | None]:
    """(one name per class id from 1 or None, a sentence for the user or None) from a TFLite file's bytes."""
    if b"PK\5\6" not in data[-(1 << 16) :]:
        return None, None
    try:
        found = _read_list(data)
        if found is None:
            return None, None
        name, content = found
        names = class_names(parse_names(content), num_classes)
    except Reason as reason:
        return None, f"the class names in the file's metadata are not used: {reason}"
    return names, f"class names are those of {name} in the file's metadata"


def _read_list(data: bytes) -> tuple[str, bytes] | None:
    """(name, content) of the list of classes; None without one. Raises :class:`Reason`."""
    try:
        with zipfile.ZipFile(io.BytesIO(data[-_TAIL:])) as archive:
            entries = archive.infolist()
            if len(entries) > _MOST_FILES:
                raise Reason(f"it holds {len(entries)} files")
            texts = [entry for entry in entries if PurePosixPath(entry.filename).suffix == ".txt"]
            usual = [entry for entry in texts if PurePosixPath(entry.filename).name == _USUAL]
            chosen = usual or texts
            if not chosen:
                return None
            if len(chosen) > 1:
                raise Reason(f"{len(chosen)} files could be the list")
            with archive.open(chosen[0]) as file:
                content = file.read(_MOST_BYTES + 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, RuntimeError, ValueError):
        raise Reason("they cannot be unpacked") from None
    if len(content) > _MOST_BYTES:
        raise Reason(f"the list has more than {_MOST_BYTES:,} bytes")
    return PurePosixPath(chosen[0].filename).name[:100], content
