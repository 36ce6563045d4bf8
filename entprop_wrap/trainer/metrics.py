"""The numbers of a run: averages of training steps, evaluations, and the file they are written to."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import Checker, check_images, check_labels, checker_of
from entprop_wrap.errors import ModelOutputError
from entprop_wrap.functional.losses import Loss, takes_any_targets
from entprop_wrap.functional.uncertainty import entropy, two_classes
from entprop_wrap.methods.step_loss import StepLoss
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.trainer.data_loader import Batches
from entprop_wrap.utils.files import together, writing
from entprop_wrap.utils.model_output import logits_of
from entprop_wrap.utils.modules import evaluating, plain_model

__all__ = ["Meter", "MetricsFile", "evaluate"]


class Meter:
    """Averages over the batches between two log lines. Adding waits for nothing; reading waits for the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.finite: Tensor | None = None
        self.batches = 0
        self.images = 0
        self.passes = 0.0
        self.last: StepOutput | None = None

    def add(self, output: StepOutput, images: int) -> None:
        """Add one batch. A loss that is not finite is counted, and left out of the sums."""
        values = {"loss": output.loss, "main_loss": output.main_loss, "main_entropy": output.entropy.mean()}
        if output.aux_loss is not None and output.aux_logits is not None:
            values["aux_loss"] = output.aux_loss
            values["aux_entropy"] = entropy(output.aux_logits).mean()
        finite = torch.isfinite(output.loss)
        for name, value in values.items():
            value = torch.where(finite, value.float(), 0.0)
            self.sums[name] = value if name not in self.sums else self.sums[name] + value
        self.finite = finite.float() if self.finite is None else self.finite + finite
        self.batches += 1
        self.images += images
        self.passes += output.passes
        self.last = output

    def read(self, accelerator: Accelerator) -> tuple[dict[str, float], int, int]:
        """Return the means over batches and processes, and how many batches had a finite loss, of how many.

        Raises:
            LabelError: The device found labels out of range since the last call.
            PixelRangeError: The device found images out of the pixel space since the last call.
        """
        if self.last is not None and self.last.checker is not None:
            self.last.checker.raise_pending()
        assert self.finite is not None
        local = torch.stack([*self.sums.values(), self.finite, torch.full_like(self.finite, self.batches)])
        *sums, finite, batches = accelerator.reduce(local, reduction="sum").tolist()  # type: ignore[union-attr]
        means = {name: total / max(finite, 1) for name, total in zip(self.sums, sums, strict=True)}
        return {**means, "passes": self.passes / self.batches}, int(finite), int(batches)

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes, so that a resumed run logs the same averages."""
        return {
            "sums": {name: value.cpu() for name, value in self.sums.items()},
            "finite": None if self.finite is None else self.finite.cpu(),
            "counts": (self.batches, self.images, self.passes),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from a saved state."""
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.finite = None if state["finite"] is None else state["finite"].to(device)
        self.batches, self.images, self.passes = state["counts"]
        self.last = None


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
        "loss"; "accuracy": the share of samples whose highest logit is that of the label, or, where labels are soft or
        multi-hot, of one of the most probable; "mean_class_accuracy", over classes that occur. Both in [0, 1].

    Raises:
        ImageError: Images of a wrong type or shape, or outside the pixel space.
        LabelError: Labels of a wrong type, shape or range.
        ModelOutputError: The model returned no logits, or another number of them.
        Exception: Whatever data, model or ``loss`` raise; an error on one process is raised on all.
    """
    checker, images_checker = checker_of(plain_model(model)), Checker()
    loaded = enumerate(batches.epoch(0))
    losses: list[Tensor] = []
    counts: Tensor | None = None

    def load() -> tuple[int, Tensor, Tensor] | None:
        number, (images, labels) = next(loaded, (0, (None, None)))
        if images is None:
            checker.raise_pending()
            images_checker.raise_pending()
            return None
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        check_images(images, space)
        images_checker.images(images, space)
        return number, images, check_labels(labels, images)

    def count(number: int, images: Tensor, labels: Tensor) -> None:
        nonlocal counts
        output = model(images)
        any_targets = takes_any_targets(loss)
        logits = logits_of(output, len(images), differentiable=False, least=1 if any_targets else 2)
        scores, labels_of_classes = two_classes(logits, labels)
        if counts is None:
            counts = torch.zeros(2, scores.shape[1], dtype=torch.int64, device=logits.device)
        if number >= batches.number:
            return  # a repetition, which keeps processes in step where forward passes communicate
        checker.labels(labels, logits.shape[1], probabilities=not any_targets)
        if counts.shape[1] != scores.shape[1]:
            raise ModelOutputError(
                f"Expected as many logits for every batch, found {counts.shape[1]} and then {scores.shape[1]}."
            )
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

    def following(*batch: Any) -> tuple[int, Tensor, Tensor] | None:
        count(*batch)
        return load()

    with evaluating(model), torch.no_grad():
        # Processes meet between batches: one that fails before a forward pass must not leave others waiting in theirs.
        batch = together(load)
        while batch is not None:
            batch = together(partial(following, *batch))
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


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, each with "kind" ("train" or "eval"), "step" and "epoch"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: dict[str, Any]) -> None:
        """Append one line.

        Raises:
            CheckpointError: The disk is full, or the file not to be written.
        """
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def cut(self, step: int, evaluated: bool) -> None:
        """Drop what a run resumed at ``step`` writes again, and a line that a crash cut short.

        Args:
            step: Where it is resumed.
            evaluated: Whether it was evaluated there, if it is to be.
        """
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                content = json.loads(line)
                if (content["step"], content["kind"] == "eval" and not evaluated) <= (step, False):
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        partial = self.path.with_suffix(".partial")
        with writing(self.path):
            partial.write_text("".join(kept), encoding="utf-8")
            os.replace(partial, self.path)
