"""The accuracy that other ways of running the weights cost: half precision, another layout, fused layers.

The proof compares two networks in one arithmetic, and a user may run another. Each row here compares the
network's outputs, computed in one such way, with those of the same network in float64, which the proof
compares with TensorFlow's. Nothing is judged: the user decides how much accuracy a use can spare.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from porting.errors import Reason
from porting.parity.lockstep import tf32
from porting.parity.measure import Difference, difference
from pytorch_model.bifpn import BiFPNNode, Resample
from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.layers import ConvBnAct

COMPILED = "torch.compile"

#: The rows, in their order.
PRECISIONS = (
    "float32",
    "channels_last",
    "fused batch norm",
    COMPILED,
    "bfloat16",
    "float16",
    "GPU, TF32 off",
    "GPU, TF32 on",
)

#: All except the one whose compiler takes minutes on a CPU.
QUICK_PRECISIONS = tuple(name for name in PRECISIONS if name != COMPILED)

#: Class logits and box regressions, each with all levels in one array: float64 [values].
Outputs = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class PrecisionCost:
    """The errors of one way of running the network. ``score``: the largest change of any class score, in 0…1.

    ``skipped``: why it could not be run here; then the figures are None.
    """

    name: str
    classes: Difference | None = None
    boxes: Difference | None = None
    score: float | None = None
    skipped: str | None = None


class _SkippedError(Reason):
    """The reason why the network cannot be run in this way here."""


def measure_precisions(
    config: EfficientDetConfig,
    state_dict: Mapping[str, torch.Tensor],
    images: np.ndarray,
    device: str = "cpu",
    names: Collection[str] = QUICK_PRECISIONS,
) -> Iterator[PrecisionCost]:
    """Measure the rows ``names``, some of :data:`PRECISIONS`, and yield each when it is done, float32 first.

    ``images``: float32 [N, H, W, 3], normalised. ``device``: where all rows except the GPU's run. In addition
    to the memory of one run, this holds the outputs of the float64 network and a copy of the weights. Raises
    :class:`WeightsError` unless ``state_dict`` fits ``config``.
    """
    model = EfficientDet.from_state_dict(state_dict, config)
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    exact = _outputs(copy.deepcopy(model).double(), x.double())
    for name in (name for name in PRECISIONS if name in names):
        run = _WAYS[name]
        try:
            yield _cost(name, run(copy.deepcopy(model), x, device), exact)
        except _SkippedError as reason:
            yield PrecisionCost(name, skipped=str(reason))
        except Exception as error:  # a missing kernel, a failing compiler: torch raises many types
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            yield PrecisionCost(name, skipped=f"not possible here: {first[:200]}")


def fuse_batch_norms(model: EfficientDet) -> int:
    """Fold every batch norm that has its own convolution into it, in place. Returns how many.

    The heads keep their batch norms: there, one convolution feeds one batch norm per level.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, (ConvBnAct, Resample)) and module.conv is not None and module.bn is not None:
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()  # type: ignore[assignment]
            count += 1
        elif isinstance(module, BiFPNNode):
            module.conv.pointwise = fuse_conv_bn_eval(module.conv.pointwise, module.bn)
            module.bn = nn.Identity()  # type: ignore[assignment]
            count += 1
    return count


def _outputs(model: nn.Module, x: torch.Tensor) -> Outputs:
    with torch.no_grad():
        classes, boxes = model(x)
    return _joined(classes), _joined(boxes)


def _joined(levels: list[torch.Tensor]) -> np.ndarray:
    return torch.cat([level.double().cpu().reshape(-1) for level in levels]).numpy()


def _cost(name: str, ours: Outputs, exact: Outputs) -> PrecisionCost:
    scores, expected = (1 / (1 + np.exp(-np.clip(x[0], -700, 700))) for x in (ours, exact))
    change = float(np.abs(scores - expected).max())
    return PrecisionCost(name, difference(ours[0], exact[0]), difference(ours[1], exact[1]), change)


# --- the ways, each on a copy of the model ---------------------------------------------------------------


def _plain(model: EfficientDet, x: torch.Tensor, device: str) -> Outputs:
    with tf32(False):
        return _outputs(model.to(device), x.to(device))


def _channels_last(model: EfficientDet, x: torch.Tensor, device: str) -> Outputs:
    layout = torch.channels_last
    with tf32(False):
        return _outputs(
            model.to(device).to(memory_format=layout),  # type: ignore[call-overload]
            x.to(device).contiguous(memory_format=layout),
        )


def _fused(model: EfficientDet, x: torch.Tensor, device: str) -> Outputs:
    fuse_batch_norms(model)
    return _plain(model, x, device)


def _compiled(model: EfficientDet, x: torch.Tensor, device: str) -> Outputs:
    with tf32(False):
        return _outputs(torch.compile(model.to(device)), x.to(device))  # type: ignore[arg-type]


def _in(dtype: torch.dtype) -> Callable[[EfficientDet, torch.Tensor, str], Outputs]:
    def run(model: EfficientDet, x: torch.Tensor, device: str) -> Outputs:
        return _outputs(model.to(device, dtype), x.to(device, dtype))

    return run


def _on_gpu(allowed: bool) -> Callable[[EfficientDet, torch.Tensor, str], Outputs]:
    def run(model: EfficientDet, x: torch.Tensor, device: str) -> Outputs:
        if not torch.cuda.is_available():
            raise _SkippedError("no GPU here")
        on = device if device.startswith("cuda") else "cuda"
        with tf32(allowed):
            return _outputs(model.to(on), x.to(on))

    return run


_WAYS: dict[str, Callable[[EfficientDet, torch.Tensor, str], Outputs]] = {
    "float32": _plain,
    "channels_last": _channels_last,
    "fused batch norm": _fused,
    COMPILED: _compiled,
    "bfloat16": _in(torch.bfloat16),
    "float16": _in(torch.float16),
    "GPU, TF32 off": _on_gpu(False),
    "GPU, TF32 on": _on_gpu(True),
}
