"""Batches that depend on seed, epoch and data alone: not on workers, processes, or where a run was resumed."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, default_collate

from entprop_wrap.data.batches import images_and_labels, refuse_dataset, refuse_loader
from entprop_wrap.errors import DataError, EntPropError
from entprop_wrap.trainer.config import TrainerConfig

#: What a DataLoader says of how to load.
_LOADING = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "prefetch_factor")


class Batches:
    """The batches of one process, epoch by epoch.

    An epoch is a list of lists of indices, drawn from ``(seed, epoch)`` alike on all processes, of which each takes its
    share. A sample is loaded under random states drawn from ``(seed, epoch, index)``, and where a sampler repeats it,
    from how often it came: augmentation repeats exactly, with any number of workers, and from the middle of an epoch.
    What a dataset keeps as random state of its own (a ``numpy.random.Generator`` attribute, say) cannot be reached, and
    continues from where it is.

    Training data is shuffled, incomplete batches are left out, and all processes have the same number of them.
    Evaluation data keeps its order, and processes short of a batch get the first one again.

    ``data`` is a map-style dataset, to which ``batch_size`` and ``workers`` of the configuration apply, or a DataLoader
    over one, of which everything is used but its seed.

    Attributes:
        number: Batches of this process, not counting repetitions.
        identity: What tells the data from other data: its numbers of samples and batches, the size of the first batch,
            and labels and mean pixels of a few samples.
    """

    def __init__(self, data: Any, config: TrainerConfig, accelerator: Accelerator, *, training: bool) -> None:
        self.training, self.name = training, "train_data" if training else "eval_data"
        self.seed, self.channels_last, self.device = config.seed, config.channels_last, accelerator.device
        self.process, self.processes = accelerator.process_index, accelerator.num_processes
        self.dataset: Any
        self.sampler: Any
        self.options: dict[str, Any]
        if isinstance(data, DataLoader):
            refuse_loader(data, self.name)
            self.dataset, self.sampler, self.collate = data.dataset, data.batch_sampler, data.collate_fn
            self.options = {option: getattr(data, option) for option in _LOADING}
        else:
            refuse_dataset(data, self.name)
            order = RandomSampler(data) if training else SequentialSampler(data)
            self.dataset, self.collate = data, default_collate
            size = config.batch_size if training else config.eval_batch_size or config.batch_size
            self.sampler = BatchSampler(order, size, drop_last=training)
            self.options = {"num_workers": config.workers, "pin_memory": self.device.type == "cuda"}
        plan = self._plan(0)
        chosen = [index for batch in plan for index in batch]
        self._check(plan, chosen)
        own, self.number = self._share(plan)
        self._length = len(own)
        self.identity = {
            "samples": len(self.dataset),
            "batches": len(own),
            "batch_size": len(plan[0]),
            "data": self._fingerprint(chosen[:: -(-len(chosen) // 8)]),
        }

    def __len__(self) -> int:
        """Return the number of batches that :meth:`epoch` yields, the same on every process."""
        return self._length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(images, labels)`` of one epoch on the device, from batch ``start`` on; only these load."""
        batches, _ = self._share(_numbered(self._plan(epoch)))
        if len(batches) != self._length:
            raise DataError(
                f"{self.name} makes {len(batches)} batches in epoch {epoch}, and {self._length} in the first. Expected "
                "as many in each: schedules and resuming count on it."
            )
        loader = DataLoader(
            ReproducibleBatches(self.dataset, self.collate, self.seed, epoch, self.name),
            batch_sampler=batches[start:],
            collate_fn=_as_it_is,
            # Of the workers' seeds; torch would take the generator that dropout draws from.
            generator=torch.Generator().manual_seed(seed_of(self.seed, epoch, "workers", self.process)),
            **self.options,
        )
        number = start
        for batch in _ending_at_once(loader):
            number += 1
            images, labels = images_and_labels(batch, self.name)
            layout = torch.channels_last if self.channels_last and images.ndim == 4 else torch.preserve_format
            images = images.to(self.device, non_blocking=True, memory_format=layout)
            yield images, labels.to(self.device, non_blocking=True)
        if number < len(batches):
            raise DataError(f"{self.name} ended after {number} of {len(batches)} batches: see its collate_fn.")

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

    def _share(self, batches: list[list[Any]]) -> tuple[list[list[Any]], int]:
        """Return the batches of this process, and how many of them are its own."""
        if self.training:
            even = len(batches) - len(batches) % self.processes
            own = batches[self.process : even : self.processes]
            return own, len(own)
        own = batches[self.process :: self.processes]
        longest = -(-len(batches) // self.processes)
        return own + batches[:1] * (longest - len(own)), len(own)

    def _check(self, plan: list[list[Hashable]], chosen: list[Hashable]) -> None:
        """Raise :class:`DataError` unless the first epoch's batches, with the ``chosen`` samples, can be shared out."""
        samples = len(self.dataset)
        if self.training and len(plan) < self.processes:
            raise DataError(
                f"{self.name} has {samples} samples and makes {len(plan)} complete batches; expected at least one for "
                f"each process ({self.processes}). Choose a smaller batch_size."
            )
        if self.training and (smallest := min(map(len, plan))) < 2:
            raise DataError(
                f"{self.name} has a batch of {smallest}. Expected at least 2 images: write "
                "DataLoader(..., drop_last=True)."
            )
        if not self.training and not samples == len(chosen) == len(set(chosen)):
            raise DataError(
                f"{self.name}: the DataLoader leaves out some of the {samples} samples, or repeats some. Expected each "
                "one once: leave out drop_last and sampler. To evaluate on a part, pass "
                "torch.utils.data.Subset(data, indices)."
            )

    def _fingerprint(self, indices: Sequence[Hashable]) -> dict[str, Any]:
        loader = ReproducibleBatches(self.dataset, self.collate, self.seed, 0, self.name)
        found = []
        for _ in range(2):
            try:
                images, labels = images_and_labels(loader.__getitems__([(index,) for index in indices]), self.name)
            except EntPropError:
                raise
            except Exception as error:  # of torch, or of a collate_fn
                raise DataError(
                    f"{self.name}: the first samples do not make a batch ({error}). Expected images as tensors of one "
                    "size: give the dataset a transform, or pass a DataLoader with a collate_fn."
                ) from error
            means = [float(image.double().mean()) for image in images.cpu()]
            found.append({"labels": labels.tolist(), "pixels": means})
        # What a dataset draws from a random state of its own differs each time.
        return {key: value if value == found[1][key] else "random" for key, value in found[0].items()}


def _numbered(batches: list[list[Hashable]]) -> list[list[tuple[Hashable, ...]]]:
    """Return each index with how often it came before, if it did."""
    seen: Counter[Hashable] = Counter()

    def numbered(index: Hashable) -> tuple[Hashable, ...]:
        name = index if type(index) is int else repr(index)  # tensors are not equal to their like
        seen[name] += 1
        return (index,) if seen[name] == 1 else (index, seen[name])

    return [list(map(numbered, batch)) for batch in batches]


def _ending_at_once(loader: DataLoader[Any]) -> Iterator[Any]:
    """Yield the batches of a loader, whose workers end when one of them fails.

    The traceback that torch gives the error refers to the workers, and garbage collection would wait five seconds for
    each. Where a worker failed is in the error's text.
    """
    try:
        yield from loader
    except Exception as error:
        if not loader.num_workers:
            raise
        raise error.with_traceback(None)  # noqa: B904


def _as_it_is(batch: Any) -> Any:
    """Return a batch that is one already."""
    return batch


class ReproducibleBatches(Dataset[Any]):
    """A dataset that loads and collates whole batches, each sample under random states of its own."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], seed: int, epoch: int, name: str) -> None:
        self.dataset, self.collate, self.seed, self.epoch, self.name = dataset, collate, seed, epoch, name

    def __getitems__(self, indices: Sequence[tuple[Hashable, ...]]) -> Any:
        samples = []
        with random_states_kept():
            for index, *number in indices:
                seed_everything(seed_of(self.seed, self.epoch, index, *number))
                try:
                    samples.append(self.dataset[index])
                except Exception as error:  # a StopIteration would end the epoch
                    raise DataError(f"{self.name}[{index!r}] raised {type(error).__name__}: {error}") from error
            # Collating may be random as well: MixUp is often done there.
            seed_everything(seed_of(self.seed, self.epoch, "collate", *indices[0]))
            return self.collate(samples)


def seed_of(*parts: Hashable) -> int:
    """Return a seed in [0, 2^32) that depends on ``repr`` of the parts, the same in every process."""
    return zlib.crc32(repr(parts).encode())


def seed_everything(seed: int) -> None:
    """Seed what transforms draw from: Python, NumPy and torch, on the CPU."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


def random_states() -> dict[str, Any]:
    """Return where the random numbers of Python, NumPy and torch (CPU) stand, in what a checkpoint can hold."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    numpy = (kind, np.asarray(keys).tolist(), *rest)
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}


def set_random_states(states: Mapping[str, Any]) -> None:
    """Go back to what :func:`random_states` has returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave random states as they were."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
