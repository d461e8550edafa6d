"""ONNX Runtime on the CPU or a CUDA device. Weights of lower precision are computed with in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines.choose import Network
from pytorch_model.engines.onnx_graph import onnx_model
from pytorch_model.engines.weights import FoldedWeights
from pytorch_model.errors import ConfigError, first_line

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def make(model: EfficientDet, image_size: tuple[int, int]) -> Network:
    """A session with as many threads as PyTorch has. They sleep between two calls, for Python to decode.

    Raises :class:`ConfigError` if ONNX Runtime cannot use the model's device.
    """
    import onnxruntime

    device = next(model.parameters()).device
    provider = _PROVIDERS.get(device.type, "")
    if provider not in onnxruntime.get_available_providers():
        raise ConfigError(
            f"the engine onnxruntime cannot compute on {device.type}: this onnxruntime has "
            f"{', '.join(onnxruntime.get_available_providers())}; take another engine or device"
        )
    weights = FoldedWeights(model.state_dict(), model.config.fpn_weight_method, torch.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # its own lines would stand beside our sentence
    graph = onnx_model(model.config, weights, image_size).SerializeToString()
    with _told():
        session = onnxruntime.InferenceSession(graph, options, providers=[provider])
    levels = len(model.config.levels)

    def run(images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        with _told():
            found = session.run(None, {"images": images.float().cpu().numpy()})
        outputs = [torch.from_numpy(array).to(device) for array in found]
        return outputs[:levels], outputs[levels:]

    return run


@contextmanager
def _told() -> Iterator[None]:
    """ONNX Runtime's errors, which have types of their own, as MemoryError or :class:`ConfigError`."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        if any(word in str(error).lower() for word in ("alloc", "memory")):
            raise MemoryError from None
        raise ConfigError(
            f"the engine onnxruntime failed: {first_line(error)}; take another engine"
        ) from None
