"""The settings of a detection: suppression, image decoder, test-time augmentation. It does not load torch.

Source: AutoML ``hparams_config.py`` (``nms_configs``) and ``tf2/postprocess.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pytorch_model.errors import ConfigError

DECODERS = ("pillow", "fast-dct")
# Pillow's names of the formats that are read, and their file suffixes: the formats that cameras, phones and
# browsers write, and that tests and fuzzing cover. Pillow knows three dozen more: one of them (EPS) starts
# another program, and others fail in many ways. JPEG includes MPO, which has several images in one file.
FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
}
TTA = ("none", "flip")
#: Threads that read images. No machine has a use for more, and a system may refuse to start thousands.
MOST_WORKERS = 256

TF_METHODS = ("gaussian", "hard")
PYFUNC_METHODS = ("gaussian", "hard", "linear", "diou")
# What a box can suppress → the other settings that AutoML runs it with: its COCO evaluation suppresses within
# each class, its exported models across all classes.
SCOPES: dict[str, dict[str, int]] = {"per-class": {}, "global": {"max_nms_inputs": 0}}


@dataclass(frozen=True)
class NMSConfig:
    """AutoML's ``nms_configs``. The defaults are those of AutoML's COCO evaluation.

    ``method``: ``gaussian`` (soft), ``hard``, and for ``pyfunc`` also ``linear`` (soft) and ``diou``.
    ``iou_thresh``: None is the method's default, 0.3 for ``linear`` and 0.5 otherwise; ``gaussian`` has none.
    ``score_thresh``: 0 is the method's default, 0.001 for the soft methods and no threshold for the hard ones
    (``pyfunc``'s hard methods cannot have one).
    ``sigma``: None is 0.5. Used by ``gaussian`` only, whose weights are exp(-iou² / sigma).
    ``pyfunc``: AutoML's NumPy implementation. Its boxes are one pixel larger, it keeps scores equal to the
    threshold, and it always keeps the best box of every class.
    ``max_nms_inputs``: the number of (anchor, class) pairs that enter; 0: every anchor with its best class.
    ``max_output_size``: detections per image.
    ``scope``: ``per-class``: a box acts on boxes of its own class; ``global``: on all boxes, and boxes are
    clipped to the network's input, as in AutoML's exported models, which also have ``max_nms_inputs=0``.
    ``pyfunc`` has no such path.

    Raises :class:`ConfigError` on a value that is not possible.
    """

    method: str = "gaussian"
    iou_thresh: float | None = None
    score_thresh: float = 0.0
    sigma: float | None = None
    pyfunc: bool = False
    max_nms_inputs: int = 5000
    max_output_size: int = 100
    scope: str = "per-class"

    def __post_init__(self) -> None:
        methods = PYFUNC_METHODS if self.pyfunc else TF_METHODS
        if self.method not in methods:
            raise ConfigError(f"nms_configs.method is {self.method!r}, must be one of {', '.join(methods)}")
        if self.scope not in SCOPES:
            raise ConfigError(f"the scope of suppression is {self.scope!r}, must be {' or '.join(SCOPES)}")
        if self.pyfunc and self.scope != "per-class":
            raise ConfigError("nms_configs.pyfunc suppresses per class; it cannot be combined with global")
        if self.max_nms_inputs < 0:
            raise ConfigError(f"nms_configs.max_nms_inputs is {self.max_nms_inputs}, must be 0 or more")
        if self.max_output_size < 1:
            raise ConfigError(f"nms_configs.max_output_size is {self.max_output_size}, must be at least 1")
        if self.pyfunc and not self.is_soft and self.score_thresh:
            raise ConfigError(
                f"nms_configs.score_thresh: pyfunc's {self.method} suppression has no threshold"
            )
        if self.sigma is not None and self.sigma <= 0:
            raise ConfigError(f"nms_configs.sigma is {self.sigma}, must be above 0")

    @property
    def is_soft(self) -> bool:
        """Whether an overlapping box is kept with a lower score instead of being dropped."""
        return self.method in ("gaussian", "linear")

    @property
    def effective_iou_thresh(self) -> float:
        return self.iou_thresh or (0.3 if self.method == "linear" else 0.5)

    @property
    def effective_score_thresh(self) -> float:
        return self.score_thresh or (0.001 if self.is_soft else -math.inf)

    @property
    def effective_sigma(self) -> float:
        return self.sigma or 0.5
