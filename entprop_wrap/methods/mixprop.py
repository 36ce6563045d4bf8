"""MixProp (Zhang et al., "MixProp: Towards high-performance image recognition via dual BN", BMVC 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.losses import Target
from entprop_wrap.functional.mixing import Mixer, find_mixer
from entprop_wrap.methods.base import Step, StepOutput
from entprop_wrap.utils.options import check_name, check_number, store_as_python

__all__ = ["MixProp"]


@dataclass(frozen=True)
class MixProp:
    """Clean images through the main norms, the same images mixed up through the auxiliary norms.

    The paper itself is not public; this follows its description in EntProp (section 4.1.3): both losses on their own
    batch, the two-label MixUp loss. It is EntProp without selection and without perturbation, and with a clean main
    pass.

    Cost: 2 passes.

    Attributes:
        mix: What mixes the auxiliary images; ``MixUp(0.2)`` on ImageNet, ``MixUp(1.0)`` or "mixup" elsewhere.
        weight: Of the auxiliary loss, above 0. EntProp's authors align the scale of both losses with that of vanilla
            training, without a formula; 1 is the plain sum.
        auxiliary: Name of the auxiliary domain.
        alpha: Of the mixer, where ``mix`` names it; the mixer then has it, and this is None.
    """

    mix: str | None | Mixer = "mixup"  # noqa: RUF036 - as in EntProp
    weight: float = 1.0
    auxiliary: str = "aux"
    alpha: float | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        store_as_python(self)
        check_number("weight", self.weight, lambda value: value > 0, "above 0")
        check_name("auxiliary", self.auxiliary)
        object.__setattr__(self, "mix", find_mixer(self.mix, self.alpha))
        object.__setattr__(self, "alpha", None)
        if self.mix is None:
            raise ConfigurationError("mix must be a mixer such as MixUp(alpha=1.0), or 'mixup'; found None.")

    @property
    def auxiliaries(self) -> tuple[str, ...]:
        """The one auxiliary domain."""
        return (self.auxiliary,)

    def step(self, step: Step) -> StepOutput:
        """Run the step."""
        step.warn_if_mixed()
        with step.only_local():
            logits = step.forward(step.images)
            main_loss = Target(step.labels).loss(step.loss, logits)
            step.backward(main_loss)
        mix = cast(Mixer, self.mix).draw(step.images.shape, step.generator)
        images = mix.apply(step.images)
        with step.auxiliary(self.auxiliary):
            aux_logits = step.forward(images)
            aux_loss = Target.mixed(step.labels, mix).loss(step.loss, aux_logits)
            step.backward(self.weight * aux_loss)
        return step.output(
            loss=main_loss + self.weight * aux_loss,
            main_loss=main_loss,
            logits=logits,
            passes=2.0,
            aux_loss=aux_loss,
            aux_logits=aux_logits,
            aux_images=images,
        )
