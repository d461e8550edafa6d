"""Engines: ways to compute one network fast. It loads neither torch nor an engine's packages.

An engine is made of a model and an image size, and is a function from normalised images, float32
[N, 3, H, W], to the model's (class_outputs, box_outputs). A new engine is a module here with
``make(model, image_size) -> Network`` and a line in :data:`ENGINES`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Engine:
    """``packages``: what it needs beside PyTorch; ``extra``: the extra that installs them."""

    name: str
    summary: str
    module: str
    packages: tuple[str, ...] = ()
    extra: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return tuple(package for package in self.packages if importlib.util.find_spec(package) is None)


EAGER = "eager"
ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(EAGER, "the model as it is", "eager"),
        Engine("folded", "batch norms folded, channels last", "folded"),
        Engine("compile", "torch.compile of the folded network", "compiled"),
        Engine("onnxruntime", "ONNX Runtime", "onnx_runtime", ("onnx", "onnxruntime"), "onnx"),
        Engine("openvino", "OpenVINO, on the CPU", "open_vino", ("onnx", "openvino"), "openvino"),
    )
}
AUTO = "auto"
NAMES = (AUTO, *ENGINES)
