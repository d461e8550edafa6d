"""One fault at a time is put into a right model; the report must name the layer, and what is wrong there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parity_tests.helpers.recordings import normalise
from porting.convert import apply_rules
from porting.parity import compare, tensorflow_reference
from porting.parity.diagnosis.diagnose import Diagnosis, diagnose
from porting.rules import rules
from porting.scopes import EMA_SUFFIX
from porting.synthetic import synthetic_checkpoint, synthetic_image
from pytorch_model.config import model_config
from pytorch_model.efficientdet import EfficientDet

pytestmark = pytest.mark.usefixtures("tensorflow")

CONFIG = model_config("efficientdet-d0", fpn_cell_repeats=2)
SCOPE = CONFIG.backbone.name


@pytest.fixture(scope="module")
def content() -> dict[str, np.ndarray]:
    return synthetic_checkpoint(CONFIG)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return normalise(synthetic_image(128, 128)[None], CONFIG).astype(np.float64)


def values(content: dict[str, np.ndarray], suffix: str) -> dict[str, np.ndarray]:
    return {
        name.removesuffix(EMA_SUFFIX): value
        for name, value in content.items()
        if name.endswith(EMA_SUFFIX) == bool(suffix) and name != "global_step"
    }


Sabotage = Callable[[EfficientDet, dict[str, np.ndarray], dict[str, np.ndarray]], None]


def tensor(model: EfficientDet, key: str) -> torch.Tensor:
    return model.state_dict()[key]


def edit(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Sabotage:
    def sabotage(model: EfficientDet, ema: Any, raw: Any) -> None:
        tensor(model, key).copy_(change(tensor(model, key).clone()))

    return sabotage


def put(key: str, make: Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], np.ndarray]) -> Sabotage:
    def sabotage(model: EfficientDet, ema: dict[str, np.ndarray], raw: dict[str, np.ndarray]) -> None:
        tensor(model, key).copy_(torch.from_numpy(np.array(make(ema, raw), np.float64)))

    return sabotage


def swap(one: str, two: str) -> Sabotage:
    def sabotage(model: EfficientDet, ema: Any, raw: Any) -> None:
        a, b = tensor(model, one), tensor(model, two)
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)

    return sabotage


def attribute(path: str, name: str, value: Any) -> Sabotage:
    def sabotage(model: EfficientDet, ema: Any, raw: Any) -> None:
        setattr(model.get_submodule(path), name, value)

    return sabotage


def forward(path: str, replacement: Callable[..., torch.Tensor]) -> Sabotage:
    def sabotage(model: EfficientDet, ema: Any, raw: Any) -> None:
        module = model.get_submodule(path)
        module.forward = lambda *inputs: replacement(module, *inputs)

    return sabotage


def pad_before(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Stride 2 on an even size, with the odd row ahead of the image instead of after it."""
    extra = module.kernel_size[0] - 2
    before, after = extra - extra // 2, extra // 2
    return F.conv2d(F.pad(x, (before, after, before, after)), module.weight, None, 2, 0, 1, module.groups)


