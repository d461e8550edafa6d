"""Work on a GPU stays there. No GPU is needed: PyTorch's fake tensors have a device, shape and dtype only.

Code that mixes devices, or reads a value (a GPU synchronisation), fails on them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pytorch_model import create_model
from pytorch_model.anchors import generate_anchors
from pytorch_model.detection.postprocess import postprocess_global, postprocess_per_class
from pytorch_model.detection.preprocess import preprocess
from pytorch_model.detection.settings import PYFUNC_METHODS, TF_METHODS, NMSConfig

DEVICE = "lazy:0"  # any device except the CPU; PyTorch knows this one in every build
SIZE = (128, 192)
MODEL = create_model("efficientdet-lite0", image_size=SIZE).eval()
CONFIGS = [
    *(NMSConfig(method=method, max_nms_inputs=count) for method in TF_METHODS for count in (0, 5000)),
    *(NMSConfig(method=method, pyfunc=True) for method in PYFUNC_METHODS),
]


@pytest.fixture(autouse=True)
def no_values() -> Iterator[None]:
    with FakeTensorMode():
        yield


class Staying(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode in which every new tensor must be on the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            assert not isinstance(tensor, Tensor) or str(tensor.device) == DEVICE, f"{func} leaves the GPU"
        return made


def staying() -> Staying:
    return Staying()  # type: ignore[no-untyped-call]


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def head_outputs(batch: int = 2) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Head outputs of the network and the anchors, on the GPU."""
    own = itertools.chain(MODEL.named_parameters(), MODEL.named_buffers())
    tensors = {name: on_gpu(*tensor.shape, dtype=tensor.dtype) for name, tensor in own}
    with torch.no_grad(), staying():
        outputs = torch.func.functional_call(MODEL, tensors, (on_gpu(batch, 3, *SIZE),))
    return *outputs, on_gpu(*generate_anchors(MODEL.config, SIZE).shape)


def test_the_network() -> None:
    class_outputs, box_outputs, anchors_yxyx = head_outputs()
    assert {str(tensor.device) for tensor in (*class_outputs, *box_outputs, anchors_yxyx)} == {DEVICE}


@pytest.mark.parametrize("nms", CONFIGS, ids=lambda nms: f"{nms.method}-{nms.pyfunc}-{nms.max_nms_inputs}")
def test_suppression_within_classes(nms: NMSConfig) -> None:
    outputs = head_outputs()
    with staying():
        found = postprocess_per_class(*outputs, nms, on_gpu(2))
    assert {str(tensor.device) for tensor in found} == {DEVICE}
    assert found.boxes_yxyx.shape == (2, 100, 4)


def test_suppression_across_classes() -> None:
    outputs = head_outputs()
    with staying():
        found = postprocess_global(*outputs, SIZE, NMSConfig(scope="global"), on_gpu(2))
    assert {str(tensor.device) for tensor in found} == {DEVICE}
    assert found.boxes_yxyx.shape == (2, 100, 4)


def test_preprocessing() -> None:
    pictures = [on_gpu(3, 90, 70, dtype=torch.uint8), on_gpu(3, 300, 300, dtype=torch.uint8)]
    for images in (pictures, on_gpu(2, 3, 80, 60, dtype=torch.uint8)):
        batch = preprocess(images, MODEL.config, SIZE, device=torch.device(DEVICE))
        assert str(batch.images.device) == str(batch.image_scales.device) == DEVICE
        assert batch.images.shape == (2, 3, *SIZE)


def test_leaving_the_gpu_fails() -> None:
    class_outputs, box_outputs, anchors_yxyx = head_outputs()
    with pytest.raises(DataDependentOutputException):
        class_outputs[0].max().item()
    with pytest.raises(RuntimeError, match="devices"):
        postprocess_per_class(class_outputs, box_outputs, torch.empty(anchors_yxyx.shape))
    with pytest.raises(AssertionError, match="leaves the GPU"), staying():
        class_outputs[0].cpu()
