"""MixProp (Zhang et al., "MixProp: Towards high-performance image recognition via dual BN", BMVC 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.mixing import Mixer, find_mixer
from entprop_wrap.functional.targets import Target, mix_batch
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.utils.options import check_number


@dataclass(frozen=True)
class MixProp(Method):
    """Clean images through the main norms, the same images with MixUp through the auxiliary norms.

    The paper itself is not public; this follows its description in EntProp (section 4.1.3): both losses on their own
    batch, the two-label MixUp loss. It is EntProp without selection and without perturbation, and with a clean main
    pass.

    Cost: 2 passes.

    Attributes:
        mix: What mixes the auxiliary images; ``MixUp(0.2)`` on ImageNet, ``MixUp(1.0)`` or "mixup" elsewhere.
        weight: Weight of the auxiliary loss, above 0. EntProp's authors align the scale of both losses with that of
            vanilla training, without a formula; 1 is the plain sum.
        auxiliary: Name of the auxiliary domain.
        alpha: Parameter of the mixer that ``mix`` names; then stored there, and None here.
    """

    mix: str | None | Mixer = "mixup"  # noqa: RUF036 - as in EntProp
    weight: float = 1.0
    auxiliary: str = "aux"
    alpha: float | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("weight", self.weight, lambda value: value > 0, "above 0")
        object.__setattr__(self, "mix", find_mixer(self.mix, self.alpha))
        object.__setattr__(self, "alpha", None)
        if self.mix is None:
            raise ConfigurationError("mix must be a mixer such as MixUp(alpha=1.0), or 'mixup'; found None.")

    def step(self, step: Step) -> StepOutput:
        """Run the step."""
        step.warn_if_mixed()
        logits, main_loss = step.main_pass(step.images, step.labels)
        _, images, target = mix_batch(cast(Mixer, self.mix), step.images, Target(step.labels), step.generator)
        aux_logits, aux_loss = step.auxiliary_pass(self.auxiliary, images, target, weight=self.weight)
        return step.output(
            loss=main_loss + self.weight * aux_loss,
            main_loss=main_loss,
            logits=logits,
            passes=2.0,
            aux_loss=aux_loss,
            aux_logits=aux_logits,
            aux_images=images,
        )
