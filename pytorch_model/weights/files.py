"""Weight files that a user keeps: tensors and the configuration they belong to.

``.safetensors`` holds the configuration as JSON in its metadata. ``.pth`` is a dict of
``{"state_dict", "config", …}`` that ``torch.load(weights_only=True)`` accepts. A folder holds
``model.safetensors`` and ``config.json``. A ``.pth`` of tensors only needs such a ``config.json`` beside it.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pytorch_model.config import EfficientDetConfig
from pytorch_model.errors import ConfigError, WeightsError, first_line
from pytorch_model.files import check_regular
from pytorch_model.weights import CONFIG_FILE, MODEL_FILE, SUFFIXES
from pytorch_model.weights.checks import DIGEST, check_digest, content_digest, plain_tensors
from pytorch_model.weights.tensors import DTYPES, AnyTensor, as_tensors, dtype_name, is_tensor, raw_bytes

if TYPE_CHECKING:
    from torch import Tensor


T = TypeVar("T")


def write_weights(
    path: Path, state_dict: Mapping[str, AnyTensor], config: EfficientDetConfig, metadata: Mapping[str, str]
) -> None:
    """Write a weight file at ``path``; its suffix, one of :data:`SUFFIXES`, chooses the format.

    ``metadata`` is free text about the origin of the tensors. A digest of everything is added
    (:func:`content_digest`). Only ``.pth`` needs PyTorch. Not atomic: callers write to a temporary name and
    rename. Raises :class:`WeightsError` on another suffix or dtype, ``OSError`` from the disk.
    """
    for key, tensor in state_dict.items():
        if is_tensor(tensor) and dtype_name(tensor) not in DTYPES:
            raise WeightsError(
                f"cannot write {path.name}: {key} is {dtype_name(tensor)}, which could not be read again; "
                "save it as float32"
            )
    config_json = json.dumps(config.to_dict())
    about = {**metadata, "config": config_json}
    about[DIGEST] = content_digest(state_dict, about)
    if path.suffix == ".safetensors":
        _write_safetensors(path, state_dict, {**about, "format": "pt"})
    elif path.suffix == ".pth":
        del about["config"]
        content = {"state_dict": _apart(as_tensors(state_dict)), "config": config_json, "metadata": about}
        path.write_bytes(torch_bytes(content))
    else:
        raise WeightsError(f"cannot write {path.name}: use a name that ends in {' or '.join(SUFFIXES)}")


def _apart(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own: shared or larger memory would be stored as it is."""
    import torch

    return {
        key: value.detach().clone(memory_format=torch.contiguous_format) if is_tensor(value) else value
        for key, value in state_dict.items()
    }


