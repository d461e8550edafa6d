"""What else people give to ``--ckpt``: files of other programs and addresses. Each is named, with advice."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from porting.checkpoint.messages import unreadable
from porting.errors import CheckpointError
from pytorch_model.files import check_regular

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,20}://")

_CONVERTED = (
    "PyTorch weights, not a TensorFlow checkpoint; a file that this project wrote is converted already: give "
    "it as --weights (to verify, detect, eval_coco or export)"
)
#: Suffix → what the file holds, and where it goes.
_FOREIGN: Mapping[str, str] = {
    ".safetensors": _CONVERTED,
    ".pth": _CONVERTED,
    ".pt": _CONVERTED,
    ".pt2": "a program of torch.export, which export writes and nothing here reads; give the checkpoint that "
    "its weights came from",
    ".onnx": "an ONNX graph, which export writes and nothing here reads; give the checkpoint, SavedModel or "
    "frozen graph that it was made from",
    ".keras": "a whole model in Keras 3's format, whose variables have no names; save its weights under a "
    "name that ends in .h5, with the TensorFlow and Keras that AutoML used",
}
#: Files that make a folder a checkpoint.
_OURS = (".index", ".pb", ".pbtxt")


def check_foreign(spec: str) -> None:
    """Raise :class:`CheckpointError` if ``spec`` is an address, or a file of another program.

    Also for a folder with nothing but such files, as a release folder of this project is.
    """
    if _ADDRESS.match(spec):
        raise CheckpointError(
            f"{spec} is an address, and --ckpt reads local files; download it first, or give one of Google's "
            "releases by name, such as efficientdet-d0"
        )
    path = Path(spec)
    if os.path.isdir(path):
        _check_folder(path)
    elif os.path.isfile(path) and path.suffix in _FOREIGN:
        try:
            check_regular(path)  # a Git LFS pointer holds nothing of the kind
        except OSError as error:
            raise unreadable(path, error) from None
        raise CheckpointError(f"{path} holds {_FOREIGN[path.suffix]}")


def _check_folder(folder: Path) -> None:
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return  # the readers say why
    if any(name.endswith(_OURS) or os.path.isdir(folder / name) for name in names) or "checkpoint" in names:
        return
    for name in names:
        if Path(name).suffix in _FOREIGN:
            raise CheckpointError(
                f"{folder} holds no TensorFlow checkpoint; {name} in it holds {_FOREIGN[Path(name).suffix]}"
            )
