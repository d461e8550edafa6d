"""One training step: loss with weight decay, gradient, clipping, update, averages, in AutoML's order.

Sources: AutoML ``det_model_fn.py`` (``_model_fn``), ``tf2/train_lib.py`` (``EfficientDetNetTrain``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pytorch_model.config import shown
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.errors import ConfigError
from pytorch_model.training.averages import Averages
from pytorch_model.training.clipping import Norms, clip_gradients, stacked_parameters
from pytorch_model.training.losses import (
    DetectionLoss,
    average_normaliser,
    decay_loss,
    decayed,
    detection_loss,
)
from pytorch_model.training.optimizers import make_optimizer, set_rate
from pytorch_model.training.recipe import Recipe
from pytorch_model.training.schedule import Schedule
from pytorch_model.training.targets import Targets


class Batch(NamedTuple):
    """Images [N, 3, H, W], their targets, and what stochastic depth decides by (``EfficientDet.draw``)."""

    images: Tensor
    targets: Targets
    draws: Tensor | None = None


class StepResult(NamedTuple):
    """Scalars on the model's device, all of the step before the update; ``rate`` is the one it used.

    ``total`` is ``losses.total`` plus ``decay``.
    """

    total: Tensor
    losses: DetectionLoss
    decay: Tensor
    rate: float
    norms: Norms


class TrainStep:
    """``train_step(batch)``, or ``train_step(*parts)``: one batch, its gradient accumulated over parts.

    ``anchors_yxyx``: [A, 4], those of the targets. ``variables``: state-dict key → AutoML's names for it,
    which only ``var_freeze_expr`` reads. ``averages``: those of an earlier run, by state-dict key.

    The batch norms use a batch's own statistics, in frozen layers too; with several parts, each part's. The
    losses are normalised by the positive anchors of all parts. ``steps`` counts the updates.

    Where ``torch.distributed`` is initialised, the batch is that of all processes, each with its own parts:
    the normaliser is theirs together, and so are the result and the gradient, which is clipped after that.
    The weights begin as the first process has them. Batch norms know their own process only.
    """

    def __init__(
        self,
        model: EfficientDet,
        recipe: Recipe,
        schedule: Schedule,
        anchors_yxyx: Tensor,
        variables: Mapping[str, Sequence[str]],
        averages: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.recipe, self.schedule = model, recipe, schedule
        if dist.is_initialized():
            _take_weights_of_first(model)
        if recipe.var_freeze_expr:
            freeze(model, recipe.var_freeze_expr, variables)
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.parameters.values(), recipe)
        self.averages = Averages(model, recipe, averages)
        self.steps = 0
        self.normaliser: float | Tensor = 0.0  # the moving one of ``positives_momentum``
        self._anchors = anchors_yxyx
        self._stacked = stacked_parameters(model)
        kernels = decayed(model).values()
        self._decayed = [w for w in kernels if w.requires_grad or recipe.decays_frozen]

    def __call__(self, *parts: Batch) -> StepResult:
        if not self.model.training:
            self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        normaliser = self._normaliser(parts)
        losses = torch.stack([self._backward(part, normaliser) for part in parts]).sum(dim=0)
        _sum_over_processes([losses, *(p.grad for p in self.parameters.values() if p.grad is not None)])
        decay = decay_loss(self._decayed, self.recipe.weight_decay)
        if decay.requires_grad:  # once, whatever the number of processes
            decay.backward()  # type: ignore[no-untyped-call]
        norms = clip_gradients(list(self.parameters.values()), self._stacked, self.recipe.clip_norm)
        rate = self.schedule(self.steps)
        set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.averages.update(self.steps)
        self.steps += 1
        decay = decay.detach()
        return StepResult(losses[0] + decay, DetectionLoss(*losses), decay, rate, norms)

    def _normaliser(self, parts: Sequence[Batch]) -> float | Tensor:
        positives = torch.stack([part.targets.positives.sum() for part in parts]).sum()
        _sum_over_processes([positives])
        normaliser: float | Tensor = positives + 1
        if self.recipe.positives_momentum:
            momentum = self.recipe.positives_momentum
            normaliser = self.normaliser = average_normaliser(self.normaliser, normaliser, momentum)
        return normaliser

    def _backward(self, part: Batch, normaliser: float | Tensor) -> Tensor:
        """Add a part's gradient; its losses [4], detached."""
        outputs = self.model(part.images, part.draws)
        dtype = next(self.model.parameters()).dtype
        classes, boxes = ([x.to(dtype) for x in kind] for kind in outputs)  # autocast may have narrowed them
        loss = detection_loss(classes, boxes, part.targets, normaliser, self.recipe.losses, self._anchors)
        loss.total.backward()  # type: ignore[no-untyped-call]
        return torch.stack(loss).detach()


def _take_weights_of_first(model: EfficientDet) -> None:
    for tensor in model.state_dict().values():
        value = tensor.contiguous()  # as a message must be, whatever the memory format
        dist.broadcast(value, src=0)
        tensor.copy_(value)


def _sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """In place, in one message. With the global normaliser, the sum of losses is that of one whole batch."""
    if dist.is_initialized():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split_with_sizes([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


def freeze(model: EfficientDet, expression: str, variables: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Stop training every parameter whose name in AutoML, with ``:0`` behind it, begins with a match.

    The statistics of frozen batch norms still follow the batches, as in AutoML. Returns the parameters'
    names. Raises :class:`ConfigError` if nothing or everything matches, or only some inputs of a fusion,
    which is one parameter here.
    """
    pattern, frozen = re.compile(expression), []
    for key, parameter in model.named_parameters():
        matches = {pattern.match(f"{name}:0") is not None for name in variables[key]}
        if len(matches) > 1:
            raise ConfigError(
                f"var_freeze_expr={shown(expression)} freezes only some of {', '.join(variables[key])}; "
                "write it so that all or none match"
            )
        if matches == {True}:
            parameter.requires_grad_(False)
            frozen.append(key)
    if not frozen or len(frozen) == len(list(model.parameters())):
        raise ConfigError(
            f"var_freeze_expr={shown(expression)} matches {'every' if frozen else 'no'} variable; it must "
            "match some, from the beginning of AutoML's name, as in efficientnet or fpn_cells"
        )
    return tuple(frozen)
