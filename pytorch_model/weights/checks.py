"""Checks of tensors that were read from a file: kind, size, digest, and whether they fit the network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pytorch_model.errors import Reason, WeightsError

DIGEST = "content_sha256"  # the metadata entry: a checksum of all tensors and all other metadata

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
#: The dtypes a weight file may hold: a file stores every value of such a tensor as it is.
DTYPES = frozenset((*_FLOATING, *_WHOLE))
_LONGEST_NAME = 500  # characters; the longest name in these networks has 55


def plain_tensors(
    state_dict: Mapping[Any, Any], source: str, size: int, *, shared: bool = True
) -> dict[str, Any]:
    """``state_dict`` with every tensor contiguous. Other values stay; :func:`check_state_dict` names them.

    ``size``: bytes of the file ``source``, which must hold every value of every tensor. A few bytes can
    describe a tensor of gigabytes that repeats one value, so the sizes are summed before any tensor is
    copied. ``shared``: a tensor under several names counts once. Raises :class:`WeightsError` on a tensor
    whose dtype is not in :data:`DTYPES`, or that is not a plain array on the CPU.
    """
    views: dict[Any, Tensor] = {}
    keys: dict[str, Any] = {}
    needed = 0
    for key, tensor in state_dict.items():
        if not isinstance(key, str) or len(key) > _LONGEST_NAME or not key.isprintable():
            raise WeightsError(
                f"{source} calls a tensor {key!a:.40}, which is not a valid name; convert it again"
            )
        if not isinstance(tensor, Tensor):
            continue
        kind = _unusual_kind(tensor)
        if kind:
            raise WeightsError(f"{source}: {key} is {kind}, which cannot be used here; save it as float32")
        start = tensor.data_ptr()
        view = (start, tensor.dtype, tensor.shape, tensor.stride()) if shared else key
        needed += 0 if view in views else tensor.nbytes
        views[view], keys[key] = tensor, view
    if needed > size:
        raise WeightsError(
            f"{source} describes {needed} bytes of tensors and has {size}; it is damaged or made to exhaust "
            "memory: download it again, or save each tensor with .contiguous()"
        )
    plain = {view: tensor.detach().contiguous() for view, tensor in views.items()}
    return {key: plain[keys[key]] if key in keys else value for key, value in state_dict.items()}


def _unusual_kind(tensor: Tensor) -> str:
    """The reason why ``tensor`` is not a plain array on the CPU, in words; empty if it is one."""
    if tensor.is_nested or tensor.layout != torch.strided:
        return "nested" if tensor.is_nested else "sparse"
    if tensor.device.type != "cpu":
        return "without values (on the meta device)"
    if tensor.is_quantized:
        return "quantised"
    if tensor.dtype not in DTYPES or tensor.is_neg():
        return str(tensor.dtype).removeprefix("torch.")
    return ""


def content_digest(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all tensors and of ``metadata``, in sorted order."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for key, tensor in sorted(state_dict.items()):
        if not isinstance(tensor, Tensor):  # check_state_dict rejects it, with a better reason
            continue
        digest.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_digest(state_dict: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Remove the digest from ``metadata`` and compare it with the contents; files without one pass.

    Raises :class:`Reason` if they differ.
    """
    stated = metadata.pop(DIGEST, None)
    about = {key: text for key, text in metadata.items() if key != "format"}
    if stated is not None and stated != content_digest(state_dict, about):
        raise Reason(f"its {DIGEST} does not fit its contents, which were changed after it was written")


def check_state_dict(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], model: str, source: str
) -> None:
    """Raise :class:`WeightsError` unless ``state_dict`` has exactly the keys and shapes of ``expected``.

    ``expected``: the network's own state dict; only shapes and dtypes are used, so it may be on the meta
    device. All floating-point tensors must have one dtype and finite values. ``model`` and ``source`` name
    the two in messages.
    """
    for what, keys in (
        ("lacks", expected.keys() - state_dict.keys()),
        ("has", state_dict.keys() - expected.keys()),
    ):
        if keys:
            name, more = min(keys), f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            kind = "tensor" if what == "lacks" else "unknown tensor"
            raise WeightsError(f"{source} {what} {kind} {name}{more}: it does not fit {model}")
    dtypes: dict[str, str] = {}
    for key, tensor in expected.items():
        found = state_dict[key]
        if isinstance(found, Tensor) and found.shape != tensor.shape:
            raise WeightsError(f"{source}: {key} is {list(found.shape)}, {model} needs {list(tensor.shape)}")
        _check_tensor(f"{source}: {key}", found, tensor.is_floating_point(), dtypes)


def _check_tensor(where: str, tensor: Any, floating: bool, dtypes: dict[str, str]) -> None:
    """``dtypes`` keeps the first floating-point dtype that was met."""
    if not isinstance(tensor, Tensor):
        raise WeightsError(f"{where} is not a tensor but {type(tensor).__name__}; convert it again")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_floating_point() != floating:
        raise WeightsError(f"{where} is {dtype}, which this network cannot use; convert it again")
    if floating and dtypes.setdefault("floating", dtype) != dtype:
        raise WeightsError(f"{where} is {dtype} but other tensors are {dtypes['floating']}; convert it again")
    if floating and not bool(tensor.isfinite().all()):
        raise WeightsError(f"{where} holds NaN or infinite values; convert it again")
