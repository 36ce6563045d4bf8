"""The growth of a dataset by ME-ADA (Zhao et al., NeurIPS 2020), as the paper trains: in phases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, SequentialSampler
from tqdm.auto import tqdm

from entprop_wrap.data.batches import images_and_labels
from entprop_wrap.data.grown_images import GrownImages, collate, form_of, to_bytes, without_augmentation
from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.data.validation import Checker, check_images, check_labels, checker_of
from entprop_wrap.functional.losses import Loss, cross_entropy
from entprop_wrap.methods.me_ada import EntropyAscent, check_ascent
from entprop_wrap.methods.step_loss import StepLoss
from entprop_wrap.utils.model_output import logits_of
from entprop_wrap.utils.modules import check_module, plain_model, refuse_sharded
from entprop_wrap.utils.options import check_function, check_integer
from entprop_wrap.utils.tensors import refuse_inference_mode


def grow(
    model: nn.Module,
    dataset: Any,
    *,
    ascent: EntropyAscent = EntropyAscent(),  # noqa: B008 - frozen
    pixel_space: PixelSpace | None = None,
    loss: Loss | None = None,
    augment: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 128,
    workers: int = 0,
    progress: bool = True,
) -> ConcatDataset[Any]:
    """Return ``dataset`` and, behind it, a maximum-entropy version of each of its images: twice as many samples.

        for phase in range(3):  # CIFAR: 10, 10 and 80 epochs
            Trainer(model, data, method=Vanilla(), config=...).fit()
            data = grow(model, data)

    Each image climbs once, through the main norms of the model in evaluation mode; the result is rounded to uint8 and
    keeps the label. Grown images climb again in the next phase, without ``augment``. To have the others climb without
    random augmentation too, as the paper has it, grow the dataset without one, and augment what is returned.

    With several processes, each grows a share with the first one's running statistics, and all return the same.

    Differences from the official code (garyzhao/ME-ADA): it grows one epoch or step earlier; cuts pixels off to uint8
    for CIFAR where these are rounded, and keeps MNIST as floats, without its last batch. It reports the checkpoint that
    is best on the *test* sets: do not compare such figures with others.

    Args:
        model: The trained model, wrapped or plain; not changed.
        dataset: Map-style, of ``(image (C, H, W), label)`` or of dicts of these two, with tensors as images.
        ascent: How images climb.
        pixel_space: How the images were normalised; None: they are in [0, 1].
        loss: ``(logits, labels) -> scalar mean``; None: cross-entropy.
        augment: ``image -> image``, in pixel space, applied to a grown image whenever it is loaded.
        batch_size: Images that climb at once, at least 1; the result does not depend on it.
        workers: Processes that load data, at least 0.
        progress: Show a progress bar on the first process.

    Returns:
        Samples in the form of ``dataset``'s; grown images are held in memory, as uint8.

    Raises:
        DataError: The dataset is of another form.
        UnsupportedModelError: The model is sharded.
    """
    check_ascent(ascent)
    check_integer("batch_size", batch_size, 1)
    check_module("grow()", model)
    refuse_inference_mode()
    refuse_sharded("grow()", model)
    if augment is not None:
        check_function("augment", augment, "of one image", "augment=transform")
    space = space_of(pixel_space)
    climbing = without_augmentation(dataset)
    form = form_of(climbing, space)
    inner = plain_model(model)  # a container would have processes wait for one another
    together = dist.is_available() and dist.is_initialized()
    process, processes = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    for buffer in inner.buffers() if processes > 1 else ():
        dist.broadcast(buffer, 0)
    batches = list(BatchSampler(SequentialSampler(climbing), batch_size, drop_last=False))
    loader = DataLoader(climbing, batch_sampler=batches[process::processes], num_workers=workers, collate_fn=collate)
    bar = tqdm(loader, "growing", disable=not progress or process > 0, unit="batch")
    shares = [[_climbed(inner, batch, ascent, loss or cross_entropy, space) for batch in bar]]
    if processes > 1:
        own, shares = shares[0], [[] for _ in range(processes)]
        dist.all_gather_object(shares, own)
    everything = [shares[i % processes][i // processes] for i in range(len(batches))]
    images, labels = (torch.cat(part) for part in zip(*everything, strict=True))
    return ConcatDataset([dataset, GrownImages(images, labels, space, augment=augment, **form)])


def _climbed(
    model: nn.Module, batch: Any, ascent: EntropyAscent, loss: Loss, space: PixelSpace
) -> tuple[Tensor, Tensor]:
    """Return what the images of a batch become, as uint8, and their labels."""
    images, labels = images_and_labels(batch, "dataset")
    check_images(images, space)
    Checker().images(images, space)
    labels = check_labels(labels, images)
    mean = StepLoss(loss, checker_of(model), len(images))

    def forward(moved: Tensor) -> Tensor:
        output = model(moved)
        logits = logits_of(output, len(moved), least=1 if mean.takes_any_targets else 2)
        mean.passed(logits, output, moved)
        return logits

    device = next((parameter.device for parameter in model.parameters()), images.device)
    climbed = ascent.run(model, forward, images.to(device), labels.to(device), loss=mean, space=space)
    return to_bytes(climbed, space).cpu(), labels
