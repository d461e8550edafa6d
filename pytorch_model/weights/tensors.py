"""Tensors of either kind: PyTorch's, or NumPy arrays. Only what handles PyTorch's imports torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

AnyTensor: TypeAlias = "Tensor | np.ndarray"

#: The dtypes a weight file may hold: a file stores every value of such a tensor as it is. With their names in
#: safetensors, in the order in which that library stores tensors, so that each is aligned.
DTYPES: Mapping[str, str] = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}

#: Floats of both PyTorch and NumPy.
_SHARED = ("float64", "float32", "float16")


def is_tensor(value: object) -> TypeGuard[AnyTensor]:
    """Whether ``value`` is a tensor of either kind."""
    return isinstance(value, np.ndarray) or is_torch(value)


def is_torch(value: object) -> TypeGuard[Tensor]:
    """Whether ``value`` is a tensor of PyTorch. There is none if nobody imported it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def dtype_name(tensor: AnyTensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def is_floating(tensor: AnyTensor) -> bool:
    return "float" in dtype_name(tensor)


def is_finite(tensor: AnyTensor) -> bool:
    """Whether no value is NaN or infinite."""
    if not isinstance(tensor, np.ndarray) and tensor.device.type == "cpu" and dtype_name(tensor) in _SHARED:
        tensor = tensor.detach().numpy()  # PyTorch's threads cost more than this check of a small tensor
    finite = np.isfinite(tensor) if isinstance(tensor, np.ndarray) else tensor.isfinite()
    return bool(finite.all())


def raw_bytes(tensor: AnyTensor) -> memoryview:
    """The values as a file stores them: row-major, without padding."""
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def as_tensors(state_dict: Mapping[str, AnyTensor]) -> dict[str, Tensor]:
    """``state_dict`` with PyTorch's tensors; arrays are copied, because a network changes its tensors."""
    import torch

    return {
        key: torch.tensor(value) if isinstance(value, np.ndarray) else value
        for key, value in state_dict.items()
    }


def as_array(tensor: AnyTensor) -> np.ndarray:
    """The values as float64 if that is their dtype, else as float32, which holds every smaller float."""
    if not isinstance(tensor, np.ndarray):
        tensor = tensor.detach().cpu()
        tensor = (tensor if dtype_name(tensor) == "float64" else tensor.float()).numpy()
    return tensor if tensor.dtype == np.float64 else tensor.astype(np.float32, copy=False)
