"""Every option of the :class:`~entprop_wrap.trainer.Trainer`, with its range and its default."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.utils.options import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_text,
    store_as_python,
)


@dataclass(frozen=True)
class TrainerConfig:
    """How long, how fast and how a model is trained, and what is written where.

    A *step* is a step of the optimizer. With several processes, ``batch_size`` and ``gradient_accumulation_steps`` are
    per process, as Accelerate has it: a step sees ``batch_size * gradient_accumulation_steps * processes`` images.

    Attributes:
        epochs: Passes over the training data, at least 1.
        batch_size: Images per batch and process, at least 2. Used where data is given as a dataset; a DataLoader
            brings its own. The last, incomplete training batch of an epoch is left out.
        eval_batch_size: Batch size of evaluation, at least 1; every image counts there. None: ``batch_size``.
        optimizer: "adamw", "adam" or "sgd", or a function ``(parameter groups) -> Optimizer``, which then sets its own
            learning rate. A ready optimizer is given to the Trainer itself.
        learning_rate: Peak learning rate of the named optimizers, above 0.
        momentum: Momentum of "sgd", in [0, 1).
        weight_decay: Weight decay, at least 0. None: 0.05 for "adamw", 5e-4 for "adam" and "sgd"; a function sets its
            own. Biases and norm layers are not decayed, nor are the copies of norm layers.
        schedule: Learning rate over the steps: "cosine" and "linear" fall to 0, "step" divides by 10 after each
            third, "constant" stays. Or a function ``(optimizer, total steps) -> LRScheduler``, stepped after each step.
        warmup: Share of the steps in which the named schedules rise linearly from 0, in [0, 1).
        mixed_precision: "no", "bf16" or "fp16". None: what ``accelerate launch`` was told, else "no".
        gradient_accumulation_steps: Batches per step, at least 1. A last, smaller group of an epoch is averaged over
            its own size.
        max_grad_norm: Gradients are scaled down to this L2 norm, above 0; None: never.
        channels_last: Lay out convolution weights and images as NHWC in memory, which is faster on many GPUs.
        compile: Run the model through ``torch.compile``.
        ema_decay: Keep an exponential moving average of weights and statistics with this decay per step, in (0, 1), and
            evaluate and export it instead of the last weights. None: no average.
        seed: Seed of everything random, in [0, 2^31]; a process adds its index where processes should differ.
        workers: Processes that load data, per training process, at least 0. Used where data is given as a dataset.
        output_dir: Folder of metrics, checkpoints and the exported model; on several hosts, a shared one.
        log_every: Steps between two lines of training metrics, at least 1.
        evaluate_every: Epochs between evaluations, at least 1; the last epoch is always followed by one.
        save_every: Epochs between checkpoints, at least 1; the last epoch is always followed by one. None: no
            checkpoints at all.
        save_every_steps: Steps between further checkpoints, at least 1; None: none.
        keep_last: Number of latest checkpoints to keep, at least 1; None: all.
        keep_best: Evaluation metric by which the best checkpoint is also kept: "accuracy", "mean_class_accuracy" or
            "loss". A new best is saved at once. None: no such checkpoint.
        log_with: Trackers, as ``accelerate.Accelerator`` takes them: "tensorboard", "wandb", a ``GeneralTracker``, or a
            list of such.
        project: Project name for the trackers.
        progress: Show a progress bar on the main process.

    Raises:
        ConfigurationError: Options are out of range; the message lists all of them.
    """

    epochs: int = 10
    batch_size: int = 64
    eval_batch_size: int | None = None
    optimizer: Literal["adamw", "adam", "sgd"] | Callable[[list[dict[str, Any]]], Optimizer] = "adamw"
    learning_rate: float = 3e-4
    momentum: float = 0.9
    weight_decay: float | None = None
    schedule: Literal["cosine", "linear", "step", "constant"] | Callable[[Optimizer, int], LRScheduler] = "cosine"
    warmup: float = 0.05
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = 1.0
    channels_last: bool = False
    compile: bool = False
    ema_decay: float | None = None
    seed: int = 0
    workers: int = 0
    output_dir: str | Path = "output"
    log_every: int = 50
    evaluate_every: int = 1
    save_every: int | None = 1
    save_every_steps: int | None = None
    keep_last: int | None = 2
    keep_best: Literal["accuracy", "mean_class_accuracy", "loss"] | None = "accuracy"
    log_with: Any = None
    project: str = "entprop"
    progress: bool = True

    def __post_init__(self) -> None:
        problems = []
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            try:
                check(name, value)
            except ConfigurationError as error:
                problems.append(str(error))
        if self.save_every is None and self.save_every_steps is not None:
            problems.append("save_every=None turns checkpoints off, but save_every_steps is set: set both or neither.")
        if problems:
            raise ConfigurationError("TrainerConfig: " + " ".join(problems))
        store_as_python(self)
        # Not a folder named "~" in the current one.
        object.__setattr__(self, "output_dir", type(self.output_dir)(os.path.expanduser(self.output_dir)))


def _check_named(name: str, value: Any, allowed: Sequence[str], signature: str) -> None:
    """Raise unless ``value`` is one of some names, or a function."""
    try:
        callable(value) or check_choice(name, value, allowed)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} Or write {signature}.") from None


_COUNTS = ("epochs", "eval_batch_size", "gradient_accumulation_steps", "log_every", "evaluate_every", "save_every")
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys((*_COUNTS, "save_every_steps", "keep_last"), partial(check_integer, least=1)),
    "batch_size": partial(check_integer, least=2),
    "workers": partial(check_integer, least=0),
    "seed": partial(check_integer, least=0, most=2**31),  # NumPy's end at 2^32, and each process adds its index
    "learning_rate": partial(check_number, good=lambda value: value > 0, range_="above 0"),
    "momentum": partial(check_number, good=lambda value: 0 <= value < 1, range_="in [0, 1)"),
    "weight_decay": partial(check_number, good=lambda value: value >= 0, range_="of at least 0"),
    "warmup": partial(check_number, good=lambda value: 0 <= value < 1, range_="in [0, 1), a share of all steps"),
    "max_grad_norm": partial(check_number, good=lambda value: value > 0, range_="above 0, or None"),
    "ema_decay": partial(check_number, good=lambda value: 0 < value < 1, range_="in (0, 1), or None"),
    "optimizer": partial(
        _check_named,
        allowed=("adamw", "adam", "sgd"),
        signature="a function (parameter groups) -> Optimizer, or Trainer(..., optimizer=optimizer) with a ready one",
    ),
    "schedule": partial(
        _check_named,
        allowed=("cosine", "linear", "step", "constant"),
        signature="a function (optimizer, steps) -> LRScheduler",
    ),
    "mixed_precision": partial(check_choice, allowed=("no", "bf16", "fp16")),
    "keep_best": partial(check_choice, allowed=("accuracy", "mean_class_accuracy", "loss")),
    **dict.fromkeys(("channels_last", "compile", "progress"), check_flag),
    "output_dir": lambda name, value: check_text(name, str(value) if isinstance(value, Path) else value),
    "project": check_text,
}
#: Options that may be None.
_OPTIONAL = (
    *("eval_batch_size", "weight_decay", "mixed_precision", "max_grad_norm", "ema_decay"),
    *("save_every", "save_every_steps", "keep_last", "keep_best"),
)
