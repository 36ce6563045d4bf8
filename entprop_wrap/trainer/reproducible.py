"""Samples that are loaded under random states of their own, so that augmentation repeats exactly."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from entprop_wrap.errors import DataError

__all__ = ["ReproducibleBatches", "random_states_kept", "seed_everything", "seed_of"]


class ReproducibleBatches(Dataset[Any]):
    """A data set that loads and collates whole batches, each sample under random states of its own.

    Args:
        dataset: Anything with ``__getitem__``.
        collate: Makes a batch of a list of samples.
        seed: Of the run.
        epoch: Counted from 0.
        name: What messages call the data.

    Raises:
        DataError: A sample cannot be loaded; the message has its index.
    """

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any], seed: int, epoch: int, name: str = "The data"
    ) -> None:
        self.dataset, self.collate, self.seed, self.epoch, self.name = dataset, collate, seed, epoch, name

    def __getitem__(self, index: Hashable) -> Any:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[Hashable]) -> Any:
        samples = []
        with random_states_kept():
            for index in indices:
                seed_everything(seed_of(self.seed, self.epoch, index))
                try:
                    samples.append(self.dataset[index])
                except Exception as error:  # a StopIteration would end the epoch
                    raise DataError(f"{self.name}[{index!r}] raised {type(error).__name__}: {error}") from error
            # Collating may be random as well: MixUp is often done there.
            seed_everything(seed_of(self.seed, self.epoch, "collate", indices[0]))
            return self.collate(samples)


def seed_of(*parts: Hashable) -> int:
    """Return a seed in [0, 2^32) that depends on ``repr`` of the parts, the same in every process."""
    return zlib.crc32(repr(parts).encode())


def seed_everything(seed: int) -> None:
    """Seed what transforms draw from: Python, NumPy and torch, on the CPU."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch (CPU) as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
