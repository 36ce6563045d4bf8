"""ME-ADA (Zhao et al., "Maximum-Entropy Adversarial Data Augmentation", NeurIPS 2020) as a training step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from entprop_wrap.functional.losses import Target
from entprop_wrap.functional.uncertainty import num_selected
from entprop_wrap.methods.base import Step, StepOutput
from entprop_wrap.methods.entropy_ascent import EntropyAscent, check_ascent
from entprop_wrap.utils.options import check_name, check_number, store_as_python

__all__ = ["MEADA"]


@dataclass(frozen=True)
class MEADA:
    """Clean images through the main norms, maximum-entropy images, made from them, through the auxiliary norms.

    ME-ADA in one step: what the paper adds to the data set for good, see ``MaximumEntropyGrowth``, is made anew from
    every batch, and has norms of its own. That is ours, after AdvProp; so are ``weight`` and ``fraction``.

    The ascent runs through the *main* norms: it is the network in use whose uncertainty is to be raised, and clean
    images, where it starts, are what these norms know. It runs in evaluation mode, as in the official code, after the
    main pass. In the first steps of a training from scratch running statistics are far from the data's: start from
    trained weights, or train without for some epochs.

    Cost: ``1 + k (T + 1)`` passes, with k the fraction and T the steps of the ascent: 17 by default.

    Attributes:
        ascent: How images become hard.
        fraction: Share k of the batch that is used for that, in (0, 1], rounded half up and at least 2 images: the
            first rows of the batch, which is shuffled.
        weight: Of each grown image, where a clean one has 1; above 0. At 1, the sum is that of one mean over their
            union, in which the paper trains, up to the factor ``1 + k``.
        auxiliary: Name of the auxiliary domain.

    Raises:
        ConfigurationError: An option is out of range.
    """

    ascent: EntropyAscent = EntropyAscent()  # noqa: RUF009 - frozen
    fraction: float = 1.0
    weight: float = 1.0
    auxiliary: str = "aux"

    def __post_init__(self) -> None:
        store_as_python(self)
        check_ascent(self.ascent)
        check_number("fraction", self.fraction, lambda value: 0 < value <= 1, "in (0, 1]")
        check_number("weight", self.weight, lambda value: value > 0, "above 0")
        check_name("auxiliary", self.auxiliary)

    @classmethod
    def cifar(cls, **options: Any) -> MEADA:
        """Return a step with the published ascent for CIFAR-10 and CIFAR-100."""
        return cls(**{"ascent": EntropyAscent.cifar(), **options})

    @classmethod
    def mnist(cls, **options: Any) -> MEADA:
        """Return a step with the published ascent for MNIST."""
        return cls(**{"ascent": EntropyAscent.mnist(), **options})

    @property
    def auxiliaries(self) -> tuple[str, ...]:
        """The one auxiliary domain."""
        return (self.auxiliary,)

    def step(self, step: Step) -> StepOutput:
        """Run the step."""
        with step.only_local():
            logits = step.forward(step.images)
            main_loss = Target(step.labels).loss(step.loss, logits)
            step.backward(main_loss)
        number = num_selected(len(logits), self.fraction)
        step.warn_if_few(number)
        images, labels = step.images[:number], step.labels[:number]
        with step.only_local():
            images = self.ascent.run(step.model, step.forward, images, labels, loss=step.loss, space=step.space)
        weight = self.weight * number / len(logits)
        with step.auxiliary(self.auxiliary):
            aux_logits = step.forward(images)
            aux_loss = Target(labels).loss(step.loss, aux_logits)
            step.backward(weight * aux_loss)
        return step.output(
            loss=main_loss + weight * aux_loss,
            main_loss=main_loss,
            logits=logits,
            passes=1 + number / len(logits) * (self.ascent.steps + 1),
            aux_loss=aux_loss,
            aux_logits=aux_logits,
            aux_images=images,
        )
