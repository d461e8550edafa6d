"""Make an engine by its name."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines import AUTO, EAGER, ENGINES, NAMES
from pytorch_model.errors import ConfigError

#: float32 [N, 3, H, W] → (class_outputs, box_outputs), as ``EfficientDet`` returns them.
Network: TypeAlias = Callable[[Tensor], tuple[Sequence[Tensor], Sequence[Tensor]]]


def chosen_engine(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """``name``, or for ``auto`` the fastest engine that is installed for ``device``.

    On a CPU that is ONNX Runtime, which computes in float32. Without it, and for weights on another device or
    of another ``dtype``, it is the folded network. Raises
    :class:`ConfigError` for an unknown name, and for a package that is not installed.
    """
    if name == AUTO:
        fits = device.type == "cpu" and dtype == torch.float32
        return "onnxruntime" if fits and not ENGINES["onnxruntime"].missing else "folded"
    if name not in ENGINES:
        raise ConfigError(f"the engine is {name!r}, must be one of {', '.join(NAMES)}")
    engine = ENGINES[name]
    if engine.missing:
        raise ConfigError(
            f"the engine {name} needs {', '.join(engine.missing)}: "
            f"pip install 'efficientdet-porting[{engine.extra}]'"
        )
    return name


def make_engine(name: str, model: EfficientDet, image_size: tuple[int, int]) -> Network:
    """The engine ``name``, one of :data:`ENGINES`, for ``model`` as it is now.

    Except for ``eager``, later changes of the model do not reach the engine. Its outputs are on the model's
    device. Raises :class:`ConfigError` if the engine cannot run there.
    """
    module = importlib.import_module(f"{__package__}.{ENGINES[name].module}")
    network: Network = module.make(model, image_size)
    return network


class EngineOf:
    """A model behind an engine that is made again when the model has changed.

    An engine holds copies of the parameters, and they may be trained, loaded or moved between two calls. Only
    a change through ``parameter.data`` is not noticed. Images of another size go to the model itself.
    """

    def __init__(self, name: str, model: EfficientDet, image_size: tuple[int, int]) -> None:
        self._given, self._model, self._image_size = name, model, image_size
        self._state: object = None
        self._eager = self._network = make_engine(EAGER, model, image_size)
        self._lock = threading.Lock()
        self.name = self._choice()

    def __call__(self, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if (images.shape[2], images.shape[3]) != self._image_size:
            return self._eager(images)
        return self.current()(images)

    def current(self) -> Network:
        """The engine for the model as it is now."""
        with self._lock:  # several threads may detect with one model
            state = [_identity(tensor) for tensor in (*self._model.parameters(), *self._model.buffers())]
            if state != self._state:
                self.name = self._choice()
                self._network = make_engine(self.name, self._model, self._image_size)
                self._state = state
            return self._network

    def _choice(self) -> str:
        """``auto`` takes only an :class:`EfficientDet`, not a model that may compute something else."""
        if self._given == AUTO and type(self._model) is not EfficientDet:
            return EAGER
        like = next(self._model.parameters())
        return chosen_engine(self._given, like.device, like.dtype)


def _identity(tensor: Tensor) -> tuple[int, int]:
    """Changes when the tensor is moved, replaced or written to."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version