def torch_bytes(content: Any) -> memoryview:
    """The bytes that ``torch.save`` writes. Its own file writer hides the errors of the disk."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


def _write_safetensors(path: Path, state_dict: Mapping[str, AnyTensor], metadata: Mapping[str, str]) -> None:
    """Write as the library does, but one tensor at a time, and with sorted metadata.

    The library makes the whole file in memory, and puts the metadata in random order.

    Source: the format's description, https://github.com/huggingface/safetensors.
    """
    kinds = list(DTYPES)
    order = sorted(state_dict, key=lambda key: (kinds.index(dtype_name(state_dict[key])), key))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for key in order:
        tensor = state_dict[key]
        end = offset + tensor.nbytes
        code, shape = DTYPES[dtype_name(tensor)], list(tensor.shape)
        header[key] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns its tensors
    if path.is_file():
        # The tensors may be views of this very file, whose content then stays as long as they do.
        path.resolve().unlink()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(raw_bytes(state_dict[key]))


def read_weights(
    path: str | os.PathLike[str],
) -> tuple[dict[str, Tensor], EfficientDetConfig, dict[str, str]]:
    """Read a weight file or folder: (state dict on the CPU, configuration, metadata).

    ``path``: a file of :func:`write_weights`; a folder of :func:`write_folder`, or one with a single ``.pth``
    and ``config.json``; or a ``.pth`` of tensors only with ``config.json`` beside it. Raises
    :class:`WeightsError` on a missing, damaged or foreign file, and if a file and the ``config.json`` of its
    folder disagree. Never runs code from the file.
    """
    return _read(Path(path), read_tensors)


def read_any(
    path: str | os.PathLike[str],
) -> tuple[dict[str, AnyTensor], EfficientDetConfig, dict[str, str]]:
    """As :func:`read_weights`, with NumPy arrays from a ``.safetensors``, which needs no PyTorch.

    A ``.pth``, and a file with a dtype that NumPy lacks (bfloat16), have tensors all the same.
    """
    return _read(Path(path), _read_any_tensors)


def _read(
    path: Path, read: Callable[[Path], tuple[dict[str, T], dict[str, str]]]
) -> tuple[dict[str, T], EfficientDetConfig, dict[str, str]]:
    """``read``: the state dict and the metadata of one file."""
    if path.is_dir():
        return _read_folder(path, read)
    state_dict, metadata = read(path)
    if "config" not in metadata and path.suffix == ".pth" and (path.parent / CONFIG_FILE).is_file():
        return state_dict, *_read_config_file(path.parent / CONFIG_FILE)
    if "config" not in metadata:
        raise WeightsError(
            f"{path} carries no EfficientDet configuration, and there is no {CONFIG_FILE} in its folder; put "
            f"its own {CONFIG_FILE} there"
        )
    return state_dict, _stored_config(metadata.pop("config"), path), metadata


def _stored_config(text: Any, path: Path) -> EfficientDetConfig:
    try:
        return EfficientDetConfig.from_dict(json.loads(text))
    except (ConfigError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} carries an unusable configuration: {first_line(error)}") from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict and the metadata of one file; the metadata has ``"config"`` if the file has it.

    Raises :class:`WeightsError` on a missing, damaged or foreign file, and if :func:`plain_tensors` rejects
    a tensor.
    """
    return _read_checked(path, _read_safetensors)


def _read_any_tensors(path: Path) -> tuple[dict[str, AnyTensor], dict[str, str]]:
    """As :func:`read_tensors`, with arrays where NumPy has the dtypes."""
    return _read_checked(path, _read_arrays)


