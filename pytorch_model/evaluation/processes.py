"""Several processes that share one piece of work, as ``torchrun`` starts them; or a single process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pytorch_model.errors import EfficientDetError

_PATIENCE = timedelta(days=7)  # how long one process waits for the others, which may work for days


@dataclass(frozen=True)
class Processes:
    """This process: ``rank`` of ``count``; ``local_rank`` on this machine, which selects the GPU."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, value: Any) -> Any:
        """Send ``value`` of the first process to all; returns it in each."""
        if self.count == 1:
            return value
        carrier = [value]
        with _others_present():
            dist.broadcast_object_list(carrier, src=0)
        return carrier[0]

    def to_first(self, value: Any) -> list[Any]:
        """Send ``value`` of each process to the first; returns all by rank there, an empty list elsewhere."""
        if self.count == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.count if self.is_first else None
        with _others_present():
            dist.gather_object(value, gathered, dst=0)
        return gathered or []

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """The first process runs the block, then the others do, so that a mistake is reported only once."""
        if not self.is_first:
            self.from_first(None)
        yield
        if self.is_first:
            self.from_first(None)


@contextmanager
def _others_present() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # gloo's, when a connection closes
        raise EfficientDetError("another process has stopped; see its own error message") from None


def has_others() -> bool:
    """Whether ``torchrun`` started this process; then :func:`joined` and every exchange wait for others."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the other processes of ``torchrun``, if there are any.

    Objects are sent over gloo, whatever device computes. Raises :class:`EfficientDetError` if the processes
    cannot connect.
    """
    if not has_others():
        yield Processes()
        return
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise EfficientDetError(f"the processes cannot connect: {reason}; start them with torchrun") from None
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
