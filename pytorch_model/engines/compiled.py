"""torch.compile of the folded network. The first call of each batch size compiles, for minutes on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pytorch_model.efficientdet import EfficientDet
from pytorch_model.engines.choose import Network
from pytorch_model.engines.folded import folded_network
from pytorch_model.errors import ConfigError, first_line


def make(model: EfficientDet, image_size: tuple[int, int]) -> Network:
    """The folded network with constant weights; on a CUDA device its kernels are one CUDA graph.

    Raises :class:`ConfigError` when it is called, if this machine cannot compile.
    """
    network = folded_network(model, image_size)
    on_gpu = next(model.parameters()).device.type == "cuda"
    compiled = torch.compile(network, mode="reduce-overhead" if on_gpu else None, dynamic=False)

    def run(images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        import torch._inductor.config as inductor

        try:
            with torch.no_grad(), inductor.patch(freezing=True):
                class_outputs, box_outputs = compiled(images.to(network.dtype))
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ConfigError(
                f"the engine compile cannot compile here: {first_line(error)}; take another engine"
            ) from None
        if on_gpu:  # the next call writes its outputs to the same memory
            return [x.clone() for x in class_outputs], [x.clone() for x in box_outputs]
        return class_outputs, box_outputs

    return run
