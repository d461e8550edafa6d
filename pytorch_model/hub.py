"""A model by name, with weights from a file or an address: the work behind ``hubconf.py``."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor

from pytorch_model.config import model_config
from pytorch_model.efficientdet import EfficientDet
from pytorch_model.errors import WeightsError, first_line
from pytorch_model.weights import CONFIG_FILE
from pytorch_model.weights.files import read_tensors, read_weights
from pytorch_model.weights.pickles import NAMED_BY_HASH


def load_variant(
    model: str, weights: str | os.PathLike[str] | None = None, num_classes: int | None = None
) -> EfficientDet:
    """The model called ``model``, ``efficientdet-d4``, in evaluation mode; untrained without ``weights``.

    ``weights`` is a path as for :func:`read_weights`; or a ``.pth`` of tensors only, which gets the model's
    own configuration; or the address of such a ``.pth``, which is downloaded once into torch.hub's folder
    and compared with the digits of SHA-256 in its name. ``num_classes`` is as for :func:`load_model`.
    Raises :class:`WeightsError` if the weights belong to another model or cannot be fetched.
    """
    config = model_config(model)
    if weights is None:
        changes = {} if num_classes is None else {"num_classes": num_classes}
        return EfficientDet(config.replace(**changes)).eval()
    if "://" in str(weights):
        return EfficientDet.from_state_dict(_fetch(str(weights)), config, str(weights), num_classes)
    path = Path(weights)
    if path.suffix == ".pth" and path.is_file() and not (path.parent / CONFIG_FILE).is_file():
        state_dict, metadata = read_tensors(path)
        if "config" not in metadata:
            return EfficientDet.from_state_dict(state_dict, config, str(path), num_classes)
    state_dict, found, _ = read_weights(path)
    if found.name != config.name:
        raise WeightsError(f"{path} holds {found.name}, not {config.name}; ask for that model")
    return EfficientDet.from_state_dict(state_dict, found, str(path), num_classes)


def _fetch(url: str) -> dict[str, Tensor]:
    """The tensors at ``url``, kept in torch.hub's folder; a kept file is checked like any other file."""
    file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(url).path))
    if file.suffix != ".pth":
        raise WeightsError(
            f"cannot get weights from {url}: its name must end in .pth; fetch the file by hand"
        )
    named = NAMED_BY_HASH.fullmatch(file.name)
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), named and named[1], progress=False)
        except Exception as error:  # from the network or the disk
            raise WeightsError(
                f"cannot get weights from {url}: {first_line(error)}; fetch the file by hand"
            ) from None
    state_dict, metadata = read_tensors(file)
    if metadata:
        raise WeightsError(
            f"{url} is more than a state dict; give the address of one that tools/release.py wrote"
        )
    return state_dict
