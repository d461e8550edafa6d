"""The Object Detection API's ``image_resizer``, as the configuration of ours that does the same.

Source: TensorFlow Models ``research/object_detection``: ``protos/image_resizer.proto`` (fields and defaults),
``builders/image_resizer_builder.py``, ``core/preprocessor.py`` (``resize_image``, ``resize_to_range``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from porting.checkpoint.objects.text_format import Fields
from porting.errors import CheckpointError
from pytorch_model.config import Resizer, shown
from pytorch_model.errors import ConfigError

_Size = tuple[int, int]


def read_resizer(fields: Fields, pad_to_multiple: int) -> tuple[_Size | None, Resizer | None]:
    """(image size, resizer) of the message ``image_resizer``; (None, None) if it is empty.

    ``pad_to_multiple``: of the feature extractor. Raises CheckpointError, naming the field, for what is not
    supported.
    """
    for kind in fields.fields:
        if kind not in _READERS:
            raise CheckpointError(
                f"{fields.path}: {fields.where} is {shown(kind)}, which is not supported; "
                f"{' and '.join(_READERS)} are"
            )
        inner = fields.message(kind)
        _check_pixels(inner)
        size, settings = _READERS[kind](inner)
        if pad_to_multiple > 1 and settings.get("pad") is False:
            raise CheckpointError(
                f"{fields.path}: {inner.where} without pad_to_max_dimension, together with the feature "
                "extractor's pad_to_multiple, is not supported: the input would differ in size from image to "
                "image"
            )
        try:
            return size, Resizer(**settings, pad_to_multiple=pad_to_multiple)
        except ConfigError as error:
            raise CheckpointError(f"{fields.path}: {inner.where}: {error}; correct the file") from None
    return None, None


def _check_pixels(fields: Fields) -> None:
    """Raise CheckpointError for a way to compute pixels that is not supported."""
    method = fields.text("resize_method", "BILINEAR")
    if method not in ("BILINEAR", "0"):
        raise fields.wrong("resize_method", method, "only BILINEAR is supported")
    if fields.flag("convert_to_grayscale", False):
        raise fields.wrong("convert_to_grayscale", "true", "only colour images are supported")


def _keep_aspect_ratio(fields: Fields) -> tuple[_Size, dict[str, Any]]:
    shortest, longest = fields.integer("min_dimension", 600), fields.integer("max_dimension", 1024)
    if shortest > longest:
        raise fields.wrong("min_dimension", f"{shortest}, above max_dimension, {longest}")
    return (longest, longest), {
        "rule": "keep_aspect_ratio",
        "min_dimension": None if shortest == longest else shortest,
        "pad": fields.flag("pad_to_max_dimension", False),
        "pad_value": fields.numbers("per_channel_pad_value") or (0.0, 0.0, 0.0),
    }


def _fixed_shape(fields: Fields) -> tuple[_Size, dict[str, Any]]:
    size = fields.integer("height", 300), fields.integer("width", 300)
    return size, {"rule": "fixed_shape"}


#: The kinds of resizers that can be read.
_READERS: Mapping[str, Callable[[Fields], tuple[_Size, dict[str, Any]]]] = {
    "keep_aspect_ratio_resizer": _keep_aspect_ratio,
    "fixed_shape_resizer": _fixed_shape,
}
