"""Keras HDF5 weights (``.h5``), as written by ``save_weights`` of AutoML's Keras model.

The file has a group for each layer, and in it a dataset for each variable. The dataset has the variable's
name, followed by ``:0``. Keras also lists the names in attributes (``weight_names``, in pieces if long).
These add no information and are not read: if such a list is damaged, the HDF5 library can loop for ever. HDF5
has no checksums: flipped bits in the values cannot be detected.

Source: Keras 2 ``saving/legacy/hdf5_format.py``.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from porting.checkpoint.base import Checkpoint
from porting.errors import CheckpointError

FORMAT = "Keras HDF5 weights"
SUFFIXES = (".h5", ".hdf5")

_MAGIC = b"\x89HDF\r\n\x1a\n"
_FLOATS = ("f2", "f4", "f8")


def is_h5(head: bytes, path: Path) -> bool:
    """Whether the file at ``path``, which begins with ``head``, has the name or the first bytes of HDF5."""
    return head.startswith(_MAGIC) or (path.suffix in SUFFIXES and os.path.isfile(path))


def open_h5(path: str | os.PathLike[str], step: int | None = None) -> KerasH5:
    """Open the weights at ``path``; a file of weights has no steps. Raises CheckpointError."""
    if step is not None:
        raise CheckpointError(f"{path} is a single file of weights, which has no steps; leave out the step")
    return KerasH5(path)


class KerasH5(Checkpoint):
    """The file at ``path``, which stays open. Needs h5py.

    Nothing outside the file is read, and no dataset may claim more bytes than the file has. Raises
    CheckpointError for external or soft links, external or virtual storage, a missing h5py, an incomplete
    file, or one that Keras did not write.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        h5py = _h5py(self._path)
        try:
            self._file = h5py.File(self._path, "r")
        except OSError as error:
            raise CheckpointError(
                f"{self._path} cannot be read as HDF5: {_one_line(error)}; fetch the file again"
            ) from None
        self._close = weakref.finalize(self, self._file.close)
        try:
            self._datasets, notes = self._find_datasets(h5py)
        except CheckpointError:
            self.close()
            raise
        except Exception as error:  # damage makes h5py raise many kinds of errors
            self.close()
            self._damaged(error)
        super().__init__(
            source=str(self._path),
            format=FORMAT,
            shapes={name: dataset.shape for name, dataset in self._datasets.items()},
            dtypes={name: dataset.dtype.newbyteorder("=") for name, dataset in self._datasets.items()},
            notes=notes,
        )

    def close(self) -> None:
        self._close()

    def _read(self, name: str) -> np.ndarray:
        if not self._file:
            raise CheckpointError(f"{self._path} is closed; open it again")
        try:
            return np.array(self._datasets[name][()], self.dtypes[name], order="C")
        except Exception as error:
            self._damaged(error)

    def _damaged(self, error: Exception) -> NoReturn:
        raise CheckpointError(f"{self._path} is damaged: {_one_line(error)}; fetch the file again") from None

    def _reject(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self._path} {reason}")

    def _find_datasets(self, h5py: Any) -> tuple[dict[str, Any], list[str]]:
        """AutoML name → dataset, each checked but not read; and the notes for the user."""
        root, notes = self._file, []
        if "layer_names" not in root.attrs and "model_weights" in root:
            root = self._member(h5py, root, "model_weights")
            notes.append("only the model's weights were taken from a file that holds the whole model")
        if "layer_names" not in root.attrs and "layer_names0" not in root.attrs:
            self._reject(
                "is HDF5, but not of Keras 2's save_weights: it has no attribute layer_names; "
                "save the weights with the TensorFlow and Keras that AutoML used"
            )
        found: dict[str, Any] = {}
        for path, dataset in self._walk(h5py, root):
            self._check_dataset(path, dataset)
            name = path.partition("/")[2].removesuffix(":0")
            if not name or name in found:
                self._reject(f"has {path}, which is not a variable of a layer, or is there twice")
            found[name] = dataset
        if not found:
            self._reject("holds no weights; build the model before saving it")
        return found, notes

    def _walk(self, h5py: Any, root: Any) -> Iterator[tuple[str, Any]]:
        """Yield path and dataset of everything in ``root`` that is not a group, at any depth."""
        queue, seen = deque([("", root)]), set()
        while queue:
            path, group = queue.popleft()
            for name in group:
                inner = f"{path}/{name}".lstrip("/")
                member = self._member(h5py, group, name, inner)
                if not isinstance(member, h5py.Group):
                    yield inner, member
                elif (place := h5py.h5o.get_info(member.id).addr) not in seen:  # a group may hold itself
                    seen.add(place)
                    queue.append((inner, member))

    def _member(self, h5py: Any, group: Any, name: str, path: str = "") -> Any:
        """``group[name]``, which must be in this file; ``path`` is its name in errors."""
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            self._reject(f"has a link at {path or name} instead of data; save the weights into one file")
        return group[name]

    def _check_dataset(self, path: str, dataset: Any) -> None:
        if not hasattr(dataset, "shape"):
            self._reject(f"has something other than values at {path}; fetch the file again")
        if dataset.dtype.str[1:] not in _FLOATS or dataset.shape is None:
            self._reject(
                f"holds {path} as {dataset.dtype}, but weights are floating point; is it the right file?"
            )
        if dataset.is_virtual or dataset.external:
            self._reject(f"keeps the values of {path} in other files; save the weights into one file")
        if dataset.nbytes > self._path.stat().st_size:
            self._reject(
                f"is damaged: {path} claims {dataset.nbytes} bytes, more than the whole file has, or it is "
                "compressed; save the weights again"
            )
        if dataset.chunks:
            needed = math.prod(math.ceil(n / c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
            complete = dataset.id.get_num_chunks() == needed
        else:
            complete = dataset.id.get_storage_size() == dataset.nbytes
        if not complete:
            self._reject(f"is incomplete: some values of {path} were never written; save the weights again")


def _h5py(path: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise CheckpointError(
            f"{path} is an HDF5 file, and reading it needs h5py: pip install 'efficientdet-porting[h5]'"
        ) from None
    return h5py


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
