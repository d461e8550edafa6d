"""Writes and runs ONNX files, for both ONNX targets. Needs onnx and onnxruntime; a trace also onnxscript."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from porting.errors import OutputError
from porting.export import Weights
from porting.export.network import quiet
from pytorch_model.engines import not_installed
from pytorch_model.engines.weights import FoldedWeights
from pytorch_model.files import check_writable
from pytorch_model.weights.tensors import as_tensors

if TYPE_CHECKING:
    from onnx import ModelProto


def check_onnx(out: Path, packages: Sequence[str] = ("onnx", "onnxruntime")) -> None:
    """Raise OutputError if ``out`` is not an ``.onnx`` name, cannot be written, or packages are missing."""
    if out.suffix != ".onnx":
        raise OutputError(f"cannot write {out}: use a name that ends in .onnx")
    missing = not_installed(packages)
    if missing:
        raise OutputError(
            f"cannot write {out}: ONNX needs {', '.join(missing)}: pip install 'efficientdet-porting[onnx]'"
        )
    check_writable(out)


def network_graph(weights: Weights) -> ModelProto:
    """The network as the engines compute it, ``images`` → :func:`head_names`. Folded in float64."""
    from pytorch_model.engines.onnx_graph import onnx_model

    config = weights.config
    folded = FoldedWeights(as_tensors(weights.state_dict), config.fpn_weight_method, torch.float32)
    return onnx_model(config, folded, config.input_size)


def traced_graph(module: nn.Module, inputs: dict[str, Tensor], outputs: Sequence[str]) -> ModelProto:
    """``module``, traced on ``inputs`` (name → example, batch first). The batch stays free.

    Raises :class:`OutputError` if PyTorch's exporter fails.
    """
    from pytorch_model.engines.onnx_graph import OPSET

    batch = torch.export.Dim("batch", min=1)
    try:
        with quiet(), _silent("torch.onnx"):
            program = torch.onnx.export(
                _Positional(module),
                tuple(inputs.values()),
                dynamo=True,
                dynamic_shapes={"tensors": tuple({0: batch} for _ in inputs)},
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=OPSET,
                verbose=False,
            )
    except Exception as error:  # of many types; the exporters of PyTorch 2.4 and 2.5 fail
        raise OutputError(
            f"cannot write an ONNX file: the ONNX exporter of PyTorch {torch.__version__} fails "
            f"({type(error).__name__}); take a newer PyTorch, or another --to"
        ) from error
    assert program is not None
    return program.model_proto


class _Positional(nn.Module):
    """``module``, whatever its arguments are called: the exporter wants them by name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: Tensor) -> Any:
        return self.module(*tensors)


def save_onnx(model: ModelProto, path: Path, weights: Weights) -> None:
    """Write ``model`` with :func:`about` its weights."""
    import onnx

    onnx.helper.set_model_props(model, about(weights))
    onnx.save_model(model, path)


def about(weights: Weights) -> dict[str, str]:
    """What the file says of itself: the origin of the weights, the model, and the rest as JSON.

    That is what prepares an image for the input: ``image_size`` (height, width), ``mean_rgb``, ``stddev_rgb``
    and ``resizer``. And ``class_names``: one for each class id from 1, empty where it has none; left out if
    they are not known.
    """
    config = weights.config
    facts: dict[str, Any] = {
        "image_size": config.image_size,
        "mean_rgb": config.mean_rgb,
        "stddev_rgb": config.stddev_rgb,
        "resizer": asdict(config.resizer),
    }
    if config.class_names is not None:
        facts["class_names"] = config.class_names
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in facts.items()}
    return {**weights.metadata, **texts, "model": config.name}


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
