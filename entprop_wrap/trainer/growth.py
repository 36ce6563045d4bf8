"""When and how the training data grows: ME-ADA's procedure (Zhao et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.methods.entropy_ascent import EntropyAscent, check_ascent
from entprop_wrap.utils.options import check_choice, check_integer

__all__ = ["MaximumEntropyGrowth", "Span"]


class Span(NamedTuple):
    """One epoch of a run whose data grows: the phases that lie before it, and its batches per process."""

    phase: int
    batches: int


@dataclass(frozen=True)
class MaximumEntropyGrowth:
    """Double the training data with maximum-entropy versions of it, several times in a run.

        Trainer(model, data, method=Vanilla(), growth=MaximumEntropyGrowth.cifar(source=plain, augment=transform))

    Each time ``every`` epochs (or steps) have passed, until there were ``phases`` of it, *all* images of the data as it
    then is, grown ones too, climb (:class:`~entprop_wrap.methods.EntropyAscent`) through the main norms of the model in
    evaluation mode. The results are appended with the labels of what they were, as uint8, and training goes on over the
    union with whatever method it has (the paper: ``Vanilla()``). After K phases there are 2^K times as many images, and
    an epoch is so much longer.

    What climbs are the images of ``source``: the paper takes no crop and no flip there. Without a ``source`` they are
    those of ``train_data`` as it gives them, that is, *with* its random augmentation, one draw per image. In training,
    grown images pass through ``augment``; without it they come as they are, while the others are still augmented.

    Steps and learning rate: when the data grows and how far is known beforehand, so schedules run over the true total
    from the start. (The official code sets the length of its cosine anew after each phase.) If ``unit`` is "steps", the
    epoch in which a phase falls ends with it; it counts as one of ``TrainerConfig.epochs``.

    A phase falls between two epochs, after evaluation and checkpoint. It draws no random number. Its images are in
    ``checkpoints/growth/phase-01.safetensors``, ..., written at once or not at all; later checkpoints need them to
    resume, and name them by checksum. With several processes each makes a share. The memory of each process must hold
    all grown images.

    Differences from the official code (garyzhao/ME-ADA): it grows before the 10th, 20th epoch (100th, ... step), one
    earlier than here; cuts pixels off to uint8 for CIFAR where these are rounded, and keeps MNIST as floats; leaves out
    MNIST's last batch while growing; and lets the images of CIFAR's last, smaller batch climb in larger steps.

    *Caution.* The official code reports the checkpoint that is best on the corrupted, or target, test sets themselves.
    Do not compare such figures with others: let ``keep_best`` look at validation data, and report the last checkpoint,
    or the best by that.

    Attributes:
        ascent: How images climb.
        phases: How often the data doubles (K), at least 1.
        every: Epochs or steps between phases (T_min), at least 1.
        unit: Of ``every``: "epochs" or "steps" of the optimizer.
        source: The images of ``train_data`` without augmentation: a map-style data set of the same samples in the same
            order, each in the same pixel space and size as the model takes them.
        augment: ``image (C, H, W) -> image (C, H, W)`` in pixel space, applied to a grown image whenever it is loaded
            for training; random numbers from Python, NumPy or torch repeat exactly.

    Raises:
        ConfigurationError: An option is out of range.
    """

    ascent: EntropyAscent = EntropyAscent()  # noqa: RUF009 - frozen
    phases: int = 2
    every: int = 10
    unit: Literal["epochs", "steps"] = "epochs"
    source: Any = field(default=None, repr=False, compare=False)
    augment: Callable[[Tensor], Tensor] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_ascent(self.ascent)
        for name in ("phases", "every"):
            check_integer(name, getattr(self, name), 1)
        check_choice("unit", self.unit, ("epochs", "steps"))
        if self.augment is not None and not callable(self.augment):
            raise ConfigurationError(f"augment must be a function of one image, found {self.augment!r}.")

    @classmethod
    def cifar(cls, **options: Any) -> MaximumEntropyGrowth:
        """Return the published settings for CIFAR-10 and CIFAR-100 (100 epochs): 2 phases, every 10 epochs."""
        return cls(**{"ascent": EntropyAscent.cifar(), "phases": 2, "every": 10, "unit": "epochs", **options})

    @classmethod
    def mnist(cls, **options: Any) -> MaximumEntropyGrowth:
        """Return the published settings for MNIST (10,000 images, 10,001 steps): 3 phases, every 100 steps."""
        return cls(**{"ascent": EntropyAscent.mnist(), "phases": 3, "every": 100, "unit": "steps", **options})

    def plan(self, batches: Callable[[int], int], epochs: int, accumulation: int) -> list[Span]:
        """Return the epochs of a run.

        Args:
            batches: ``phases that lie behind -> batches of a whole epoch, per process``.
            epochs: ``TrainerConfig.epochs``.
            accumulation: Batches per step.

        Raises:
            ConfigurationError: The run ends before the last phase.
        """
        spans: list[Span] = []
        phase = step = 0
        for epoch in range(epochs):
            if phase < self.phases and (step if self.unit == "steps" else epoch) == (phase + 1) * self.every:
                phase += 1
            number = batches(phase)
            if self.unit == "steps" and phase < self.phases:
                number = min(number, ((phase + 1) * self.every - step) * accumulation)
            spans.append(Span(phase, number))
            step += steps_of(number, accumulation)
        if phase < self.phases:
            steps = f" ({step} steps)" if self.unit == "steps" else ""
            raise ConfigurationError(
                f"{self.phases} phases, one every {self.every} {self.unit}, do not fit into a run of {epochs} epochs"
                f"{steps}: {phase} would take place, and training has to go on after the last. Choose more "
                "epochs, fewer phases, or a smaller every."
            )
        return spans


def steps_of(batches: int, accumulation: int) -> int:
    """Return the optimizer steps of an epoch, whose last step takes the batches that are left."""
    return -(-batches // accumulation)
