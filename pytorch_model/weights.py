"""Weight files a user keeps: tensors plus the configuration they belong to.

``.safetensors`` holds the configuration as JSON in its metadata; ``.pth`` is a dict of
``{"state_dict", "config", …}`` that ``torch.load(weights_only=True)`` accepts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytorch_model.config import EfficientDetConfig
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.errors import ConfigError, WeightsError

SUFFIXES = (".safetensors", ".pth")


def write_weights(
    path: Path, state_dict: Mapping[str, Tensor], config: EfficientDetConfig, metadata: Mapping[str, str]
) -> None:
    """Write a weight file at ``path``; its suffix, one of :data:`SUFFIXES`, chooses the format.

    ``metadata`` is free text about the tensors' origin and travels with them. Not atomic: callers write
    to a temporary name and rename. Raises :class:`WeightsError` on another suffix, ``OSError`` from the disk.
    """
    config_json = json.dumps(config.to_dict())
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        data = save(dict(state_dict), {**metadata, "config": config_json, "format": "pt"})
        _write_sorted(path, data)
    elif path.suffix == ".pth":
        content = {"state_dict": dict(state_dict), "config": config_json, "metadata": dict(metadata)}
        with path.open("wb") as file:
            torch.save(content, file)
    else:
        raise WeightsError(f"cannot write {path.name}: use a name that ends in {' or '.join(SUFFIXES)}")


def _write_sorted(path: Path, data: bytes) -> None:
    """Write serialised safetensors with the metadata sorted: the library leaves their order to chance."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its tensors
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(data)[8 + size :])


def read_weights(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], EfficientDetConfig, dict[str, str]]:
    """Read what :func:`write_weights` wrote: (state dict on the CPU, configuration, metadata).

    Raises :class:`WeightsError` on a missing, damaged or foreign file. Never runs code from the file.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}: give the file that tools/convert.py wrote")
    read = {".safetensors": _read_safetensors, ".pth": _read_pth}.get(path.suffix)
    if read is None:
        raise WeightsError(f"cannot read {path}: its name must end in {' or '.join(SUFFIXES)}")
    try:
        state_dict, metadata = read(path)
    except WeightsError:
        raise
    except ImportError:
        raise WeightsError(f"reading {path} needs the package safetensors: pip install safetensors") from None
    except Exception as error:  # both libraries raise many types on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{path} is damaged or not a weight file ({reason}); convert it again") from None
    if "config" not in metadata:
        raise WeightsError(
            f"{path} carries no EfficientDet configuration; it was not written by this project"
        )
    try:
        config = EfficientDetConfig.from_dict(json.loads(metadata.pop("config")))
    except (ConfigError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} carries an unusable configuration: {error}") from None
    return state_dict, config, metadata


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _read_pth(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    content: Any = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise WeightsError(f"{path} holds no state_dict entry; it was not written by this project")
    metadata = dict(content.get("metadata") or {})
    if "config" in content:
        metadata["config"] = content["config"]
    return content["state_dict"], metadata


def load_model(path: str | os.PathLike[str]) -> EfficientDet:
    """The model in a weight file, in evaluation mode, on the CPU, in the file's floating-point type.

    Checks every key and shape before it copies. Raises :class:`WeightsError` when file and model differ.
    """
    state_dict, config, _ = read_weights(path)
    with torch.device("meta"):
        model = EfficientDet(config)
    check_state_dict(model, state_dict, str(path))
    model.load_state_dict(state_dict, assign=True)
    # assign=True turns parameters into what the file holds; they must still train.
    return model.requires_grad_(True).eval()


def check_state_dict(model: EfficientDet, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Raise :class:`WeightsError` unless ``state_dict`` has exactly the model's keys, each of its shape.

    All floating-point tensors must be of one type, and finite.
    """
    expected = model.state_dict()
    for what, keys in (
        ("lacks", expected.keys() - state_dict.keys()),
        ("has", state_dict.keys() - expected.keys()),
    ):
        if keys:
            name, more = min(keys), f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            kind = "tensor" if what == "lacks" else "unknown tensor"
            raise WeightsError(f"{source} {what} {kind} {name}{more}: it does not fit {model.config.name}")
    kinds: dict[str, str] = {}
    for key, tensor in expected.items():
        _check_tensor(f"{source}: {key}", state_dict[key], tensor.is_floating_point(), kinds)
        if tensor.shape != state_dict[key].shape:
            raise WeightsError(
                f"{source}: {key} is {list(state_dict[key].shape)}, "
                f"{model.config.name} needs {list(tensor.shape)}"
            )


def _check_tensor(where: str, tensor: Any, floating: bool, kinds: dict[str, str]) -> None:
    """``kinds`` remembers the floating-point type met first."""
    if not isinstance(tensor, Tensor):
        raise WeightsError(f"{where} is not a tensor but {type(tensor).__name__}; convert it again")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_floating_point() != floating:
        raise WeightsError(f"{where} is {dtype}, which this network cannot use; convert it again")
    if floating and kinds.setdefault("type", dtype) != dtype:
        raise WeightsError(f"{where} is {dtype} where other tensors are {kinds['type']}; convert it again")
    if floating and not bool(tensor.isfinite().all()):
        raise WeightsError(f"{where} holds NaN or infinite values; convert it again")
