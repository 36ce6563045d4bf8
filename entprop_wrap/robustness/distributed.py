"""Which process evaluates which images: each exactly once, whatever the loader does to keep processes in step.

Four kinds of data are told apart when there are several processes:

* prepared by Accelerate: processes hold shares, and the last round repeats images, which are left out again;
* with a ``DistributedSampler``: the same;
* the same batches on every process: they are dealt out, one round after the other;
* different batches on every process: these are shares that the caller made, and none is left out.
"""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from entprop_wrap.data.batches import images_and_labels
from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import DataError
from entprop_wrap.robustness.pixels import check_batch

__all__ = ["Batch", "ShardedData", "check_batches", "gather"]


class Batch(NamedTuple):
    """A batch of one process.

    Attributes:
        images: ``(N, C, H, W)``.
        labels: ``(N,)`` int64, on the CPU.
        own: How many images, from the first, are this process's own; the others are repetitions.
        position: Number of images before the first one, over all processes where that is known.
    """

    images: Tensor
    labels: Tensor
    own: int
    position: int


class ShardedData:
    """The share of this process in the data.

    Args:
        data: Iterable of batches, ``(images, labels)`` or dicts.
        space: Pixel space of the images.
        name: What messages call the data.

    Attributes:
        salt: 0, or another number on each process where positions are counted by each process for itself.
    """

    def __init__(self, data: Iterable[Any], space: PixelSpace, name: str = "The data") -> None:
        check_batches(data, name)
        self.data, self.space, self.name = data, space, name
        alone = not (distributed.is_available() and distributed.is_initialized())
        self.process, self.processes = (0, 1) if alone else (distributed.get_rank(), distributed.get_world_size())
        self.salt = 0
        if getattr(data, "drop_last", False) or getattr(getattr(data, "batch_sampler", None), "drop_last", False):
            warnings.warn(
                f"{name}: the DataLoader has drop_last=True, so some images may not count. Write drop_last=False.",
                stacklevel=3,
            )

    def __len__(self) -> int:
        """Return the number of batches if the data knows it, else 0; an estimate with several processes."""
        length = getattr(self.data, "__len__", lambda: 0)
        try:
            return int(length())
        except TypeError:  # a DataLoader over a stream
            return 0

    def __iter__(self) -> Iterator[Batch]:
        found = self._checked()
        if self.processes == 1:
            yield from self._in_order(found)
        elif hasattr(self.data, "end_of_dataloader"):
            yield from self._prepared(found)
        elif isinstance(sampler := _sampler_of(self.data), DistributedSampler):
            self.salt = self.process
            yield from self._sampled(found, sampler)
        else:
            yield from self._unprepared(found)

    def _checked(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self.data):
            images, labels = images_and_labels(batch, self.name)
            yield images, check_batch(images, labels, self.space, first=number == 0).cpu()

    def _in_order(self, found: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        position = 0
        for images, labels in found:
            yield Batch(images, labels, len(images), position)
            position += len(images)

    def _prepared(self, found: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """Accelerate deals out equal parts of each round; ``remainder`` images of the last round are no repetitions."""
        state: Any = self.data
        if type(getattr(state, "dataset", None)).__name__ == "IterableDatasetShard":
            raise DataError(
                f"{self.name}: found a stream of unknown length whose processes repeat images to stay in step; nothing "
                "says which. Write Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=True))."
            )
        repeats = getattr(getattr(state, "batch_sampler", None), "even_batches", True)
        start = nominal = 0
        for images, labels in found:
            # A dispatched last round is divided anew; elsewhere an incomplete batch begins where a full one would.
            dispatched = "Dispatcher" in type(self.data).__name__
            nominal = len(images) if dispatched else nominal or len(images)
            before = self.process * nominal
            count = len(images)
            if repeats and state.end_of_dataloader and state.remainder > 0:
                count = min(max(state.remainder - before, 0), count)
            yield Batch(images, labels, count, start + before)
            start += self.processes * nominal

    def _sampled(self, found: Iterable[tuple[Tensor, Tensor]], sampler: DistributedSampler[Any]) -> Iterator[Batch]:
        """A ``DistributedSampler`` gives process r the images r, r + processes, ... and repeats the first ones."""
        images = len(sampler.dataset)  # type: ignore[arg-type]
        total = len(range(sampler.rank, images, sampler.num_replicas))
        for batch in self._in_order(found):
            yield batch._replace(own=min(max(total - batch.position, 0), batch.own))

    def _unprepared(self, found: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        if isinstance(_sampler_of(self.data), RandomSampler):
            raise DataError(
                f"{self.name}: found a DataLoader with shuffle=True on {self.processes} processes, so they could not "
                "tell which images the others have. Write shuffle=False, or prepare the loader with Accelerate."
            )
        head = next(found, None)
        prints = gather(_fingerprint(head))
        whole = itertools.chain([] if head is None else [head], found)
        if len(set(prints)) == 1:
            yield from self._dealt(whole)
        elif len(set(prints)) == self.processes:
            self.salt = self.process
            yield from self._in_order(whole)
        else:
            raise DataError(
                f"{self.name}: some of the {self.processes} processes begin with the same batch, and some do not. "
                "Expected the whole data on each, or parts without overlap: prepare the loader with Accelerate."
            )

    def _dealt(self, found: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        batches = self._in_order(found)
        while batch_round := list(itertools.islice(batches, self.processes)):
            if self.process < len(batch_round):
                yield batch_round[self.process]
            else:  # keeps processes in step where forward passes communicate
                yield batch_round[0]._replace(own=0)


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


def _sampler_of(data: Any) -> Any:
    if not isinstance(data, DataLoader):
        return None
    return getattr(data.batch_sampler, "sampler", data.sampler)


def _fingerprint(batch: tuple[Tensor, Tensor] | None) -> int:
    if batch is None:
        return 0
    images, labels = batch
    parts = (images.detach().cpu().contiguous().view(torch.uint8), labels.contiguous().view(torch.uint8))
    return zlib.crc32(parts[1].numpy().tobytes(), zlib.crc32(parts[0].numpy().tobytes()))
