"""Engines: ways to compute one network fast. It loads neither torch nor an engine's packages.

An engine is made of a model and an image size, and is a function from normalised images, float32
[N, 3, H, W], to the model's (class_outputs, box_outputs). A new engine is a module here with
``make(model, image_size) -> Network`` and a line in :data:`ENGINES`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


def not_installed(packages: Iterable[str]) -> tuple[str, ...]:
    """Those of ``packages``, by their names in ``import``, that are not installed."""
    return tuple(package for package in packages if importlib.util.find_spec(package) is None)


@dataclass(frozen=True)
class Engine:
    """``packages``: what it needs beside PyTorch; ``extra``: the extra that installs them.

    ``cpu_batch``: how many images a batch has on a CPU to take the least time per image. ``only_float32``: it
    computes in float32, whatever the precision of the weights.
    """

    name: str
    summary: str
    module: str
    cpu_batch: int
    packages: tuple[str, ...] = ()
    extra: str = ""
    only_float32: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return not_installed(self.packages)


EAGER = "eager"
ENGINES: Mapping[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(EAGER, "the model as it is", "eager", 1),
        Engine("folded", "batch norms folded, channels last", "folded", 8),
        Engine("compile", "torch.compile of the folded network", "compiled", 1),
        Engine("onnxruntime", "ONNX Runtime", "onnx_runtime", 8, ("onnx", "onnxruntime"), "onnx", True),
        Engine("openvino", "OpenVINO, on the CPU", "open_vino", 8, ("onnx", "openvino"), "openvino", True),
    )
}
#: Images of a batch on a GPU. Larger ones are faster per image; this one fits beside every model.
GPU_BATCH = 8
AUTO = "auto"
#: What a network computes with: names of dtypes in PyTorch.
FLOAT32 = "float32"
PRECISIONS = (FLOAT32, "bfloat16", "float16")
NAMES = (AUTO, *ENGINES)


def computed_by(settings: Mapping[str, Any]) -> str:
    """``folded``, ``eager in bfloat16``: the ``engine`` and ``precision`` of a summary or of metrics.

    Those of older files lack them.
    """
    engine, precision = settings.get("engine", EAGER), settings.get("precision", FLOAT32)
    return engine if precision == FLOAT32 else f"{engine} in {precision}"
