"""The settings in the Object Detection API's ``pipeline.config`` that its weights do not contain.

Source: TensorFlow Models ``research/object_detection/protos/*.proto`` (fields and defaults) and the
protocol buffer text format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from porting.checkpoint.messages import unreadable
from porting.errors import CheckpointError, Reason
from pytorch_model.files import read_bounded
from pytorch_model.formats.protobuf_text import Message, parse_message

NAME = "pipeline.config"

_MOST_BYTES = 1 << 18  # usually a few kilobytes; one that lists 1,000 shards of a data set has 100 kB


@dataclass(frozen=True)
class Pipeline:
    """The settings that define the network's outputs, or that must be those of AutoML's network.

    The predicted (ty, tx, th, tw) are divided by ``box_scales``. ``image_size`` is (height, width) in pixels,
    None if the pipeline does not set it.
    """

    path: Path
    feature_extractor: str
    num_classes: int
    add_background_class: bool
    box_scales: tuple[float, float, float, float]
    scales_per_octave: int
    aspect_ratios: tuple[float, ...]
    anchor_scale: float
    anchor_levels: tuple[int, int]
    bifpn_levels: tuple[int, int]
    combine_method: str
    activations: tuple[str, str]  # of the pyramid, of the heads
    bn_epsilons: tuple[float, ...]
    score_converter: str
    logit_scale: float
    image_size: tuple[int, int] | None


def read_pipeline(path: Path) -> Pipeline:
    """Read the file at ``path``. Raises CheckpointError if it is not the pipeline of an EfficientDet."""
    try:
        text = read_bounded(path, _MOST_BYTES).decode()
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; check the file") from None
    return _pipeline(_Fields(path, "", _parse(path, text)))


def _pipeline(root: _Fields) -> Pipeline:
    ssd = root.message("model").message("ssd")
    extractor, predictor = ssd.message("feature_extractor"), ssd.message("box_predictor")
    head = predictor.message("weight_shared_convolutional_box_predictor")
    layers = extractor.message("conv_hyperparams"), head.message("conv_hyperparams")
    coder = ssd.message("box_coder").message("faster_rcnn_box_coder")
    anchors = ssd.message("anchor_generator").message("multiscale_anchor_generator")
    bifpn, post = extractor.message("bifpn"), ssd.message("post_processing")
    y, x, height, width = (
        coder.number(name, default)
        for name, default in (("y_scale", 10), ("x_scale", 10), ("height_scale", 5), ("width_scale", 5))
    )
    return Pipeline(
        path=root.path,
        feature_extractor=extractor.text("type", ""),
        num_classes=ssd.integer("num_classes", 0),
        add_background_class=ssd.text("add_background_class", "true").lower() in ("true", "t", "1"),
        box_scales=(y, x, height, width),
        scales_per_octave=anchors.integer("scales_per_octave", 2),
        aspect_ratios=anchors.numbers("aspect_ratios"),
        anchor_scale=anchors.number("anchor_scale", 4),
        anchor_levels=(anchors.integer("min_level", 3), anchors.integer("max_level", 7)),
        bifpn_levels=(bifpn.integer("min_level", 3), bifpn.integer("max_level", 7)),
        combine_method=bifpn.text("combine_method", "fast_attention"),
        activations=(layers[0].text("activation", "RELU"), layers[1].text("activation", "RELU")),
        bn_epsilons=tuple(layer.message("batch_norm").number("epsilon", 0.001) for layer in layers),
        score_converter=post.text("score_converter", "IDENTITY"),
        logit_scale=post.number("logit_scale", 1),
        image_size=_image_size(ssd.message("image_resizer")),
    )


def _image_size(resizer: _Fields) -> tuple[int, int] | None:
    if resizer.has("keep_aspect_ratio_resizer"):
        inner = resizer.message("keep_aspect_ratio_resizer")
        return (inner.integer("max_dimension", 1024),) * 2
    if resizer.has("fixed_shape_resizer"):
        inner = resizer.message("fixed_shape_resizer")
        return inner.integer("height", 300), inner.integer("width", 300)
    return None


class _Fields(NamedTuple):
    """One message of the file, and its name for errors. A missing value has its default."""

    path: Path
    where: str
    fields: Message

    def has(self, name: str) -> bool:
        return name in self.fields

    def message(self, name: str) -> _Fields:
        """The message ``name``. Raises CheckpointError if it is missing, unless it is optional."""
        values = self.fields.get(name)
        value = values[-1] if values else None  # "name: []" has no value
        where = f"{self.where}.{name}".lstrip(".")
        if value is None and name in ("bifpn", "post_processing", "image_resizer", "batch_norm"):
            value = {}
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{self.path} has no {where}, so it is not for an EfficientDet of the Object Detection API; "
                f"put the model's own {NAME} there"
            )
        return _Fields(self.path, where, value)

    def text(self, name: str, default: str) -> str:
        value = (self.fields.get(name) or [default])[-1]
        if not isinstance(value, str):
            raise self._wrong(name, "a message")
        return value

    def number(self, name: str, default: float) -> float:
        return self._number(name, self.text(name, str(default)))

    def integer(self, name: str, default: int) -> int:
        value = self.number(name, default)
        if not value.is_integer() or abs(value) > 1 << 31:
            raise self._wrong(name, repr(value))
        return int(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self.fields.get(name, [])
        for value in values:
            if not isinstance(value, str):
                raise self._wrong(name, "a message")
        return tuple(self._number(name, str(value)) for value in values)

    def _number(self, name: str, value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            raise self._wrong(name, repr(value)) from None
        if number != number or number in (float("inf"), float("-inf")):
            raise self._wrong(name, repr(value))
        return number

    def _wrong(self, name: str, value: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.where}.{name} is {value}; correct the file")


def _parse(path: Path, text: str) -> Message:
    try:
        return parse_message(text)
    except Reason as reason:
        raise CheckpointError(f"{path}, {reason}; correct the file") from None