def resize_smoothly(module: Any, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(module.match_width(x), size, mode="bilinear")


def pool_with_zeros(module: Any, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.max_pool2d(F.pad(module.match_width(x), (0, 1, 0, 1)), 3, 2)


def fuse_raw(module: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
    return sum((x * w for x, w in zip(inputs, module.weights.relu(), strict=True)), torch.zeros(()))


NODE = "bifpn.cells.0.nodes.4"
FNODE = "fpn_cells/cell_0/fnode4"
P6_BIAS, P6_MEAN = "resample_p6/conv2d/bias", "resample_p6/bn/moving_mean"

#: name → (sabotage, the tap that must be named, what the kind must say)
FAULTS: dict[str, tuple[Sabotage, str, str]] = {
    "kernel height and width swapped": (
        edit("backbone.blocks.5.depthwise.conv.weight", lambda w: w.transpose(2, 3)),
        f"{SCOPE}/blocks_5/tpu_batch_normalization_1",
        "kernel layout transposed",
    ),
    "kernel in and out swapped": (
        edit(f"{NODE}.conv.pointwise.weight", lambda w: w.transpose(0, 1)),
        FNODE,
        "kernel layout transposed",
    ),
    "kernel flipped": (
        edit("backbone.stem.conv.weight", lambda w: w.flip(2, 3)),
        f"{SCOPE}/stem",
        "kernel flipped",
    ),
    "bias dropped": (
        put("resample.p6.bn.running_mean", lambda ema, raw: ema[P6_MEAN]),
        "resample_p6",
        "bias dropped",
    ),
    "bias added": (
        put("resample.p6.bn.running_mean", lambda ema, raw: ema[P6_MEAN] + ema[P6_BIAS]),
        "resample_p6",
        "bias folded with the wrong sign",
    ),
    "raw instead of averaged": (
        put(
            "class_net.convs.1.pointwise.weight",
            lambda ema, raw: raw["class_net/class-1/pointwise_kernel"].transpose(3, 2, 0, 1),
        ),
        "class_net/class-1-bn-3",
        "raw values instead of moving averages",
    ),
    "levels swapped": (
        swap("box_net.bns.1.0.weight", "box_net.bns.1.1.weight"),
        "box_net/box-1-bn-3",
        "levels swapped",
    ),
    "gamma and beta swapped": (
        swap("backbone.blocks.9.project.bn.weight", "backbone.blocks.9.project.bn.bias"),
        f"{SCOPE}/blocks_9/tpu_batch_normalization_2",
        "swapped",
    ),
    "fusion weights reversed": (
        edit(f"{NODE}.fuse.weights", lambda w: w.flip(0)),
        f"{FNODE}/fuse",
        "fusion weights in the wrong order",
    ),
    "fusion weights normalised twice": (
        edit(f"{NODE}.fuse.weights", lambda w: w.relu() / (w.relu().sum() + 1e-4)),
        f"{FNODE}/fuse",
        "fusion weights normalised twice",
    ),
    "one weight off": (
        edit("backbone.blocks.3.se.expand.bias", lambda b: b + torch.eye(len(b), dtype=b.dtype)[0]),
        f"{SCOPE}/blocks_3/se",
        "wrong values in the weights",
    ),
    "NaN": (
        edit("class_net.predict.pointwise.bias", lambda b: b * torch.nan),
        "class_outputs/3",
        "NaN",
    ),
    "epsilon": (
        attribute("backbone.blocks.2.expand.bn", "eps", 1e-5),
        f"{SCOPE}/blocks_2/tpu_batch_normalization",
        "epsilon",
    ),
    "activation": (
        attribute("backbone.blocks.7.depthwise", "act", nn.ReLU()),
        f"{SCOPE}/blocks_7/tpu_batch_normalization_1",
        "activation",
    ),
    "head activation": (
        attribute("box_net", "act", nn.ReLU()),
        "box_net/box-1-bn-3",
        "activation",
    ),
    "training mode": (
        attribute("backbone.blocks.11.project.bn", "training", True),
        f"{SCOPE}/blocks_11/tpu_batch_normalization_2",
        "training mode",
    ),
    "residual missing": (
        attribute("backbone.blocks.4", "has_residual", False),
        f"{SCOPE}/blocks_4",
        "residual",
    ),
    "softmax fusion": (
        attribute(f"{NODE}.fuse", "method", "attn"),
        f"{FNODE}/fuse",
        "fusion weights",
    ),
    "fusion unnormalised": (
        forward(f"{NODE}.fuse", fuse_raw),
        f"{FNODE}/fuse",
        "fusion weights unnormalised",
    ),
    "padding before": (
        forward("backbone.blocks.1.depthwise.conv", pad_before),
        f"{SCOPE}/blocks_1/tpu_batch_normalization_1",
        "padding on the wrong side",
    ),
    "bilinear instead of nearest": (
        forward("bifpn.cells.0.nodes.3.resample.1", resize_smoothly),
        "fpn_cells/cell_0/fnode3/resample_1_7_8",
        "resizing or pooling",
    ),
    "pooling over zeros": (
        forward("resample.p6", pool_with_zeros),
        "resample_p6",
        "resizing or pooling",
    ),
    "activation after the node": (
        attribute(NODE, "act_last", True),
        FNODE,
        "wrong order",
    ),
}


def find(sabotage: Sabotage, content: dict[str, np.ndarray], images: np.ndarray) -> Diagnosis:
    ema, raw = values(content, EMA_SUFFIX), values(content, "")
    model = EfficientDet(CONFIG).double().eval()
    model.load_state_dict(apply_rules(rules(CONFIG), ema, "float64"))
    sabotage(model, ema, raw)
    reference = tensorflow_reference(ema, CONFIG, images, "float64")
    first = compare(model, reference, images).first_divergence
    assert first is not None, "the fault went unnoticed"
    return diagnose(model, ema, raw, reference, images, first)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(fault: str, content: dict[str, np.ndarray], images: np.ndarray) -> None:
    sabotage, tap, kind = FAULTS[fault]
    with torch.no_grad():
        diagnosis = find(sabotage, content, images)
    print(f"{fault}: {diagnosis.tap}: {diagnosis.kind}; {diagnosis.detail}")
    assert diagnosis.tap == tap
    assert kind in diagnosis.kind