def _read_checked(
    path: Path, read_safetensors: Callable[[Path], tuple[dict[str, Any], dict[str, str]]]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read by suffix, with ``read_safetensors`` or as ``.pth``, and check names, kinds and the digest."""
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}: give the file that tools/convert.py wrote")
    check_file(path)
    read = {".safetensors": read_safetensors, ".pth": _read_pth}.get(path.suffix)
    if read is None:
        raise WeightsError(f"cannot read {path}: its name must end in {' or '.join(SUFFIXES)}")
    try:
        state_dict, metadata = read(path)
        state_dict = plain_tensors(state_dict, str(path), path.stat().st_size, shared=DIGEST not in metadata)
        check_digest(state_dict, metadata)
        return state_dict, metadata
    except WeightsError:
        raise
    except ImportError as error:
        raise WeightsError(
            f"reading {path} needs the package {error.name}: pip install {error.name}"
        ) from None
    except Exception as error:  # both libraries raise many types on a damaged file
        raise WeightsError(
            f"{path} is damaged or not a weight file ({first_line(error)}); convert it again"
        ) from None


def weight_file(path: Path) -> Path:
    """The file that holds the tensors: ``path`` itself, or the one :func:`read_weights` reads in a folder."""
    if not path.is_dir():
        return path
    inside = path / MODEL_FILE
    return inside if inside.is_file() else next(iter(sorted(path.glob("*.pth"))), inside)


def _read_folder(
    folder: Path, read: Callable[[Path], tuple[dict[str, T], dict[str, str]]]
) -> tuple[dict[str, T], EfficientDetConfig, dict[str, str]]:
    weights = [folder / MODEL_FILE] if (folder / MODEL_FILE).is_file() else sorted(folder.glob("*.pth"))
    if len(weights) != 1 or not (folder / CONFIG_FILE).is_file():
        raise WeightsError(
            f"{folder} is not a folder of weights: it needs {CONFIG_FILE} and {MODEL_FILE} or one .pth file; "
            "give a folder that save_pretrained wrote, or a weight file"
        )
    config, metadata = _read_config_file(folder / CONFIG_FILE)
    state_dict, stored = read(weights[0])
    if "config" in stored and _stored_config(stored["config"], weights[0]) != config:
        raise WeightsError(
            f"{weights[0]} does not have the configuration in {folder / CONFIG_FILE}; "
            "take both from one place"
        )
    return state_dict, config, metadata


def check_file(path: Path) -> None:
    """Raises :class:`WeightsError` for a pipe and for a Git LFS pointer."""
    try:
        check_regular(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from None


def _read_config_file(path: Path) -> tuple[EfficientDetConfig, dict[str, str]]:
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in content["metadata"].items()}
        return EfficientDetConfig.from_dict(content["config"]), metadata
    except (OSError, ConfigError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise WeightsError(
            f"{path} is not an EfficientDet configuration ({reason}); download it again"
        ) from None


def config_text(config: EfficientDetConfig, metadata: Mapping[str, Any]) -> str:
    """The text of ``config.json``, which :func:`read_weights` reads."""
    content = {"model_type": "efficientdet", "config": config.to_dict(), "metadata": dict(metadata)}
    return json.dumps(content, indent=2) + "\n"


def write_folder(
    folder: Path, state_dict: Mapping[str, AnyTensor], config: EfficientDetConfig, metadata: Mapping[str, str]
) -> None:
    """Write ``folder/model.safetensors`` and ``folder/config.json``, which :func:`read_weights` reads.

    The folder is created. Files of these names are replaced, each complete or not at all.
    Raises :class:`WeightsError` if the disk does not allow it.
    """
    temporary = [folder / f".{os.getpid()}-{name}" for name in (MODEL_FILE, CONFIG_FILE)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(temporary[0], state_dict, config, metadata)
        temporary[1].write_text(config_text(config, metadata), encoding="utf-8")
        for path, name in zip(temporary, (MODEL_FILE, CONFIG_FILE), strict=True):
            os.replace(path, folder / name)
    except OSError as error:
        raise WeightsError(
            f"cannot write {folder}: {error.strerror or error}; free some space or choose another folder"
        ) from None
    finally:
        for path in temporary:
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Arrays, or tensors if one of them has a dtype that NumPy lacks or a weight file must not have."""
    from safetensors import safe_open

    known = {code for name, code in DTYPES.items() if name != "bfloat16"}
    with safe_open(path, framework="np") as file:
        keys = list(file.keys())
        if known.issuperset(file.get_slice(key).get_dtype() for key in keys):
            return {key: file.get_tensor(key) for key in keys}, dict(file.metadata() or {})
    return _read_safetensors(path)


def _read_pth(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from torch import Tensor

    from pytorch_model.weights.pickles import load_pth

    content = load_pth(path)
    if isinstance(content, dict) and content and all(isinstance(v, Tensor) for v in content.values()):
        return dict(content), {}
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise WeightsError(f"{path} holds no state_dict entry; it was not written by this project")
    stored = dict(content.get("metadata") or {})
    if not all(
        isinstance(value, (str, int, float, type(None))) for entry in stored.items() for value in entry
    ):
        raise WeightsError(f"{path} has metadata that is more than text; it was not written by this project")
    metadata = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in stored.items()}
    if "config" in content:
        metadata["config"] = content["config"]
    return content["state_dict"], metadata
