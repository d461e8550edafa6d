"""Parameters and multiply-adds: ours compared with AutoML's count and the published figures.

*Parameters*: AutoML counts its trainable variables; ours are the same without the biases before a batch norm.
*Multiply-adds*: we count one for each product in a convolution. A batch norm can be folded into the
convolution before it, and biases, activations, fusion, pooling and resizing are left out. The published
figures (AutoML ``utils.num_params_flops``) are half of all float operations in TensorFlow's profiler, which
includes those, so they are higher by 0.3 to 1.7 %.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

from pytorch_model.config import MODELS, EfficientDetConfig, model_config
from pytorch_model.weights.catalogue import tensor_specs
from tf_reference.variables import variable_shapes, variables

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Published:
    """Published figures as printed, in millions of parameters and billions of multiply-adds.

    They are from the paper if it lists the model (arXiv 1911.09070v7, table 2), else from AutoML's Lite page,
    which lists no multiply-adds.
    """

    parameters: str
    multiply_adds: str | None = None


PUBLISHED: Mapping[str, Published] = {
    "efficientdet-d0": Published("3.9", "2.5"),
    "efficientdet-d1": Published("6.6", "6.1"),
    "efficientdet-d2": Published("8.1", "11"),
    "efficientdet-d3": Published("12", "25"),
    "efficientdet-d4": Published("21", "55"),
    "efficientdet-d5": Published("34", "135"),
    "efficientdet-d6": Published("52", "226"),
    "efficientdet-d7": Published("52", "325"),
    "efficientdet-d7x": Published("77", "410"),
    "efficientdet-lite0": Published("3.2"),
    "efficientdet-lite1": Published("4.2"),
    "efficientdet-lite2": Published("5.3"),
    "efficientdet-lite3": Published("8.4"),
    "efficientdet-lite3x": Published("9.3"),
    "efficientdet-lite4": Published("15.1"),
}

#: The parts of the paper's figure 3; resampling to P6 and above counts as BiFPN.
PARTS = ("backbone", "bifpn", "class_net", "box_net")


def rounds_to(count: int, published: str, unit: float) -> bool:
    """Whether ``count`` in ``unit``s, rounded to the digits of ``published``, equals ``published``."""
    decimals = len(published.partition(".")[2])
    return f"{count / unit:.{decimals}f}" == published


@dataclass(frozen=True)
class ParameterAudit:
    """Part → count: AutoML's trainable ones in ``automl_parts``, ``EfficientDet(config)``'s in ``our_parts``.

    ``published``: the printed figure in millions, None for a model without one (with other classes, for
    example).
    """

    automl_parts: Mapping[str, int]
    our_parts: Mapping[str, int]
    published: str | None

    @property
    def automl(self) -> int:
        return sum(self.automl_parts.values())

    @property
    def ours(self) -> int:
        return sum(self.our_parts.values())

    @property
    def removed_biases(self) -> int:
        return self.automl - self.ours

    @property
    def agrees(self) -> bool | None:
        """Whether AutoML's count, rounded to as many digits as were printed, is the published figure."""
        return None if self.published is None else rounds_to(self.automl, self.published, 1e6)


@cache
def audit_parameters(config: EfficientDetConfig) -> ParameterAudit:
    """Count both sides of ``config`` from their declared variables, without allocating tensors."""
    automl, ours = Counter[str](), Counter[str]()
    for variable in variables(config):
        if variable.trainable:
            automl[_part(variable.name, "/")] += math.prod(variable.shape)
    for key, spec in tensor_specs(config).items():
        if spec.trainable:
            ours[_part(key, ".")] += math.prod(spec.shape)
    published = PUBLISHED[config.name].parameters if is_released(config) else None
    return ParameterAudit(_in_order(automl), _in_order(ours), published)


def is_released(config: EfficientDetConfig) -> bool:
    """Whether ``config`` has exactly the variables of the model it is named after."""
    return config.name in MODELS and variable_shapes(config) == variable_shapes(model_config(config.name))


def multiply_adds(config: EfficientDetConfig, image_size: tuple[int, int] | None = None) -> dict[str, int]:
    """Part → multiply-adds of the convolutions, for one image of ``image_size`` (None: the config's).

    The network runs on shapes only, without values.
    """
    return dict(_multiply_adds(config, image_size or config.input_size))


@cache
def _multiply_adds(config: EfficientDetConfig, image_size: tuple[int, int]) -> dict[str, int]:
    import torch

    from pytorch_model.efficientdet import EfficientDet

    counts = Counter[str]()
    with torch.device("meta"):
        model = EfficientDet(config).eval()
        images = torch.empty(1, 3, *image_size)

    def count(part: str) -> Any:
        def hook(conv: torch.nn.Conv2d, inputs: Any, output: torch.Tensor) -> None:
            counts[part] += output.numel() * conv.weight[0].numel()  # [in / groups, h, w] for each output

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count(_part(name, ".")))
    with torch.no_grad():
        model(images)
    return _in_order(counts)


@dataclass(frozen=True)
class ModelAudit:
    """One model at its native resolution."""

    config: EfficientDetConfig
    parameters: ParameterAudit
    multiply_add_parts: Mapping[str, int]

    @cached_property
    def multiply_adds(self) -> int:
        return sum(self.multiply_add_parts.values())

    @property
    def published_multiply_adds(self) -> str | None:
        return PUBLISHED[self.config.name].multiply_adds

    @property
    def multiply_adds_agree(self) -> bool | None:
        """Whether our count, rounded as the paper's figure is, equals it. We count fewer operations."""
        published = self.published_multiply_adds
        return None if published is None else rounds_to(self.multiply_adds, published, 1e9)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; differences are count / published − 1."""
        published, billions = self.parameters.published, self.published_multiply_adds
        return {
            "model": self.config.name,
            "image_size": list(self.config.image_size),
            "parameters": {
                "automl": {**self.parameters.automl_parts, "total": self.parameters.automl},
                "ours": {**self.parameters.our_parts, "total": self.parameters.ours},
                "removed_biases": self.parameters.removed_biases,
                "published_millions": published,
                "difference": difference(self.parameters.automl, published, 1e6),
                "agrees": self.parameters.agrees,
            },
            "multiply_adds": {
                **self.multiply_add_parts,
                "total": self.multiply_adds,
                "published_billions": billions,
                "difference": difference(self.multiply_adds, billions, 1e9),
                "agrees": self.multiply_adds_agree,
            },
        }


def audit(model: str) -> ModelAudit:
    """Audit one model. Raises :class:`ConfigError` for an unknown name."""
    config = model_config(model)
    return ModelAudit(config, audit_parameters(config), multiply_adds(config))


def difference(count: int, published: str | None, unit: float) -> float | None:
    """The relative difference of ``count`` from the printed figure."""
    return None if published is None else count / (float(published) * unit) - 1


def _part(name: str, separator: str) -> str:
    first = name.partition(separator)[0]
    if first.startswith("efficientnet-"):
        return "backbone"
    return "bifpn" if first.startswith(("resample", "fpn_cells")) else first


def _in_order(counts: Counter[str]) -> dict[str, int]:
    if counts.keys() - set(PARTS):
        raise ValueError(f"not a part of the network: {counts.keys() - set(PARTS)}")
    return {part: counts[part] for part in PARTS}
