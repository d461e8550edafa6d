"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "openvino",
    "effdet",
    "timm",
    "tensorflow",
    "tensorflow-cpu",
)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """``cpu``: its model. ``instructions``: the widest that PyTorch uses. ``cores``: those that this process
    may use. ``load``: the load average of the last minute; None where there is none. ``gpu``: None on a CPU.
    ``versions``: of the packages that are installed.
    """
    instructions = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": _cpu_model(),
        "instructions": instructions,
        "avx512": instructions.startswith("AVX512"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
