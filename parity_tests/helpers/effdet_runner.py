"""Run effdet's models in a separate process: ``python effdet_runner.py JOBS.json``, with PYTORCH_JIT=0.

effdet and timm import torchvision at start, but do not use it for these models. An empty stand-in keeps the
tests independent of it. A job has a recipe (the statements that tools/export.py prints), images (.npy, NCHW,
of the type to run in) and out (.npz).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any


class _Anything(type):
    """A class that has every attribute and can be called with anything."""

    def __getattr__(cls, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __call__(cls, *arguments: Any, **options: Any) -> _Anything:
        return cls


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports ``torchvision`` and everything below it as modules of :class:`_Anything`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0"  # type: ignore[attr-defined]


def main() -> None:
    sys.meta_path.insert(0, StandIn())
    import effdet
    import numpy as np
    import torch

    for job in json.loads(Path(sys.argv[1]).read_text()):
        images = torch.from_numpy(np.load(job["images"]))
        torch.set_default_dtype(images.dtype)
        names: dict[str, Any] = {"effdet": effdet, "torch": torch}
        exec("\n".join(job["recipe"]), names)
        with torch.no_grad():
            class_outputs, box_outputs = names["model"](images)
        arrays = [output.numpy() for output in class_outputs + box_outputs]
        np.savez(job["out"], **{str(i): array for i, array in enumerate(arrays)})


if __name__ == "__main__":
    main()
