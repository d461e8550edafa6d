"""Weight files a user keeps: tensors plus the configuration they belong to.

``.safetensors`` holds the configuration as JSON in its metadata; ``.pth`` is a dict of
``{"state_dict", "config", …}`` that ``torch.load(weights_only=True)`` accepts. A folder holds
``model.safetensors`` and ``config.json``; a ``.pth`` of tensors alone lies beside such a ``config.json``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from pytorch_model.config import EfficientDetConfig, model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.errors import ConfigError, Reason, WeightsError
from pytorch_model.files import sha256_of_file
from pytorch_model.weights import CONFIG_FILE, MODEL_FILE, SUFFIXES
from pytorch_model.weights.pickles import check_pickles

DIGEST = "content_sha256"  # the metadata entry that vouches for all others and for the tensors

#: The tensors whose shape depends on the number of classes: those a change of it starts anew.
CLASS_PREDICTOR = ("class_net.predict.pointwise.weight", "class_net.predict.pointwise.bias")


#: What a weight file may hold: types whose every value stands in the file as it is.
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
DTYPES = frozenset((*_FLOATING, *_WHOLE))
_LONGEST_NAME = 500  # characters; the longest of a network here has 55

#: torch.hub's convention: the name ends in the first digits of the file's SHA-256.
_NAMED_BY_HASH = re.compile(r".*-([0-9a-f]{8,64})\.pth")


def write_weights(
    path: Path, state_dict: Mapping[str, Tensor], config: EfficientDetConfig, metadata: Mapping[str, str]
) -> None:
    """Write a weight file at ``path``; its suffix, one of :data:`SUFFIXES`, chooses the format.

    ``metadata`` is free text about the tensors' origin and travels with them; a digest of everything is
    added (:func:`content_digest`). Not atomic: callers write to a temporary name and rename. Raises
    :class:`WeightsError` on another suffix, ``OSError`` from the disk.
    """
    config_json = json.dumps(config.to_dict())
    about = {**metadata, "config": config_json}
    about[DIGEST] = content_digest(state_dict, about)
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        data = save(dict(state_dict), {**about, "format": "pt"})
        _write_sorted(path, data)
    elif path.suffix == ".pth":
        del about["config"]
        content = {"state_dict": dict(state_dict), "config": config_json, "metadata": about}
        path.write_bytes(torch_bytes(content))
    else:
        raise WeightsError(f"cannot write {path.name}: use a name that ends in {' or '.join(SUFFIXES)}")


def torch_bytes(content: Any) -> memoryview:
    """What ``torch.save`` writes. By way of memory, for its own writer hides what the disk says."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getbuffer()


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
    """Read a weight file or folder: (state dict on the CPU, configuration, metadata).

    ``path``: a file of :func:`write_weights`; a folder of :func:`save_pretrained`, or one with a single
    ``.pth`` and ``config.json``; or a ``.pth`` of tensors alone with ``config.json`` beside it.
    Raises :class:`WeightsError` on a missing, damaged or foreign file, and where a file and the
    ``config.json`` of its folder disagree. Never runs code from the file.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    state_dict, metadata = read_tensors(path)
    if "config" not in metadata and path.suffix == ".pth" and (path.parent / CONFIG_FILE).is_file():
        return state_dict, *_read_config_file(path.parent / CONFIG_FILE)
    if "config" not in metadata:
        raise WeightsError(
            f"{path} carries no EfficientDet configuration, and there is no {CONFIG_FILE} beside it; put the "
            f"{CONFIG_FILE} there that it came with, or say which model it is (hubconf.py)"
        )
    return state_dict, _stored_config(metadata.pop("config"), path), metadata


def _stored_config(text: Any, path: Path) -> EfficientDetConfig:
    try:
        return EfficientDetConfig.from_dict(json.loads(text))
    except (ConfigError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} carries an unusable configuration: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "its values are nested too deeply"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict and the metadata of one file; ``"config"`` is in the metadata if it is in the file.

    Raises :class:`WeightsError` on a missing, damaged or foreign file, and on one whose tensors are not
    :func:`plain_tensors`.
    """
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}: give the file that tools/convert.py wrote")
    read = {".safetensors": _read_safetensors, ".pth": _read_pth}.get(path.suffix)
    if read is None:
        raise WeightsError(f"cannot read {path}: its name must end in {' or '.join(SUFFIXES)}")
    try:
        state_dict, metadata = read(path)
        state_dict = plain_tensors(state_dict, str(path), path.stat().st_size, shared=DIGEST not in metadata)
        _check_digest(state_dict, metadata)
        return state_dict, metadata
    except WeightsError:
        raise
    except ImportError:
        raise WeightsError(f"reading {path} needs the package safetensors: pip install safetensors") from None
    except Exception as error:  # both libraries raise many types on a damaged file
        raise WeightsError(
            f"{path} is damaged or not a weight file ({_reason(error)}); convert it again"
        ) from None


