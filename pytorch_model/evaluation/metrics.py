"""``metrics.json``: the result of an evaluation, written, read and checked in one place."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytorch_model.detection.results import ImageId
from pytorch_model.errors import EfficientDetError, Reason
from pytorch_model.evaluation.figures import FIGURES
from pytorch_model.files import parse_json, read_bounded

#: Bytes of a metrics.json, which names every image that was skipped.
MOST_BYTES = 1 << 27

#: Figures that every evaluation has. Older files may lack others.
REQUIRED_FIGURES = ("AP", "AP50", "AP75")

_STREAMS = ("ours", "reference")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Metrics:
    """The content of a ``metrics.json``. ``ours`` is the evaluated model, ``reference`` another network.

    ``figures``: ours, reference → COCO's figures by name, 0…1, -1 if nothing of that kind is annotated; empty
    without annotations. ``images``: how many were evaluated. ``settings``: ours, reference → all that
    the detections depend on. ``per_class``: ours, reference → category id → AP. ``detection_parity``: the
    comparison with the reference. ``skipped``: image id → why it could not be read. ``size_differs``: images
    whose size differs from the annotations'. ``decoders``: decoder → how many images it read.
    """

    figures: Mapping[str, Mapping[str, float]]
    images: int
    settings: Mapping[str, Mapping[str, Any]]
    per_class: Mapping[str, Mapping[Any, float]] | None = None
    detection_parity: Mapping[str, Any] | None = None
    skipped: Mapping[str, str] = field(default_factory=dict)
    size_differs: list[ImageId] = field(default_factory=list)
    decoders: Mapping[str, int] = field(default_factory=dict)

    @property
    def weights_sha256(self) -> str:
        """SHA-256 of the weight file that was evaluated."""
        return str(self.settings["ours"]["weights"])

    def content(self) -> dict[str, Any]:
        """The JSON object."""
        content: dict[str, Any] = dict(self.figures)
        if len(self.figures) == 2:
            ours, reference = (self.figures[name] for name in _STREAMS)
            content["difference"] = {name: value - reference[name] for name, value in ours.items()}
        if self.per_class is not None:
            content["per_class"] = self.per_class
        return {
            **content,
            "detection_parity": self.detection_parity,
            "pictures": self.images,
            "skipped": self.skipped,
            "size_differs": self.size_differs,
            "decoders": self.decoders,
            "settings": self.settings,
        }

    @classmethod
    def parse(cls, data: bytes) -> Metrics:
        """Read the content of a file. Raises :class:`Reason` unless it is a ``metrics.json`` with figures."""
        try:
            content = parse_json(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise Reason(f"byte {error.start} is not UTF-8 text") from None
        try:
            figures = {"ours": content["ours"], **_given(content, "reference")}
            found = cls(
                figures={name: _checked_figures(values) for name, values in figures.items()},
                images=content["pictures"],
                settings=content["settings"],
                **{key: content[key] for key in _OPTIONAL if key in content},
            )
            digest = content["settings"]["ours"]["weights"]
        except KeyError as error:
            raise Reason(f"it lacks {error}") from None
        except TypeError:
            raise Reason("its figures, pictures or settings are not objects") from None
        if type(found.images) is not int or not 0 <= found.images < 1 << 53:
            raise Reason(f"its number of images is {reprlib.repr(found.images)}")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise Reason(f"the SHA-256 of its weights is {reprlib.repr(digest)}")
        return found


_OPTIONAL = ("per_class", "detection_parity", "skipped", "size_differs", "decoders")


def _given(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {key: content[key]} if key in content else {}


def _checked_figures(figures: Mapping[str, Any]) -> dict[str, float]:
    """The known figures. Raises :class:`Reason` for an impossible value, ``KeyError`` for a missing one."""
    found = {name: figures[name] for name in FIGURES if name in figures or name in REQUIRED_FIGURES}
    for name, value in found.items():
        if type(value) is not float or not (0 <= value <= 1 or value == -1):
            raise Reason(f"its {name} is {reprlib.repr(value)}, neither between 0.0 and 1.0 nor -1.0")
    return found


def read_metrics(path: Path) -> bytes:
    """The content of a file that :meth:`Metrics.parse` accepts. Raises :class:`EfficientDetError`."""
    try:
        data = read_bounded(path, MOST_BYTES)
        Metrics.parse(data)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise EfficientDetError(
            f"cannot read {path}: {reason}; give the metrics.json that tools/eval_coco.py wrote"
        ) from None
    except Reason as reason:
        raise EfficientDetError(
            f"{path} is not a metrics.json: {reason}; give the one that tools/eval_coco.py wrote"
        ) from None
    return data
