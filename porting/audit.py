"""Parameters: ours against AutoML's count and the published figure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pytorch_model.config import MODELS, EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from tf_reference.variables import variable_shapes, variables

#: Millions of parameters as published: D0–D7x in the paper (arXiv 1911.09070v7), Lite in AutoML's README.
PUBLISHED_MILLIONS = {
    "efficientdet-d0": "3.9",
    "efficientdet-d1": "6.6",
    "efficientdet-d2": "8.1",
    "efficientdet-d3": "12",
    "efficientdet-d4": "21",
    "efficientdet-d5": "34",
    "efficientdet-d6": "52",
    "efficientdet-d7": "52",
    "efficientdet-d7x": "77",
    "efficientdet-lite0": "3.2",
    "efficientdet-lite1": "4.2",
    "efficientdet-lite2": "5.3",
    "efficientdet-lite3": "8.4",
    "efficientdet-lite3x": "9.3",
    "efficientdet-lite4": "15.1",
}


@dataclass(frozen=True)
class ParameterAudit:
    """``automl``: trainable parameters of AutoML's graph. ``ours``: of ``EfficientDet(config)``, bias-free.

    ``published`` is the printed figure in millions, None for a model nobody published (other classes, say).
    """

    automl: int
    ours: int
    published: str | None

    @property
    def removed_biases(self) -> int:
        return self.automl - self.ours

    @property
    def agrees(self) -> bool | None:
        """Does AutoML's count, rounded to as many digits as were printed, give the published figure?"""
        if self.published is None:
            return None
        decimals = len(self.published.partition(".")[2])
        return f"{self.automl / 1e6:.{decimals}f}" == self.published


def audit_parameters(config: EfficientDetConfig) -> ParameterAudit:
    """Count both sides of ``config`` from their declared variables; nothing is allocated."""
    automl = sum(math.prod(variable.shape) for variable in variables(config) if variable.trainable)
    with torch.device("meta"):
        ours = sum(parameter.numel() for parameter in EfficientDet(config).parameters())
    released = config.name in MODELS and variable_shapes(config) == variable_shapes(model_config(config.name))
    return ParameterAudit(automl, ours, PUBLISHED_MILLIONS[config.name] if released else None)