def plain_tensors(
    state_dict: Mapping[Any, Any], source: str, size: int, *, shared: bool = True
) -> dict[str, Any]:
    """``state_dict``, every tensor contiguous. What is no tensor stays; :func:`check_state_dict` names it.

    ``size``: bytes of the file ``source``, which must hold every value of every tensor. A few bytes can
    describe a tensor of gigabytes that repeats one value, so the shapes alone are summed before any is laid
    out. ``shared``: one and the same tensor under several names counts once. Raises :class:`WeightsError` on
    a tensor that is not of :data:`DTYPES`, or not a plain array on the CPU.
    """
    views: dict[Any, Tensor] = {}
    keys: dict[str, Any] = {}
    needed = 0
    for key, tensor in state_dict.items():
        if not isinstance(key, str) or len(key) > _LONGEST_NAME or not key.isprintable():
            raise WeightsError(
                f"{source} calls a tensor {key!a:.40}, which is no name of one; convert it again"
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
            "memory: take it again from where it came, or save each tensor with .contiguous()"
        )
    plain = {view: tensor.detach().contiguous() for view, tensor in views.items()}
    return {key: plain[keys[key]] if key in keys else value for key, value in state_dict.items()}


def _unusual_kind(tensor: Tensor) -> str:
    """What keeps ``tensor`` from being a plain array on the CPU, in words; empty where nothing does."""
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
    """SHA-256 of the names, types, shapes and bytes of all tensors and of ``metadata``, in sorted order."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for key, tensor in sorted(state_dict.items()):
        if not isinstance(tensor, Tensor):  # check_state_dict refuses it, with a better reason
            continue
        digest.update(f"\n{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_digest(state_dict: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Take the digest out of ``metadata`` and hold it against the rest; files without one pass."""
    stated = metadata.pop(DIGEST, None)
    about = {key: text for key, text in metadata.items() if key != "format"}
    if stated is not None and stated != content_digest(state_dict, about):
        raise Reason(f"its {DIGEST} does not fit its contents, which were changed after it was written")


def weight_file(path: Path) -> Path:
    """The file that holds the tensors: ``path`` itself, or what :func:`read_weights` takes of a folder."""
    if not path.is_dir():
        return path
    inside = path / MODEL_FILE
    return inside if inside.is_file() else next(iter(sorted(path.glob("*.pth"))), inside)


def _read_folder(folder: Path) -> tuple[dict[str, Tensor], EfficientDetConfig, dict[str, str]]:
    weights = [folder / MODEL_FILE] if (folder / MODEL_FILE).is_file() else sorted(folder.glob("*.pth"))
    if len(weights) != 1 or not (folder / CONFIG_FILE).is_file():
        raise WeightsError(
            f"{folder} is no folder of weights: it needs {CONFIG_FILE} and {MODEL_FILE} or one .pth file; "
            "give a folder that save_pretrained wrote, or a weight file"
        )
    config, metadata = _read_config_file(folder / CONFIG_FILE)
    state_dict, stored = read_tensors(weights[0])
    if "config" in stored and _stored_config(stored["config"], weights[0]) != config:
        raise WeightsError(
            f"{weights[0]} was written for another configuration than {folder / CONFIG_FILE} beside it says; "
            "take both from one place"
        )
    return state_dict, config, metadata


