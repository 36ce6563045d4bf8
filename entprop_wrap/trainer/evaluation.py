"""Evaluation on all processes: loss and accuracy, in which every sample counts once."""

from __future__ import annotations

from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import Checker, check_images, check_labels, checker_of
from entprop_wrap.functional.losses import Loss, takes_any_targets
from entprop_wrap.functional.uncertainty import two_classes
from entprop_wrap.methods.step_loss import StepLoss
from entprop_wrap.trainer.data_loader import Batches
from entprop_wrap.utils.files import together
from entprop_wrap.utils.model_output import logits_of
from entprop_wrap.utils.modules import evaluating, plain_model


def evaluate(
    model: nn.Module, batches: Batches, loss: Loss, space: PixelSpace, accelerator: Accelerator
) -> dict[str, float]:
    """Evaluate ``model`` as it stands, in evaluation mode and in its main domain; every sample counts once.

    Counts and sums are added up over processes, not logits gathered: nothing is left out or counted twice, whatever the
    number of samples, and memory does not grow with it. An error on one process is raised on all.

    Returns:
        "loss"; "accuracy": the share of samples whose highest logit is that of the label, or, where labels are soft or
        multi-hot, of one of the most probable; "mean_class_accuracy", over classes that occur. Both in [0, 1].
    """
    checker, images_checker = checker_of(plain_model(model)), Checker()
    any_targets = takes_any_targets(loss)
    loaded = batches.epoch(0)
    losses: list[Tensor] = []
    counts: Tensor | None = None

    def load() -> tuple[Tensor, Tensor]:
        images, labels = next(loaded)
        check_images(images, space)
        images_checker.images(images, space)
        return images, check_labels(labels, images)

    def count(images: Tensor, labels: Tensor, repeated: bool) -> None:
        nonlocal counts
        output = model(images)
        logits = logits_of(output, len(images), differentiable=False, least=1 if any_targets else 2)
        scores, labels_of_classes = two_classes(logits, labels)
        if counts is None:
            counts = torch.zeros(2, scores.shape[1], dtype=torch.int64, device=logits.device)
        if repeated:  # to keep processes in step where forward passes communicate
            return
        checker.labels(labels, logits.shape[1], probabilities=not any_targets)
        mean = StepLoss(loss, checker, len(images))
        mean.passed(logits, output, images)
        losses.append(mean(logits, labels) * len(logits))
        found = scores.argmax(1)
        if labels.is_floating_point():
            classes = labels_of_classes.argmax(1)
            right = labels_of_classes.gather(1, found[:, None]).squeeze(1) == labels_of_classes.amax(1)
        else:
            classes, right = labels, found == labels
        counts[0].index_add_(0, classes, right.long())
        counts[1].index_add_(0, classes, torch.ones_like(classes))

    with evaluating(model), torch.no_grad():
        # Processes meet between batches: one that fails before a forward pass must not leave others waiting in theirs.
        for number in range(len(batches)):
            images, labels = together(load)
            together(partial(count, images, labels, number >= batches.number))
    together(checker.raise_pending)
    together(images_checker.raise_pending)
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
