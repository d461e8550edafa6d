"""One message of the Object Detection API's ``pipeline.config``, and the values of its fields."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from porting.errors import CheckpointError, Reason
from pytorch_model.formats.protobuf_text import Message, parse_message

NAME = "pipeline.config"

_OPTIONAL = ("bifpn", "post_processing", "batch_non_max_suppression", "image_resizer", "batch_norm")


class Fields(NamedTuple):
    """One message of the file, and its name for errors. A missing value has its default."""

    path: Path
    where: str
    fields: Message

    def has(self, name: str) -> bool:
        return name in self.fields

    def message(self, name: str) -> Fields:
        """The message ``name``. Raises CheckpointError if it is missing, unless it is optional."""
        values = self.fields.get(name)
        value = values[-1] if values else None  # "name: []" has no value
        where = f"{self.where}.{name}".lstrip(".")
        if value is None and name in _OPTIONAL:
            value = {}
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{self.path} has no {where}, so it is not for an EfficientDet of the Object Detection API; "
                f"put the model's own {NAME} there"
            )
        return Fields(self.path, where, value)

    def messages(self, name: str) -> list[Fields]:
        """Every message ``name``, none if there is none. Values of another kind are left out."""
        where = f"{self.where}.{name}".lstrip(".")
        found = self.fields.get(name, [])
        return [Fields(self.path, where, value) for value in found if isinstance(value, dict)]

    def text(self, name: str, default: str) -> str:
        value = (self.fields.get(name) or [default])[-1]
        if not isinstance(value, str):
            raise self.wrong(name, "a message")
        return value

    def flag(self, name: str, default: bool) -> bool:
        return self.text(name, str(default)).lower() in ("true", "t", "1")

    def number(self, name: str, default: float) -> float:
        return self._number(name, self.text(name, str(default)))

    def integer(self, name: str, default: int) -> int:
        value = self.number(name, default)
        if not value.is_integer() or abs(value) > 1 << 31:
            raise self.wrong(name, repr(value))
        return int(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        values = self.fields.get(name, [])
        for value in values:
            if not isinstance(value, str):
                raise self.wrong(name, "a message")
        return tuple(self._number(name, str(value)) for value in values)

    def _number(self, name: str, value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            raise self.wrong(name, repr(value)) from None
        if number != number or number in (float("inf"), float("-inf")):
            raise self.wrong(name, repr(value))
        return number

    def wrong(self, name: str, value: str, cure: str = "correct the file") -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.where}.{name} is {value}; {cure}")


def parse(path: Path, text: str) -> Message:
    """The message that ``text``, the content of the file at ``path``, holds."""
    try:
        return parse_message(text)
    except Reason as reason:
        raise CheckpointError(f"{path}, {reason}; correct the file") from None
