"""The rest of an epoch: a last training batch that is too small for the method is left out, and said to be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch.utils.data import BatchSampler, IterableDataset

from entprop_wrap.methods import FastAdvProp
from entprop_wrap.step import Method

__all__ = ["leave_out_small_rests"]


def leave_out_small_rests(trainer: Any, method: Method) -> None:
    """Make the training loader of ``trainer`` leave out a last batch that ``method`` cannot train on, for good.

    ``TrainingArguments(dataloader_drop_last=True)`` would leave out every incomplete last batch, of evaluation too.
    """
    make: Callable[[], Any] = trainer.get_train_dataloader
    # FastAdvProp trains two parts of a batch, each of at least two images; all others need two images.
    least = 4 if isinstance(method, FastAdvProp) else 2
    told: set[str] = set()

    def get_train_dataloader() -> Any:
        loader = make()
        sampler = sampler_of(loader)
        if sampler is None or sampler.drop_last or sampler.batch_size < least:
            return loader
        number = len(sampler.sampler)  # type: ignore[arg-type]
        rest = number % sampler.batch_size
        if not 0 < rest < least or rest == number:
            return loader
        sampler.drop_last = True  # the loader's length follows, and all that the Trainer computes from it
        message = (
            f"{number} training images in batches of {sampler.batch_size} leave a last batch of {rest}, too small for "
            f"{type(method).__name__}: it is left out of every epoch, which has {len(sampler)} batches then. Which "
            "images these are changes with the shuffling. Evaluation is not affected. Another "
            "per_device_train_batch_size leaves no such rest."
        )
        if message not in told and trainer.is_local_process_zero():
            warnings.warn(message, stacklevel=2)
        told.add(message)
        return loader

    trainer.get_train_dataloader = get_train_dataloader


def sampler_of(loader: Any) -> BatchSampler | None:
    """Return what makes the batches of ``loader``, where its last batch is the rest.

    None for streams, for batch samplers of other kinds, and in several processes: they fill the last batches up from
    the first ones (accelerate's ``even_batches``; without it, one batch less would leave a process waiting).
    """
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    sampler = getattr(loader, "batch_sampler", None)
    if type(sampler) is not BatchSampler or not hasattr(sampler.sampler, "__len__"):
        return None
    return sampler
