"""Weights for inference: batch norms folded into convolutions, fusion weights normalised, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pytorch_model.bifpn import FASTATTN_EPSILON
from pytorch_model.config import BN_EPSILON
from pytorch_model.errors import WeightsError
from pytorch_model.weights.tensors import is_finite


class FoldedWeights:
    """The weights of layers, by their keys in ``state_dict``. Computed in float64, rounded to ``dtype``.

    Raises :class:`WeightsError` for weights that are not finite.
    """

    def __init__(self, state_dict: Mapping[str, Tensor], method: str, dtype: torch.dtype) -> None:
        self._tensors, self._method, self._dtype = state_dict, method, dtype

    def conv(self, conv: str, bn: str | None) -> tuple[Tensor, Tensor | None]:
        """(weight [out, in / groups, k, k], bias [out] or None) of a convolution and its batch norm."""
        weight = self._double(f"{conv}.weight")
        bias = self._double(f"{conv}.bias") if f"{conv}.bias" in self._tensors else None
        if bn is not None:
            scale = self._double(f"{bn}.weight") / (self._double(f"{bn}.running_var") + BN_EPSILON).sqrt()
            weight = weight * scale[:, None, None, None]
            shift = (0 if bias is None else bias) - self._double(f"{bn}.running_mean")
            bias = self._double(f"{bn}.bias") + shift * scale
        for tensor in (weight, bias):
            # Some operations of other engines turn NaN into a number.
            if tensor is not None and not is_finite(tensor):
                raise WeightsError(
                    f"{bn or conv} is not finite (NaN or infinity): the weights are damaged; convert "
                    "them again"
                )
        return weight.to(self._dtype), None if bias is None else bias.to(self._dtype)

    def fusion(self, key: str) -> Tensor:
        """The normalised fusion weights, [inputs, 1 or channels, 1, 1]."""
        weights = self._double(key)
        if self._method.endswith("fastattn"):
            weights = torch.relu(weights)
            weights = weights / (weights.sum(dim=0) + FASTATTN_EPSILON)
        else:
            weights = torch.softmax(weights, dim=0)
        return weights.reshape(len(weights), -1, 1, 1).to(self._dtype)

    def _double(self, key: str) -> Tensor:
        return self._tensors[key].detach().double()
