"""Loss and accuracy of a classifier on a data set, exact over any number of processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from entprop_wrap.checks import Checker, check_images, check_labels, checker_of, logits_of
from entprop_wrap.containers import plain_model
from entprop_wrap.errors import ModelOutputError
from entprop_wrap.losses import Loss
from entprop_wrap.perturbation import PixelSpace
from entprop_wrap.trainer.batches import Batches

__all__ = ["evaluate"]


def evaluate(
    model: nn.Module,
    batches: Batches,
    loss: Loss,
    space: PixelSpace,
    accelerator: Accelerator,
    *,
    channels_last: bool = False,
) -> dict[str, float]:
    """Evaluate ``model`` as it stands, in evaluation mode and in its main domain; every sample counts once.

    Counts and sums are added up over processes, not logits gathered: nothing is left out or counted twice, whatever the
    number of samples, and memory does not grow with it.

    Args:
        model: Prepared or plain, on the accelerator's device. The training mode of each module is restored.
        batches: Evaluation data.
        loss: ``(logits, labels) -> scalar mean``.
        space: Pixel space of the images.
        accelerator: Whose processes share the data.
        channels_last: Give the model images in this memory format.

    Returns:
        "loss"; "accuracy", of the most probable label where labels are soft; "mean_class_accuracy", over classes that
        occur. Accuracies are in [0, 1].

    Raises:
        ImageError: Images of a wrong type or shape, or outside the pixel space.
        LabelError: Labels of a wrong type, shape or range.
        ModelOutputError: The model returned no logits, or another number of them.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    checker, images_checker = checker_of(plain_model(model)), Checker()
    totals: Tensor | None = None
    try:
        with torch.no_grad():
            for number, (images, labels) in enumerate(batches.epoch(0)):
                if channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                check_images(images, space)
                images_checker.images(images, space)
                labels = check_labels(labels, images)
                logits = logits_of(model(images), len(images), differentiable=False)
                if number >= batches.number:
                    continue  # a repetition, which keeps processes in step where forward passes communicate
                checker.labels(labels, logits.shape[1])
                batch = _count(logits, labels, loss)
                if totals is not None and totals.shape != batch.shape:
                    raise ModelOutputError(
                        f"Expected as many logits for every batch, found {totals.shape[1]} and then {batch.shape[1]}."
                    )
                totals = batch if totals is None else totals + batch
            if totals is None:  # fewer batches than processes
                totals = torch.zeros_like(_count(logits, labels, loss))
            checker.raise_pending()
            images_checker.raise_pending()
            losses, right, seen = accelerator.reduce(totals, reduction="sum").cpu()  # type: ignore[union-attr]
    finally:
        for module, training in modes.items():
            module.training = training
    present = seen > 0
    return {
        "loss": float(losses.sum() / seen.sum()),
        "accuracy": float(right.sum() / seen.sum()),
        "mean_class_accuracy": float((right[present] / seen[present]).mean()),
    }


def _count(logits: Tensor, labels: Tensor, loss: Loss) -> Tensor:
    """Return ``(3, C)``: summed loss (in the first column), right answers and samples, by class."""
    classes = labels.argmax(1) if labels.is_floating_point() else labels
    # Counts stay exact up to 2^53; MPS has no float64.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    counts = torch.zeros(3, logits.shape[1], device=logits.device, dtype=wide)
    counts[0, 0] = loss(logits, labels) * len(logits)
    counts[1].index_add_(0, classes, (logits.argmax(1) == classes).to(wide))
    counts[2].index_add_(0, classes, torch.ones_like(classes, dtype=wide))
    return counts
