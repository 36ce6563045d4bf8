"""Training data that grows: its images on disk and in memory, and the batches of every epoch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from entprop_wrap.data.batches import form_of, refuse_dataset
from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import Checker, check_images, check_labels
from entprop_wrap.errors import CheckpointError, DataError, UnsupportedModelError
from entprop_wrap.functional.losses import Loss
from entprop_wrap.trainer.config import TrainerConfig
from entprop_wrap.trainer.data_loader import Batches, as_it_is
from entprop_wrap.trainer.enlarged import Enlarged, to_bytes
from entprop_wrap.trainer.growth import MaximumEntropyGrowth
from entprop_wrap.trainer.reproducible import ReproducibleBatches, random_states_kept
from entprop_wrap.utils.files import flush, flush_folder, sha256
from entprop_wrap.utils.model_output import logits_of

__all__ = ["GrowingBatches", "growing_batches"]

#: ``(images, labels) -> harder images`` on the accelerator's device.
Maximise = Callable[[Tensor, Tensor], Tensor]


class GrowingBatches:
    """The batches of one process in a run whose data grows.

    Args:
        batches: Of the data as it is at first.
        growth: When and how it grows.
        epochs: Of the run.
        accumulation: Batches per step.
        space: Pixel space of the images.
        maximise: What an image grows into.
        folder: Where grown images are kept.
        accelerator: Whose processes share the work.
        progress: Show a progress bar on the main process.

    Attributes:
        spans: The epochs of the run.

    Raises:
        DataError: The data cannot be grown.
        ConfigurationError: The run ends before the last phase.
    """

    def __init__(
        self,
        batches: Batches,
        growth: MaximumEntropyGrowth,
        *,
        epochs: int,
        accumulation: int,
        space: PixelSpace,
        maximise: Maximise,
        folder: Path,
        accelerator: Accelerator,
        progress: bool,
    ) -> None:
        self.first, self.growth, self.space, self.maximise = batches, growth, space, maximise
        self.folder, self.accelerator, self.progress = folder, accelerator, progress
        with random_states_kept():
            sample = batches.dataset[0]
        self.form = form_of(sample, batches.name)
        self.source = batches.dataset if growth.source is None else self._check_source(growth.source, sample)
        self.parts: list[dict[str, Tensor]] = []
        self.current = batches
        lengths: dict[int, int] = {}

        def number(phase: int) -> int:
            if phase not in lengths:
                lengths[phase] = len(batches.of(range(batches.samples * 2**phase)))
            return lengths[phase]

        self.spans = growth.plan(number, epochs, accumulation)

    def length(self, epoch: int) -> int:
        """Return the batches of this process in an epoch, counted from 0."""
        return self.spans[min(epoch, len(self.spans) - 1)].batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from batch ``start`` on."""
        return self.current.epoch(epoch, start, self.length(epoch))

    @property
    def samples(self) -> int:
        """Samples of the data as it is."""
        return self.current.samples

    def due(self, epoch: int) -> bool:
        """Say whether the data has to grow before an epoch."""
        return len(self.parts) < self.spans[epoch].phase

    def grow(self, epoch: int, checksums: list[str]) -> None:
        """Make what an epoch needs and is not there, and add its checksum. Call it on all processes."""
        while self.due(epoch):
            path = self._path(self.folder, len(self.parts) + 1)
            self._make(path, epoch)
            self._take(path)
            checksums.append(sha256(path))

    def restore(self, phases: int, folder: Path) -> None:
        """Go back to where a checkpoint was written, with the images that it had. Call it on all processes.

        Args:
            phases: How many lie behind.
            folder: Where their images are; copied from there if that is another folder.

        Raises:
            CheckpointError: Images cannot be read, or are of another run; nothing has changed then.
        """
        before = self.parts, self.current
        self.parts, self.current = [], self.first
        try:
            for phase in range(1, phases + 1):
                self._take(self._path(folder, phase))
        except CheckpointError:
            self.parts, self.current = before
            raise
        if folder.resolve() != self.folder.resolve() and self.accelerator.is_main_process:
            for phase in range(1, phases + 1):
                self.folder.mkdir(parents=True, exist_ok=True)
                partial = self._path(self.folder, phase).with_suffix(".partial")
                shutil.copyfile(self._path(folder, phase), partial)
                os.replace(partial, self._path(self.folder, phase))
        self.accelerator.wait_for_everyone()

    def _make(self, path: Path, epoch: int) -> None:
        """Grow all images there are into ``path``: each process a share, which the main process puts together."""
        process, processes = self.first.process, self.first.processes
        pairs = Enlarged(self.source, self.parts, self.form, self.space, pairs=True)
        size = self.first.sampler.batch_size
        chunks = [list(range(start, min(start + size, len(pairs)))) for start in range(0, len(pairs), size)]
        mine = chunks[process::processes]
        images, labels = [], []
        visible = self.progress and self.accelerator.is_main_process
        name = f"growth, phase {len(self.parts) + 1}"
        for batch in tqdm(self._load(pairs, mine, epoch), name, len(mine), disable=not visible, unit="batch"):
            images.append(to_bytes(self._grown(*batch), self.space).cpu())
            labels.append(batch[1])
        own = {f"images-{i}": value for i, value in enumerate(images)}
        own |= {f"labels-{i}": value for i, value in enumerate(labels)}
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(own, self._share(path, process))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shares = [load_file(self._share(path, other)) for other in range(processes)]
            whole = {
                kind: torch.cat([shares[i % processes][f"{kind}-{i // processes}"] for i in range(len(chunks))])
                for kind in ("images", "labels")
            }
            write(whole, path)
            for other in range(processes):
                self._share(path, other).unlink()
        self.accelerator.wait_for_everyone()

    def _load(self, pairs: Dataset[Any], chunks: list[list[int]], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            ReproducibleBatches(pairs, default_collate, self.first.seed, epoch, self.first.name),
            batch_sampler=chunks,
            collate_fn=as_it_is,
            generator=torch.Generator(),  # else torch draws from the generator that dropout draws from
            **self.first.options,
        )
        yield from loader

    def _grown(self, images: Tensor, labels: Tensor) -> Tensor:
        check_images(images, self.space)
        Checker().images(images, self.space)
        device = self.first.device
        return self.maximise(images.to(device), check_labels(labels, images).to(device))

    def _take(self, path: Path) -> None:
        """Make the images in ``path`` part of the data."""
        try:
            part = load_file(path)
        except Exception as error:  # safetensors has an error class of its own
            raise CheckpointError(
                f"{path} cannot be read ({error}). It holds the images that this run has grown: a checkpoint from "
                "after this phase cannot be resumed without it."
            ) from error
        expected = len(self.first.dataset) * 2 ** len(self.parts)
        if part.keys() != {"images", "labels"} or len(part["images"]) != expected:
            raise CheckpointError(f"{path} holds other images than this run has: expected {expected}.")
        self.parts.append(part)
        growth = self.growth
        self.current = self.first.of(Enlarged(self.first.dataset, self.parts, self.form, self.space, growth.augment))

    def _check_source(self, source: Any, sample: Any) -> Any:
        refuse_dataset(source, "source")
        if len(source) != self.first.samples:
            raise DataError(
                f"source has {len(source)} samples, {self.first.name} {self.first.samples}. Expected the same samples "
                "in the same order, without augmentation."
            )
        with random_states_kept():
            plain = source[0]
        (image, label), (other, wanted) = form_of(plain, "source").take(plain), self.form.take(sample)
        if image.shape != other.shape or not torch.equal(torch.as_tensor(label), torch.as_tensor(wanted)):
            raise DataError(
                f"The first sample of source is {tuple(image.shape)} with label {label!r}, that of {self.first.name} "
                f"{tuple(other.shape)} with {wanted!r}. Expected the same samples in the same order."
            )
        return source

    @staticmethod
    def _path(folder: Path, phase: int) -> Path:
        return folder / f"phase-{phase:02d}.safetensors"

    @staticmethod
    def _share(path: Path, process: int) -> Path:
        return path.with_suffix(f".process-{process:05d}")


