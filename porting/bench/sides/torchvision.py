"""An empty stand-in for torchvision, which effdet and timm import at start and which need not be installed.

effdet's networks and its soft suppression do not use it; its hard suppression does, and fails.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch


def batched_nms(
    boxes: torch.Tensor, scores: torch.Tensor, idxs: torch.Tensor, iou_threshold: float
) -> torch.Tensor:
    """Has torchvision's signature, because effdet compiles the call of it. Never called."""
    raise RuntimeError("torchvision is not installed")


class _Anything(type):
    """A class that has every attribute and can be called with anything."""

    def __getattr__(cls, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __call__(cls, *arguments: Any, **options: Any) -> _Anything:
        return cls


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return batched_nms if name == "batched_nms" else _Anything(name, (), {})


class _StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports ``torchvision`` and everything below it as modules of :class:`_Anything`."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0"  # type: ignore[attr-defined]


def stand_in_for_torchvision() -> None:
    """From now on ``import torchvision`` gives the stand-in, unless the package is installed."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, _StandIn())
