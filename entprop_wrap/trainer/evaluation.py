"""Loss and accuracy of a classifier on a data set, exact over any number of processes."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import Checker, check_images, check_labels, checker_of
from entprop_wrap.errors import ModelOutputError
from entprop_wrap.functional.losses import Loss
from entprop_wrap.methods.step_loss import StepLoss
from entprop_wrap.trainer.data_loader import Batches
from entprop_wrap.utils.model_output import logits_of
from entprop_wrap.utils.modules import evaluating, plain_model

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
        loss: ``(logits, labels) -> scalar mean``; it is given what else it asks for, as in a step.
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
    checker, images_checker = checker_of(plain_model(model)), Checker()
    losses: list[Tensor] = []
    counts: Tensor | None = None
    with evaluating(model), torch.no_grad():
        for number, (images, labels) in enumerate(batches.epoch(0)):
            if channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            check_images(images, space)
            images_checker.images(images, space)
            labels = check_labels(labels, images)
            output = model(images)
            logits = logits_of(output, len(images), differentiable=False)
            if counts is None:
                counts = torch.zeros(2, logits.shape[1], dtype=torch.int64, device=logits.device)
            if number >= batches.number:
                continue  # a repetition, which keeps processes in step where forward passes communicate
            checker.labels(labels, logits.shape[1])
            if counts.shape[1] != logits.shape[1]:
                raise ModelOutputError(
                    f"Expected as many logits for every batch, found {counts.shape[1]} and then {logits.shape[1]}."
                )
            mean = StepLoss(loss, checker, len(images))
            mean.passed(logits, output, images)
            losses.append(mean(logits, labels) * len(logits))
            classes = labels.argmax(1) if labels.is_floating_point() else labels
            counts[0].index_add_(0, classes, (logits.argmax(1) == classes).long())
            counts[1].index_add_(0, classes, torch.ones_like(classes))
        checker.raise_pending()
        images_checker.raise_pending()
    assert counts is not None
    # Summed in Python's double precision, which not every device has.
    total = sum(gather_object([sum(torch.stack(losses).tolist()) if losses else 0.0]))
    right, seen = accelerator.reduce(counts, reduction="sum").cpu().double()  # type: ignore[union-attr]
    present = seen > 0
    return {
        "loss": total / float(seen.sum()),
        "accuracy": float(right.sum() / seen.sum()),
        "mean_class_accuracy": float((right[present] / seen[present]).mean()),
    }
