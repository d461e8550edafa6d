"""Our engines, and our postprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from porting.bench.sides import Runner, Setup
from porting.export.network import loaded
from pytorch_model.anchors import generate_anchors
from pytorch_model.detection.postprocess import postprocess_per_class
from pytorch_model.engines import AUTO
from pytorch_model.engines.choose import chosen_engine, make_engine


def make(setup: Setup) -> Runner:
    """The engine ``setup.variant``; for ``postprocess`` what follows it in a :class:`Detector`."""
    model = loaded(setup.weights).to(setup.device)
    postprocess = setup.variant == "postprocess"
    name = chosen_engine(AUTO if postprocess else setup.variant, setup.device)
    network = make_engine(name, model, setup.image_size)
    if not postprocess:
        return Runner(lambda images: on_device(images, setup.device), network, head_arrays)
    anchors_yxyx = generate_anchors(model.config, setup.image_size).to(setup.device)
    return Runner(
        lambda images: network(on_device(images, setup.device)),
        lambda outputs: postprocess_per_class(outputs[0], outputs[1], anchors_yxyx),
    )


def on_device(images: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(images).to(device)


def head_arrays(outputs: tuple[Sequence[Tensor], Sequence[Tensor]]) -> list[np.ndarray]:
    """PyTorch's head outputs as arrays, class outputs first."""
    found: list[Any] = [*outputs[0], *outputs[1]]
    return [tensor.float().cpu().numpy() for tensor in found]