def growing_batches(
    growth: MaximumEntropyGrowth,
    batches: Batches,
    model: nn.Module,
    loss: Loss,
    space: PixelSpace,
    config: TrainerConfig,
    accelerator: Accelerator,
    folder: Path,
) -> GrowingBatches:
    """Return the batches of a run of ``model`` in which ``growth`` is at work.

    Raises:
        DataError: The data cannot be grown.
        ConfigurationError: The run ends before the last phase.
        UnsupportedModelError: The model will be sharded.
    """
    if not isinstance(growth, MaximumEntropyGrowth):
        raise TypeError(f"growth expects MaximumEntropyGrowth.cifar(), say; found {growth!r}.")
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UnsupportedModelError(
            "Data cannot grow through a sharded model: processes climb on unequal shares, and would wait for one "
            "another. Choose DDP with `accelerate config`."
        )

    def forward(images: Tensor) -> Tensor:
        # The model itself: a DDP container would have processes wait for one another.
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return logits_of(model(images), len(images))

    return GrowingBatches(
        batches,
        growth,
        epochs=config.epochs,
        accumulation=config.gradient_accumulation_steps,
        space=space,
        maximise=lambda images, labels: growth.ascent.run(model, forward, images, labels, loss=loss, space=space),
        folder=folder,
        accelerator=accelerator,
        progress=config.progress,
    )


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file(dict(tensors), partial)
    flush(partial)
    os.replace(partial, path)
    flush_folder(path.parent)
