"""The sides of ``bench infer``: networks of ours and of others, with the same weights. Loads nothing heavy.

A new side is a module here with ``make(setup) -> Runner`` and a line in :data:`SIDES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytorch_model.engines import ENGINES, not_installed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from porting.export import Weights


@dataclass(frozen=True)
class Side:
    """``module``, in this package, makes it; ``variant`` is for the module. ``packages``: what must be
    installed, by ``pip install INSTALL``. ``slow``: it takes minutes to begin, so it runs only if named.
    """

    name: str
    summary: str
    module: str
    variant: str
    packages: tuple[str, ...] = ()
    install: str = ""
    slow: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that are not installed."""
        return not_installed(self.packages)


@dataclass(frozen=True)
class Setup:
    """What a side is made of: float32 weights, (height, width) of the images, where to compute, with how many
    threads.
    """

    weights: Weights
    image_size: tuple[int, int]
    device: torch.device
    threads: int
    variant: str


@dataclass(frozen=True)
class Runner:
    """``prepare``: images float32 [N, 3, H, W], normalised → the input as the side likes it; not timed.
    ``run``: the work that is timed. ``outputs``: what it returned → class outputs, then box outputs, float32
    [N, C, h, w]; None if these are not head outputs.
    """

    prepare: Callable[[np.ndarray], Any]
    run: Callable[[Any], Any]
    outputs: Callable[[Any], list[np.ndarray]] | None = None


_EFFDET = ("effdet", "timm")
_EFFDET_INSTALL = "effdet"
EFFDET = "effdet"  # what others are compared with

SIDES: Mapping[str, Side] = {
    side.name: side
    for side in (
        *(
            Side(
                engine.name,
                f"our engine: {engine.summary}",
                "engine",
                engine.name,
                engine.packages,
                f"'efficientdet-porting[{engine.extra}]'",
                slow=engine.name == "compile",
            )
            for engine in ENGINES.values()
        ),
        Side(EFFDET, "the package effdet, as it is (NCHW)", "effdet", "nchw", _EFFDET, _EFFDET_INSTALL),
        Side("effdet-nhwc", "effdet in channels_last", "effdet", "nhwc", _EFFDET, _EFFDET_INSTALL),
        Side(
            "effdet-compile",
            "torch.compile of effdet, with the settings of our engine compile",
            "effdet",
            "compile",
            _EFFDET,
            _EFFDET_INSTALL,
            slow=True,
        ),
        Side(
            "effdet-onnxruntime",
            "a plain ONNX Runtime session of effdet, exported by torch.onnx",
            "effdet",
            "onnxruntime",
            (*_EFFDET, "onnx", "onnxscript", "onnxruntime"),
            f"{_EFFDET_INSTALL} 'efficientdet-porting[onnx]'",
            slow=True,
        ),
        Side(
            "tensorflow",
            "tf.function of AutoML's network in plain operations",
            "tensorflow",
            "function",
            ("tensorflow",),
            "'efficientdet-porting[tensorflow]'",
        ),
    )
}
ALL = "all"
DEFAULT = tuple(name for name, side in SIDES.items() if not side.slow)

#: Postprocessing: the head outputs of a batch → detections, AutoML's soft suppression.
POSTPROCESS: Mapping[str, Side] = {
    side.name: side
    for side in (
        Side("ours", "selection and soft suppression", "engine", "postprocess"),
        Side(EFFDET, "effdet's, soft suppression", "effdet", "postprocess", _EFFDET, _EFFDET_INSTALL),
    )
}
TABLES = {"network": SIDES, "postprocess": POSTPROCESS}
