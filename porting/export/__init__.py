"""Exports weights to the formats of other programs. Each :class:`Target` has its own module.

A new target is a module here with ``write(weights, out)`` and a line in :data:`TARGETS`. The module is
imported when the target writes.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pytorch_model.config import EfficientDetConfig, Resizer

if TYPE_CHECKING:  # a list of the targets needs no NumPy
    from torch import Tensor

    from pytorch_model.weights.tensors import AnyTensor


@dataclass(frozen=True)
class Weights:
    """A checked state dict, the configuration that it fits, and the metadata of its file."""

    state_dict: Mapping[str, AnyTensor]
    config: EfficientDetConfig
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """``state_dict`` with PyTorch's tensors. Imports torch."""
        from pytorch_model.weights.tensors import as_tensors

        return as_tensors(self.state_dict)


@dataclass(frozen=True)
class Written:
    """``files``: at or below the output path. ``facts``: what was done and checked, one sentence each."""

    files: tuple[Path, ...]
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """An output format. ``module``, in this package, has ``write(weights, out) -> Written``."""

    name: str
    summary: str
    module: str

    def write(self, weights: Weights, out: Path) -> Written:
        """Write, read back and compare. Nothing is left if it fails. Raises :class:`EfficientDetError`."""
        written: Written = importlib.import_module(f"{__name__}.{self.module}").write(weights, out)
        if weights.config.resizer == Resizer():
            return written
        about = f"this model's images are not resized as AutoML does: {weights.config.resizer}"
        return dataclasses.replace(written, facts=(*written.facts, about))


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            "tf-checkpoint", "a folder with AutoML's checkpoint, moving averages included", "tf_checkpoint"
        ),
        Target("h5", "one file, as Keras's save_weights writes AutoML's model", "h5"),
        Target("effdet", "a state dict that the effdet package's models load", "effdet"),
        Target("onnx", "the network, any batch, at the configuration's image size", "onnx_network"),
        Target("onnx-detector", "the same, followed by AutoML's suppression per class", "onnx_detector"),
        Target("torch-export", "the network as a torch.export program, .pt2", "torch_export"),
    )
}
