"""MixProp (Zhang et al., "MixProp: Towards high-performance image recognition via dual BN", BMVC 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.losses import Target
from entprop_wrap.mixing import Mixer, MixUp
from entprop_wrap.options import check_name, check_number, shown, store_as_python
from entprop_wrap.selection import entropy
from entprop_wrap.step import Step, StepOutput

__all__ = ["MixProp"]


@dataclass(frozen=True)
class MixProp:
    """Clean images through the main norms, the same images mixed up through the auxiliary norms.

    The paper itself is not public; this follows its description in EntProp (section 4.1.3): both losses on their own
    batch, the two-label MixUp loss. It is EntProp without selection and without perturbation, and with a clean main
    pass.

    Cost: 2 passes.

    Attributes:
        mix: What mixes the auxiliary images; ``MixUp(0.2)`` on ImageNet, ``MixUp(1.0)`` elsewhere.
        weight: Of the auxiliary loss, above 0. EntProp's authors align the scale of both losses with that of vanilla
            training, without a formula; 1 is the plain sum.
        auxiliary: Name of the auxiliary domain.
    """

    mix: Mixer = MixUp()  # noqa: RUF009 - frozen
    weight: float = 1.0
    auxiliary: str = "aux"

    def __post_init__(self) -> None:
        store_as_python(self)
        check_number("weight", self.weight, lambda value: value > 0, "above 0")
        check_name("auxiliary", self.auxiliary)
        if isinstance(self.mix, type) or not hasattr(self.mix, "draw"):
            raise ConfigurationError(f"mix must be a mixer such as MixUp(alpha=1.0), found {shown(self.mix)}.")

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
        mix = self.mix.draw(step.images.shape, step.generator)
        images = mix.apply(step.images)
        with step.auxiliary(self.auxiliary):
            aux_logits = step.forward(images)
            aux_loss = Target.mixed(step.labels, mix).loss(step.loss, aux_logits)
            step.backward(self.weight * aux_loss)
        logits, main_loss, aux_loss = logits.detach(), main_loss.detach(), aux_loss.detach()
        return StepOutput(
            loss=main_loss + self.weight * aux_loss,
            main_loss=main_loss,
            logits=logits,
            entropy=entropy(logits),
            passes=2.0,
            aux_loss=aux_loss,
            aux_logits=aux_logits.detach(),
            aux_images=images,
            checker=step.checker,
        )
