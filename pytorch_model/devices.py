"""Which device PyTorch computes on, and with how many threads."""

from __future__ import annotations

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


def use_threads(count: int | None) -> None:
    """Let PyTorch, and the engines made from now on, compute with ``count`` threads; None: as they are."""
    if count is not None:
        torch.set_num_threads(count)
