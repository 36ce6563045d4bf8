"""The share of a process in an evaluation: each batch of the data is evaluated on one process, in turn."""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DistributedSampler, RandomSampler

from entprop_wrap.data.batches import images_and_labels
from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import check_evaluated
from entprop_wrap.errors import DataError


class Batch(NamedTuple):
    """A batch of one process."""

    images: Tensor  # (N, C, H, W)
    labels: Tensor  # (N,) int64, on the CPU
    position: int  # of the first image in the data
    counted: bool = True  # False where another process counts these images, and this one only keeps in step


class ShardedData:
    """The share of this process in data that every process goes through: corrupting costs far more than loading."""

    def __init__(self, data: Iterable[Any], space: PixelSpace, name: str = "The data") -> None:
        check_batches(data, name)
        self.data, self.space, self.name = data, space, name
        alone = not (distributed.is_available() and distributed.is_initialized())
        self.process, self.processes = (0, 1) if alone else (distributed.get_rank(), distributed.get_world_size())
        loader: Any = data
        if getattr(loader, "drop_last", False) or getattr(getattr(loader, "batch_sampler", None), "drop_last", False):
            warnings.warn(
                f"{name}: the DataLoader has drop_last=True, so some images may not count. Write drop_last=False.",
                stacklevel=3,
            )
        if self.processes == 1 and isinstance(_sampler(data), RandomSampler):
            warnings.warn(
                f"{name}: the DataLoader shuffles, and what is drawn for an image depends on its place: results differ "
                "from call to call. Write shuffle=False.",
                stacklevel=3,
            )

    def __len__(self) -> int:
        """Return the number of rounds if the data knows its length, else 0."""
        try:
            return -(-len(self.data) // self.processes)  # type: ignore[arg-type]
        except TypeError:  # a generator, or a DataLoader over a stream
            return 0

    def __iter__(self) -> Iterator[Batch]:
        batches = self._checked()
        if self.processes > 1:
            batches = self._same_everywhere(batches)
        while batch_round := list(itertools.islice(batches, self.processes)):
            mine = self.process < len(batch_round)
            # A repetition keeps processes in step where forward passes communicate.
            yield batch_round[self.process] if mine else batch_round[0]._replace(counted=False)

    def _checked(self) -> Iterator[Batch]:
        position = 0
        for batch in self.data:
            images, labels = images_and_labels(batch, self.name)
            yield Batch(images, check_evaluated(images, labels, self.space, first=position == 0).cpu(), position)
            position += len(images)

    def _same_everywhere(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        first = next(batches, None)
        prepared = hasattr(self.data, "end_of_dataloader")  # by Accelerate
        if (
            any(gather(prepared or isinstance(_sampler(self.data), (DistributedSampler, RandomSampler))))
            or len(set(gather(_fingerprint(first)))) > 1
        ):
            raise DataError(
                f"{self.name}: the {self.processes} processes do not go through the same batches. Expected the whole "
                "data on each, in order; they share it among themselves. Pass the loader that accelerator.prepare() "
                "was given, without DistributedSampler or shuffle=True."
            )
        return itertools.chain([] if first is None else [first], batches)


def _sampler(data: Any) -> Any:
    return getattr(getattr(data, "batch_sampler", None), "sampler", None)


def check_batches(data: Any, name: str) -> None:
    """Raise :class:`DataError` unless ``data``, which messages call ``name``, can be gone through batch by batch."""
    if isinstance(data, (str, bytes, Tensor, np.ndarray, type)) or not isinstance(data, Iterable):
        raise DataError(f"{name}: expected an iterable of batches, such as a DataLoader; found {type(data).__name__}.")


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, in their order."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def _fingerprint(batch: Batch | None) -> int:
    if batch is None:
        return 0
    parts = (part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in batch[:2])
    return zlib.crc32(next(parts), zlib.crc32(next(parts)))
