"""Several processes at one piece of work, as ``torchrun`` starts them; or one, where it did not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pytorch_model.errors import EfficientDetError

_PATIENCE = timedelta(days=7)  # how long one process may wait for the others: as long as they work


@dataclass(frozen=True)
class Processes:
    """``rank`` of ``count`` processes; ``local_rank`` among those of this machine, which is its GPU."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, value: Any) -> Any:
        """What the first process calls this with, in every process."""
        if self.count == 1:
            return value
        carrier = [value]
        with _others_present():
            dist.broadcast_object_list(carrier, src=0)
        return carrier[0]

    def to_first(self, value: Any) -> list[Any]:
        """What each process calls this with, by rank, in the first process; nothing in the others."""
        if self.count == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.count if self.is_first else None
        with _others_present():
            dist.gather_object(value, gathered, dst=0)
        return gathered or []


@contextmanager
def _others_present() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # gloo's, when a connection closes
        raise EfficientDetError("another of the processes has stopped; its own message says why") from None


def has_others() -> bool:
    """Whether ``torchrun`` started this process: :func:`joined` and what is sent wait for the others."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the other processes of ``torchrun``, if there are any.

    Objects travel over gloo, whatever the devices of the work. Raises :class:`EfficientDetError` when the
    processes do not find each other.
    """
    if not has_others():
        yield Processes()
        return
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise EfficientDetError(
            f"the processes did not find each other: {reason}; start them by torchrun"
        ) from None
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
