"""Writes and runs ONNX files, for both ONNX targets. Needs onnx, onnxscript and onnxruntime."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from porting.errors import OutputError
from porting.export import Weights
from porting.export.network import quiet
from pytorch_model.files import check_writable

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def about(weights: Weights) -> dict[str, str]:
    """What the file says of itself: the origin of the weights, the model, and its class names as JSON.

    ``class_names``: one for each class id from 1, empty where it has none; left out if they are not known.
    """
    said = {**weights.metadata, "model": weights.config.name}
    names = weights.config.class_names
    return said if names is None else {**said, "class_names": json.dumps(names, ensure_ascii=False)}


def check_onnx(out: Path) -> None:
    """Raise OutputError if ``out`` is not an ``.onnx`` name, cannot be written, or packages are missing."""
    if out.suffix != ".onnx":
        raise OutputError(f"cannot write {out}: use a name that ends in .onnx")
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise OutputError(
            f"cannot write {out}: ONNX needs {', '.join(missing)}: pip install 'efficientdet-porting[onnx]'"
        )
    check_writable(out)


def export_onnx(
    module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str], path: Path, about: dict[str, str]
) -> None:
    """Trace ``module`` on ``inputs`` (name → example, batch first) and write it. The batch stays free.

    ``about`` is written as the file's metadata. Raises :class:`OutputError` if PyTorch's exporter fails.
    """
    import onnx

    batch = torch.export.Dim("batch", min=1)
    try:
        with quiet(), _silent("torch.onnx"):
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes=tuple({0: batch} for _ in inputs),
                input_names=list(inputs),
                output_names=list(outputs),
                verbose=False,
            )
    except Exception as error:  # of many types; the exporters of PyTorch 2.4 and 2.5 fail
        raise OutputError(
            f"cannot write {path.name}: the ONNX exporter of PyTorch {torch.__version__} fails "
            f"({type(error).__name__}); take a newer PyTorch, or another --to"
        ) from error
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, about)
    onnx.save_model(model, path)


def run_onnx(path: Path, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of the file at ``path``, computed by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: Any = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return [torch.from_numpy(array) for array in found]


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Hide the exporter's warnings about packages that are not needed here."""
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)
