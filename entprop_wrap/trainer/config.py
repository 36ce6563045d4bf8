"""Every option of the :class:`~entprop_wrap.trainer.Trainer`, with its range and its default."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.utils.options import is_integer, is_number

__all__ = ["TrainerConfig"]


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
        weight_decay: Decay of the named optimizers, at least 0. Biases and norm layers are not decayed, nor are the
            copies of norm layers.
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
    weight_decay: float = 0.05
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
        for option in fields(self):
            if isinstance(value := getattr(self, option.name), np.generic):
                object.__setattr__(self, option.name, value.item())
        problems = [
            *(self._integer(name, least) for name, least in _INTEGERS.items()),
            self._number("learning_rate", lambda value: value > 0, "above 0"),
            self._number("momentum", lambda value: 0 <= value < 1, "in [0, 1)"),
            self._number("weight_decay", lambda value: value >= 0, "at least 0"),
            self._number("warmup", lambda value: 0 <= value < 1, "a share of all steps in [0, 1)"),
            self._number("max_grad_norm", lambda value: value > 0, "above 0, or None", optional=True),
            self._number("ema_decay", lambda value: 0 < value < 1, "in (0, 1), or None", optional=True),
            self._choice("optimizer", ("adamw", "adam", "sgd"), "a function (parameter groups) -> Optimizer"),
            self._choice(
                "schedule", ("cosine", "linear", "step", "constant"), "a function (optimizer, steps) -> schedule"
            ),
            self._choice("mixed_precision", ("no", "bf16", "fp16", None)),
            self._choice("keep_best", ("accuracy", "mean_class_accuracy", "loss", None)),
            *(self._flag(name) for name in ("channels_last", "compile", "progress")),
            self._text("output_dir", (str, Path)),
            self._text("project", str),
        ]
        if self.save_every is None and self.save_every_steps is not None:
            problems.append(
                "save_every=None turns checkpoints off, but save_every_steps is set; expected both or neither"
            )
        if found := [problem for problem in problems if problem]:
            raise ConfigurationError("TrainerConfig: " + "; ".join(found) + ".")

    def _integer(self, name: str, least: int) -> str:
        value = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return ""
        most = _MOST.get(name, math.inf)
        range_ = f"of at least {least}" + (f" and at most {most}" if name in _MOST else "")
        good = is_integer(value) and least <= value <= most
        return "" if good else f"{name} must be an integer {range_}, found {value!r}"

    def _number(self, name: str, good: Callable[[float], bool], range_: str, optional: bool = False) -> str:
        value = getattr(self, name)
        if value is None and optional:
            return ""
        return "" if is_number(value) and good(value) else f"{name} must be {range_}, found {value!r}"

    def _choice(self, name: str, allowed: Sequence[str | None], or_else: str = "") -> str:
        value = getattr(self, name)
        if (value is None or isinstance(value, str)) and value in allowed:
            return ""
        if or_else and callable(value):
            return ""
        hint = f" or {or_else}" if or_else else ""
        if isinstance(value, Optimizer):
            hint += " (give a ready optimizer to the Trainer: Trainer(..., optimizer=optimizer))"
        return f"{name} must be one of {', '.join(map(repr, allowed))}{hint}; found {value!r}"

    def _flag(self, name: str) -> str:
        value = getattr(self, name)
        return "" if isinstance(value, bool) else f"{name} must be True or False, found {value!r}"

    def _text(self, name: str, types: Any) -> str:
        value = getattr(self, name)
        found = isinstance(value, types) and str(value)
        return "" if found else f"{name} must be a non-empty string{' or a Path' * (types is not str)}, found {value!r}"


#: Integer options and their least values.
_INTEGERS = {
    "epochs": 1,
    "batch_size": 2,
    "eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "workers": 0,
    "log_every": 1,
    "evaluate_every": 1,
    "save_every": 1,
    "save_every_steps": 1,
    "keep_last": 1,
}
#: NumPy's seeds end at 2^32, and each process adds its index.
_MOST = {"seed": 2**31}
_OPTIONAL = ("eval_batch_size", "save_every", "save_every_steps", "keep_last")