def _read_config_file(path: Path) -> tuple[EfficientDetConfig, dict[str, str]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in content["metadata"].items()}
        return EfficientDetConfig.from_dict(content["config"]), metadata
    except (OSError, ConfigError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {_reason(error)}"
        raise WeightsError(f"{path} is no EfficientDet configuration ({reason}); fetch it again") from None


def config_text(config: EfficientDetConfig, metadata: Mapping[str, Any]) -> str:
    """The contents of ``config.json``: what :func:`read_weights` reads back."""
    content = {"model_type": "efficientdet", "config": config.to_dict(), "metadata": dict(metadata)}
    return json.dumps(content, indent=2) + "\n"


def save_pretrained(
    model: EfficientDet, folder: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``folder/model.safetensors`` and ``folder/config.json``, which :func:`load_model` reads.

    The folder is created; what it held under these names is replaced, each file complete or not at all.
    Raises :class:`WeightsError` where the disk refuses.
    """
    folder, metadata = Path(folder), dict(metadata or {})
    state_dict = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    temporary = [folder / f".{os.getpid()}-{name}" for name in (MODEL_FILE, CONFIG_FILE)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(temporary[0], state_dict, model.config, metadata)
        temporary[1].write_text(config_text(model.config, metadata), encoding="utf-8")
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


def load_pth(path: Path) -> Any:
    """What ``torch.save`` wrote at ``path``. Code in it is not run.

    Tensors alone carry no digest; where the file is called ``NAME-xxxxxxxx.pth``, as releases and torch.hub
    call them, the digits are held against its SHA-256. Raises :class:`WeightsError` on code and all else
    that tensors do not need, on what unpacks to more than the file, and on another hash; torch's own errors
    on damage.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > path.stat().st_size:
            raise WeightsError(
                f"{path} unpacks to more than it is, which torch.save never writes; fetch it again"
            )
    _check_pickles(path)
    try:
        with warnings.catch_warnings():  # of a foreign file, before its refusal
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if not _advises_danger(error):
            raise
        raise _not_tensors(path, "its pickle holds more than tensors, such as code, or is broken") from None
    named = _NAMED_BY_HASH.fullmatch(path.name)
    if named and not _has_digest(content) and not sha256_of_file(path).startswith(named[1]):
        raise WeightsError(
            f"{path} is damaged or misnamed: its SHA-256 does not begin with the {named[1]} in its name; "
            "fetch it again, or, if you chose these eight digits for something else, rename it"
        )
    return content


def _check_pickles(path: Path) -> None:
    try:
        check_pickles(path)
    except (
        Reason,
        ValueError,
        zipfile.BadZipFile,
        EOFError,
        NotImplementedError,
        RuntimeError,
        zlib.error,
    ) as error:
        raise _not_tensors(path, _reason(error)) from None


def _not_tensors(path: Path, reason: str) -> WeightsError:
    """In place of PyTorch's text, which goes on to explain how to run the code."""
    return WeightsError(
        f"{path} is damaged or not a weight file ({reason}; nothing in it was run); fetch it from where it "
        "was published, convert it again, or save the state dict alone"
    )


def _advises_danger(error: Exception) -> bool:
    return isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)


def _has_digest(content: Any) -> bool:
    metadata = content.get("metadata") if isinstance(content, dict) else None
    return isinstance(metadata, dict) and DIGEST in metadata


def _read_pth(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def load_model(path: str | os.PathLike[str], num_classes: int | None = None) -> EfficientDet:
    """The model in a weight file or folder (:func:`read_weights`), in evaluation mode, on the CPU, in the
    file's floating-point type.

    ``num_classes``, if it is another number than the file's, starts the class predictor anew
    (:data:`CLASS_PREDICTOR`) and keeps every other tensor. Checks every key and shape before it copies.
    Raises :class:`WeightsError` when file and model differ.
    """
    state_dict, config, _ = read_weights(path)
    return build(state_dict, config, str(path), num_classes)


def load_variant(
    model: str, weights: str | os.PathLike[str] | None = None, num_classes: int | None = None
) -> EfficientDet:
    """A variant by name, ``efficientdet-d4``, in evaluation mode; untrained without ``weights``.

    ``weights`` is a path as for :func:`read_weights`, a ``.pth`` of tensors alone (with the variant's own
    configuration), or an address of such a ``.pth``, fetched once into torch.hub's folder and held against
    the digits of SHA-256 in its name. ``num_classes`` is as for :func:`load_model`.
    Raises :class:`WeightsError` where the weights are another model's, or cannot be had.
    """
    config = model_config(model)
    if weights is None:
        changes = {} if num_classes is None else {"num_classes": num_classes}
        return EfficientDet(config.replace(**changes)).eval()
    if "://" in str(weights):
        return build(_fetch(str(weights)), config, str(weights), num_classes)
    path = Path(weights)
    if path.suffix == ".pth" and path.is_file() and not (path.parent / CONFIG_FILE).is_file():
        state_dict, metadata = read_tensors(path)
        if "config" not in metadata:
            return build(state_dict, config, str(path), num_classes)
    state_dict, found, _ = read_weights(path)
    if found.name != config.name:
        raise WeightsError(f"{path} holds {found.name}, not {config.name}; ask for that model")
    return build(state_dict, found, str(path), num_classes)


def _fetch(url: str) -> dict[str, Tensor]:
    """From torch.hub's folder, by its ways; but what was kept there is read as critically as any file."""
    file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(url).path))
    if file.suffix != ".pth":
        raise WeightsError(
            f"cannot get weights from {url}: its name must end in .pth; fetch the file by hand"
        )
    named = _NAMED_BY_HASH.fullmatch(file.name)
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), named and named[1], progress=False)
        except Exception as error:  # from the network or the disk
            raise WeightsError(
                f"cannot get weights from {url}: {_reason(error)}; fetch the file by hand"
            ) from None
    state_dict, metadata = read_tensors(file)
    if metadata:
        raise WeightsError(
            f"{url} is more than a state dict; give the address of one that tools/release.py wrote"
        )
    return state_dict


def build(
    state_dict: Mapping[str, Tensor], config: EfficientDetConfig, source: str, num_classes: int | None = None
) -> EfficientDet:
    """``EfficientDet(config)`` with these tensors, as :func:`load_model` returns it."""
    state_dict = dict(state_dict)
    with torch.device("meta"):
        model = EfficientDet(config)
    check_state_dict(model, state_dict, source)
    if num_classes is not None and num_classes != config.num_classes:
        fresh = EfficientDet(config.replace(num_classes=num_classes))
        dtype = state_dict[CLASS_PREDICTOR[0]].dtype
        state_dict.update({key: fresh.state_dict()[key].to(dtype) for key in CLASS_PREDICTOR})
        model = fresh
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
        found = state_dict[key]
        if isinstance(found, Tensor) and found.shape != tensor.shape:
            raise WeightsError(
                f"{source}: {key} is {list(found.shape)}, {model.config.name} needs {list(tensor.shape)}"
            )
        _check_tensor(f"{source}: {key}", found, tensor.is_floating_point(), kinds)


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
