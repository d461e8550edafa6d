"""Which examples make which batch, and the random numbers of each: functions of the seed alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pytorch_model.errors import ConfigError
from pytorch_model.evaluation.dataset import DatasetError


class Place(NamedTuple):
    """One example of one epoch, both counted from 0: what a worker is asked for."""

    epoch: int
    example: int


@dataclass(frozen=True)
class Sampler:
    """Every epoch takes all ``examples`` once, in an order of its own, in batches of ``batch_size``.

    As in AutoML (``dataloader.py``: ``batch(drop_remainder=True)`` before ``repeat``), each epoch drops the
    examples that do not fill its last batch. AutoML shuffles within 64 records; this shuffles all.
    ``batch_size`` is that of all ``processes`` together: process ``rank`` takes its part of each batch, so
    the batches do not depend on how many processes there are. Raises :class:`ConfigError` for a value that is
    not possible, and :class:`DatasetError` if there are fewer examples than a batch has.
    """

    examples: int
    batch_size: int
    seed: int = 0
    rank: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"the batch size is {self.batch_size}, must be at least 1")
        if self.seed < 0:
            raise ConfigError(f"the seed is {self.seed}, must be at least 0")
        if self.batch_size % self.processes:
            raise ConfigError(
                f"the batch size is {self.batch_size}, must be a multiple of the {self.processes} processes"
            )
        if self.examples < self.batch_size:
            raise DatasetError(
                f"the data has {self.examples} images, fewer than a batch of {self.batch_size}; choose a "
                "smaller batch size"
            )

    @property
    def steps(self) -> int:
        """Batches of one epoch."""
        return self.examples // self.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[Place]]:
        """This process's part of the batches of ``epoch``, from batch ``start`` on."""
        order = np.argsort(_generator(self.seed, epoch).random(self.examples), kind="stable")
        size = self.batch_size // self.processes
        for step in range(start, self.steps):
            first = step * self.batch_size + self.rank * size
            yield [Place(epoch, index) for index in order[first : first + size].tolist()]

    def draws(self, place: Place) -> np.random.Generator:
        """The random numbers of one example in one epoch."""
        return _generator(self.seed, *place)


def _generator(seed: int, *key: int) -> np.random.Generator:
    """Independent for every key. PCG64's stream is the same in every version of NumPy."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))
