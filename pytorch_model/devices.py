"""Which device PyTorch computes on, and who uses the processor's cores.

The network has all cores, or ``--threads`` of them: an engine takes PyTorch's number when it is made, and its
threads sleep while they wait. Each worker that reads images (``--workers``) takes one core at most and starts
no threads, for it uses NumPy and libjpeg only; one more thread postprocesses. Together they may be more than
the cores. The system gives a worker its time where the network waits, and workers stop when they are ahead.
"""

from __future__ import annotations

import os

import torch

from pytorch_model.errors import EfficientDetError, first_line


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called ``name``. ``auto`` is a GPU if there is one; of several, number ``local_rank``.

    Raises :class:`EfficientDetError` if the device cannot be used.
    """
    if name == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device("cuda", local_rank % count) if count else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EfficientDetError(
            f"--device {name} cannot be used: {first_line(error)}; try --device cpu"
        ) from None
    return device


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of one of :data:`pytorch_model.engines.PRECISIONS`."""
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def use_threads(count: int | None) -> None:
    """Let PyTorch, and the engines made from now on, compute with ``count`` threads; None: as they are."""
    if count is not None:
        torch.set_num_threads(count)


def default_workers() -> int:
    """Half of the cores that are this process's share, at least 1, at most 16.

    A network on as many cores takes several times as long as decoding, so that one worker is enough on a
    small machine; a GPU needs more, and the machine that it is in has them.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")  # that torchrun started here
    sharing = int(processes) if processes.isdecimal() else 1
    return min(max(cores // max(sharing, 1) // 2, 1), 16)
