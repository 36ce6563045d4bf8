"""Batches that depend on seed, epoch and data alone: not on workers, processes, or where a run was resumed."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, default_collate

from entprop_wrap.data_forms import images_and_labels, refuse_dataset, refuse_loader
from entprop_wrap.errors import DataError
from entprop_wrap.trainer.reproducible import ReproducibleBatches, random_states_kept, seed_everything, seed_of

__all__ = ["Batches", "as_it_is"]


class Batches:
    """The batches of one process, epoch by epoch.

    An epoch is a list of lists of indices, drawn from ``(seed, epoch)`` alike on all processes, of which each takes its
    share. A sample is loaded under random states drawn from ``(seed, epoch, index)``: augmentation repeats exactly,
    with any number of workers, and from the middle of an epoch. What a data set keeps as random state of its own
    (a ``numpy.random.Generator`` attribute, say) cannot be reached, and goes on from where it is.

    Args:
        data: A map-style data set, or a DataLoader over one. Of a DataLoader everything is used but its seed:
            generators that it carries are seeded for each epoch.
        batch_size: Images per batch and process, for data sets.
        workers: Loading processes, for data sets.
        training: Shuffle, leave out incomplete batches, and give all processes the same number of them. Else the order
            is kept, and processes short of a batch get the first one again, behind their own :attr:`number`.
        name: What messages call the data.
        seed: Seed of order and augmentation.
        process: Index of this process.
        processes: Number of processes.
        device: Where batches go.

    Attributes:
        number: Batches of this process, not counting repetitions.
        samples: Samples of the data set.

    Raises:
        DataError: No map-style data, none at all, fewer than a batch, or without labels.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int,
        workers: int,
        training: bool,
        name: str,
        seed: int,
        process: int = 0,
        processes: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.training, self.name, self.seed = training, name, seed
        self.process, self.processes, self.device = process, processes, torch.device(device)
        self.dataset: Any
        self.sampler: Any
        self.options: dict[str, Any]
        if isinstance(data, DataLoader):
            refuse_loader(data, name)
            self.dataset, self.sampler, self.collate = data.dataset, data.batch_sampler, data.collate_fn
            self.options = {
                "num_workers": data.num_workers,
                "pin_memory": data.pin_memory,
                "timeout": data.timeout,
                "worker_init_fn": data.worker_init_fn,
                "multiprocessing_context": data.multiprocessing_context,
                "prefetch_factor": data.prefetch_factor,
            }
        else:
            refuse_dataset(data, name)
            order = RandomSampler(data) if training else SequentialSampler(data)
            self.dataset, self.collate = data, default_collate
            self.sampler = BatchSampler(order, batch_size, drop_last=training)
            self.options = {"num_workers": workers, "pin_memory": self.device.type == "cuda"}
        self.samples = len(self.dataset)
        everything = self._plan(0)
        self._check_plan(everything)
        share, self.number = self._share(everything)
        self._length = len(share)
        self._check_form(everything[0])

    def __len__(self) -> int:
        """Return the number of batches that :meth:`epoch` yields, the same on every process."""
        return self._length

    def length(self, epoch: int) -> int:
        """Return the number of batches of an epoch, which is that of any."""
        return self._length

    def of(self, dataset: Any) -> Batches:
        """Return batches of another data set in the same way: as many samples each, shuffled if these are.

        Raises:
            DataError: The order of these is no simple one, so that it says nothing about other data.
        """
        order = getattr(self.sampler, "sampler", None)
        shuffled = type(order) is RandomSampler and not order.replacement and order.num_samples == self.samples
        if type(self.sampler) is not BatchSampler or not (shuffled or type(order) is SequentialSampler):
            raise DataError(
                f"{self.name}: a DataLoader with a sampler of its own chooses among the samples it knows, and cannot "
                "go on as the data grows. Expected a data set, or DataLoader(data, batch_size, shuffle=True)."
            )
        other = copy.copy(self)
        other.dataset, other.samples = dataset, len(dataset)
        ordered = RandomSampler(dataset) if shuffled else SequentialSampler(dataset)
        other.sampler = BatchSampler(ordered, self.sampler.batch_size, self.sampler.drop_last)
        everything = other._plan(0)
        other._check_plan(everything)
        share, other.number = other._share(everything)
        other._length = len(share)
        return other

    def epoch(self, epoch: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(images, labels)`` of one epoch on the device, of batches ``start`` to ``stop``; only these load."""
        batches, _ = self._share(self._plan(epoch))
        if len(batches) != self._length:
            raise DataError(
                f"{self.name} makes {len(batches)} batches in epoch {epoch}, and {self._length} in the first. Expected "
                "as many in each: schedules and resuming count on it."
            )
        loader = DataLoader(
            ReproducibleBatches(self.dataset, self.collate, self.seed, epoch),
            batch_sampler=batches[start:stop],
            collate_fn=as_it_is,
            generator=torch.Generator(),  # else torch draws from the generator that dropout draws from
            **self.options,
        )
        for batch in loader:
            images, labels = images_and_labels(batch, self.name)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _plan(self, epoch: int) -> list[list[Hashable]]:
        seed = seed_of(self.seed, epoch, "order")
        parts: list[Any] = [self.sampler, getattr(self.sampler, "sampler", None)]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
            if isinstance(generator := getattr(part, "generator", None), torch.Generator):
                generator.manual_seed(seed)
        with random_states_kept():
            seed_everything(seed)
            return [list(batch) for batch in self.sampler]

    def _share(self, batches: list[list[Hashable]]) -> tuple[list[list[Hashable]], int]:
        """Return the batches of this process, and how many of them are its own."""
        if self.training:
            even = len(batches) - len(batches) % self.processes
            own = batches[self.process : even : self.processes]
            return own, len(own)
        own = batches[self.process :: self.processes]
        longest = -(-len(batches) // self.processes)
        return own + batches[:1] * (longest - len(own)), len(own)

    def _check_plan(self, batches: list[list[Hashable]]) -> None:
        if not self.training:
            if not batches:
                raise DataError(
                    f"{self.name} makes no batch. Expected at least one: write DataLoader(drop_last=False)."
                )
            return
        if len(batches) < self.processes:
            raise DataError(
                f"{self.name} has {self.samples} samples and makes {len(batches)} complete batches; expected at least "
                f"one for each process ({self.processes}). Choose a smaller batch_size."
            )
        if (smallest := min(map(len, batches))) < 2:
            raise DataError(
                f"{self.name} has a batch of {smallest}. Expected at least 2 images: write "
                "DataLoader(..., drop_last=True)."
            )

    def _check_form(self, batch: Sequence[Hashable]) -> None:
        try:
            made = ReproducibleBatches(self.dataset, self.collate, self.seed, 0).__getitems__(batch[:2])
        except (TypeError, RuntimeError) as error:
            raise DataError(
                f"{self.name}: the first samples do not make a batch ({error}). Expected images as tensors of one "
                "size: give the data set a transform, or pass a DataLoader with a collate_fn."
            ) from error
        images_and_labels(made, self.name)


def as_it_is(batch: Any) -> Any:
    """Return a batch that is one already."""
    return batch
