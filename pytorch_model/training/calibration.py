"""Batch-norm statistics for weights that have none, as those of a TFLite file: the function stays the same.

In such weights gamma and the moving statistics were made up when the folded convolutions were taken apart.
Training normalises with the batch's statistics, so the pretrained function would be lost at the first step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pytorch_model.efficientdet import EfficientDet
from pytorch_model.weights import BATCH_NORM_STATISTICS


def statistics_are_made_up(metadata: Mapping[str, str]) -> bool:
    """Whether weights with this ``metadata`` (of :func:`read_weights`) need new statistics before training.

    Files that were ported before the metadata said so are known by their source.
    """
    return BATCH_NORM_STATISTICS in metadata or "TFLite" in metadata.get("source_format", "")


def split_batch_norms_again(model: EfficientDet, batches: Iterable[Tensor]) -> None:
    """Give every batch norm the statistics of its input over ``batches``, and adapt gamma and beta, in place.

    ``batches``: normalised images [N, 3, H, W], as training sees them; each counts the same. With the mean m
    and the biased variance v of a batch norm's input in evaluation mode, and a = gamma/√(old variance + ε):
    mean = m, variance = v, gamma = a·√(v + ε), beta = beta + a·(m − old mean). So evaluation mode computes
    the same function as before, but for rounding, and training mode begins near it. The model's mode stays.

    A batch norm that no batch reached, as in a block that no level uses, stays as it is.
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    sums = {name: torch.zeros(2, norm.num_features, dtype=torch.float64) for name, norm in norms.items()}
    counts = dict.fromkeys(norms, 0)

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            sums[name] += torch.stack((mean, variance)).cpu()
            counts[name] += 1

        return norms[name].register_forward_pre_hook(hook)

    was_training = model.training
    handles = [watch(name) for name in norms]
    model.eval()
    try:
        with torch.no_grad():
            for images in batches:
                model(images)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    for name, norm in norms.items():
        if counts[name]:
            _split(norm, *(sums[name] / counts[name]))


def _split(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """In float64, so that rounding to the model's type is the only error."""
    old = {key: tensor.cpu().double() for key, tensor in norm.state_dict().items()}
    slope = old["weight"] / (old["running_var"] + norm.eps).sqrt()
    new = {
        "running_mean": mean,
        "running_var": variance,
        "weight": slope * (variance + norm.eps).sqrt(),
        "bias": old["bias"] + slope * (mean - old["running_mean"]),
    }
    norm.load_state_dict({**norm.state_dict(), **new})
