"""The settings in the Object Detection API's ``pipeline.config`` that its weights do not contain.

Source: TensorFlow Models ``research/object_detection/protos/*.proto`` (fields and defaults) and the
protocol buffer text format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from porting.checkpoint.messages import unreadable
from porting.errors import CheckpointError
from pytorch_model.files import read_bounded

NAME = "pipeline.config"

_MOST_BYTES = 1 << 18  # usually a few kilobytes; one that lists 1,000 shards of a data set has 100 kB
_MOST_DEPTH = 32
_TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)|(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
    r"""|(?P<word>[\w.+-]+)|(?P<punctuation>[{}<>\[\]:,;])"""
)
_CLOSING = {"{": "}", "<": ">"}

Message = dict[str, list["str | Message"]]


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
    """Parse the text format: ``name: value``, ``name { … }``, lists in brackets, comments."""
    tokens = _tokens(path, text)
    message, closed = _message(path, tokens, 0)
    if closed:
        raise CheckpointError(
            f"{path}, line {closed.line}: {closed.text!r} has no opening bracket; correct the file"
        )
    return message


class _Token(NamedTuple):
    kind: str  # word, string or punctuation
    text: str
    line: int


def _tokens(path: Path, text: str) -> Iterator[_Token]:
    position, line = 0, 1
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None or found.lastgroup is None:
            raise CheckpointError(f"{path}, line {line}: {text[position]!r} is unexpected; correct the file")
        if found.lastgroup != "skip":
            yield _Token(found.lastgroup, found[0], line)
        line += found[0].count("\n")
        position = found.end()


def _message(path: Path, tokens: Iterator[_Token], depth: int) -> tuple[Message, _Token | None]:
    """The fields up to the bracket that closes the message, and that bracket; None at the end of the file."""
    message: Message = {}
    for token in tokens:
        if token.text in (",", ";"):
            continue
        if token.text in _CLOSING.values():
            return message, token
        if token.kind != "word":
            raise _unexpected(path, token)
        following = next(tokens, token)
        if following.text == ":":
            following = next(tokens, token)
        message.setdefault(token.text, []).extend(_values(path, tokens, following, depth))
    return message, None


def _values(path: Path, tokens: Iterator[_Token], first: _Token, depth: int) -> Iterator[str | Message]:
    """One value, or the values of a list; ``first`` is the first token."""
    if depth == _MOST_DEPTH:
        raise CheckpointError(f"{path}, line {first.line}: messages nest too deep; correct the file")
    if first.text in _CLOSING:
        inner, closed = _message(path, tokens, depth + 1)
        if closed is None or closed.text != _CLOSING[first.text]:
            raise CheckpointError(
                f"{path}, line {first.line}: {first.text!r} is never closed; correct the file"
            )
        yield inner
    elif first.text == "[":
        for token in tokens:
            if token.text == "]":
                return
            if token.text != ",":
                yield from _values(path, tokens, token, depth + 1)
        raise CheckpointError(f"{path}, line {first.line}: '[' is never closed; correct the file")
    elif first.kind == "punctuation":
        raise _unexpected(path, first)
    else:
        yield first.text[1:-1] if first.kind == "string" else first.text


def _unexpected(path: Path, token: _Token) -> CheckpointError:
    return CheckpointError(f"{path}, line {token.line}: {token.text!r} is unexpected; correct the file")
