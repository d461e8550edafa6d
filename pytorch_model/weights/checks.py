"""Checks of tensors that were read from a file: kind, size, digest, and whether they fit the network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytorch_model.config import EfficientDetConfig
from pytorch_model.errors import Reason, WeightsError
from pytorch_model.weights.catalogue import Spec, tensor_specs
from pytorch_model.weights.tensors import (
    DTYPES,
    AnyTensor,
    dtype_name,
    is_finite,
    is_floating,
    is_tensor,
    is_torch,
    raw_bytes,
)

if TYPE_CHECKING:
    from torch import Tensor

DIGEST = "content_sha256"  # the metadata entry: a checksum of all tensors and all other metadata

_LONGEST_NAME = 500  # characters; the longest name in these networks has 55


def plain_tensors(
    state_dict: Mapping[Any, Any], source: str, size: int, *, shared: bool = True
) -> dict[str, Any]:
    """``state_dict`` with every tensor contiguous. Other values stay; :func:`check_weights` names them.

    ``size``: bytes of the file ``source``, which must hold every value of every tensor. A few bytes can
    describe a tensor of gigabytes that repeats one value, so the sizes are summed before any tensor is
    copied. ``shared``: a tensor under several names counts once. Raises :class:`WeightsError` on a tensor
    whose dtype is not in :data:`DTYPES`, or that is not a plain array on the CPU.
    """
    views: dict[Any, Tensor] = {}
    keys: dict[str, Any] = {}
    needed = 0
    for key, tensor in state_dict.items():
        check_name(key, source)
        if not is_torch(tensor):
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


def check_name(key: Any, source: str) -> None:
    """Raise :class:`WeightsError` unless ``key`` can name a tensor in a message."""
    if not isinstance(key, str) or len(key) > _LONGEST_NAME or not key.isprintable():
        raise WeightsError(
            f"{source} calls a tensor {key!a:.40}, which is not a valid name; convert it again"
        )


def _unusual_kind(tensor: Tensor) -> str:
    """The reason why ``tensor`` is not a plain array on the CPU, in words; empty if it is one."""
    if tensor.is_nested or str(tensor.layout) != "torch.strided":
        return "nested" if tensor.is_nested else "sparse"
    if tensor.device.type != "cpu":
        return "without values (on the meta device)"
    if tensor.is_quantized:
        return "quantised"
    if dtype_name(tensor) not in DTYPES or tensor.is_neg():
        return dtype_name(tensor)
    return ""


def content_digest(state_dict: Mapping[str, AnyTensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of all tensors and of ``metadata``, in sorted order."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for key, tensor in sorted(state_dict.items()):
        if not is_tensor(tensor):  # check_weights rejects it, with a better reason
            continue
        digest.update(f"\n{key} torch.{dtype_name(tensor)} {list(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def check_digest(state_dict: Mapping[str, AnyTensor], metadata: dict[str, str]) -> None:
    """Remove the digest from ``metadata`` and compare it with the contents; files without one pass.

    Raises :class:`Reason` if they differ.
    """
    stated = metadata.pop(DIGEST, None)
    about = {key: text for key, text in metadata.items() if key != "format"}
    if stated is not None and stated != content_digest(state_dict, about):
        raise Reason(f"its {DIGEST} does not fit its contents, which were changed after it was written")


def check_weights(state_dict: Mapping[str, AnyTensor], config: EfficientDetConfig, source: str) -> None:
    """Raise :class:`WeightsError` unless ``state_dict`` fits ``EfficientDet(config)``; nothing is built.

    It must have exactly the network's keys and shapes. All floating-point tensors must have one dtype and
    finite values. ``source`` names the tensors in messages.
    """
    expected, model = tensor_specs(config), config.name
    for what, keys in (
        ("lacks", expected.keys() - state_dict.keys()),
        ("has", state_dict.keys() - expected.keys()),
    ):
        if keys:
            name, more = min(keys), f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            kind = "tensor" if what == "lacks" else "unknown tensor"
            raise WeightsError(f"{source} {what} {kind} {name}{more}: it does not fit {model}")
    dtypes: dict[str, str] = {}
    for key, spec in expected.items():
        found = state_dict[key]
        if is_tensor(found) and tuple(found.shape) != spec.shape:
            raise WeightsError(f"{source}: {key} is {list(found.shape)}, {model} needs {list(spec.shape)}")
        _check_tensor(f"{source}: {key}", found, spec, dtypes)


def _check_tensor(where: str, tensor: Any, spec: Spec, dtypes: dict[str, str]) -> None:
    """``dtypes`` keeps the first floating-point dtype that was met."""
    if not is_tensor(tensor):
        raise WeightsError(f"{where} is not a tensor but {type(tensor).__name__}; convert it again")
    dtype, floating = dtype_name(tensor), is_floating(tensor)
    if floating != ("float" in spec.dtype):
        raise WeightsError(f"{where} is {dtype}, which this network cannot use; convert it again")
    if floating and dtypes.setdefault("floating", dtype) != dtype:
        raise WeightsError(f"{where} is {dtype} but other tensors are {dtypes['floating']}; convert it again")
    if floating and not is_finite(tensor):
        raise WeightsError(f"{where} holds NaN or infinite values; convert it again")
