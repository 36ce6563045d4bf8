"""Fine-grained AdvProp: several auxiliary domains (Xie et al., CVPR 2020; slides 37-39 of the authors' talk)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import Attack, is_attack
from entprop_wrap.methods.advprop import propagate
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.methods.views import Augmentation
from entprop_wrap.utils.options import as_python, check_choice, check_flag, check_name, check_number, shown


@dataclass(frozen=True)
class FineGrainedAdvProp(Method):
    """Clean images through the main norms, and one version of them per auxiliary through the norms of this auxiliary.

        FineGrainedAdvProp({"weak": PGD(1 / 255, steps=1), "strong": PGD(), "augmented": TrivialAugmentWide()})

    The authors show AdvProp with a further auxiliary for images from AutoAugment. Here a branch is an attack, made
    through its own auxiliary norms as in :class:`AdvProp`, or an augmentation. All start from the clean images.

    An augmentation is called with pixels in [0, 1], whatever the images are normalised with, as ``(N, C, H, W)`` on
    their device, and returns as many of the same shape, clamped to [0, 1] afterwards. One of torchvision that is called
    on a batch draws once for all of it: call it for each image for draws of their own. Where the step has a
    ``generator``, torch's default CPU generator is seeded from it during the call, so that such draws follow it.
    Augmentations that change labels (MixUp, CutMix) are :class:`MixProp`'s.

    The auxiliary fields of the output hold all branches in their order; ``aux_loss`` is their mean, by weight.

    Cost: ``1 + sum(1 + n_i)`` passes, with n_i the steps of the attack of branch i, 0 for an augmentation.

    Attributes:
        branches: Attack or augmentation by the name of its auxiliary domain; copied.
        weight: Weight of each branch's loss, above 0; one number, or by name. The sum of all losses is ours, as in
            AdvProp: the public slides give no weights.
        targeted: Attack towards a random wrong class, as in :class:`AdvProp`.
        attack_statistics: "running" or "batch", as in :class:`AdvProp`.

    Raises:
        ConfigurationError: No branches, a branch that is neither, or weights for other branches.
    """

    branches: Mapping[str, Attack | Augmentation] = field(hash=False)
    weight: float | Mapping[str, float] = field(default=1.0, hash=False)
    targeted: bool = False
    attack_statistics: Literal["running", "batch"] = "running"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.branches, Mapping) or not self.branches:
            raise ConfigurationError(
                "branches maps names of auxiliary domains to attacks or augmentations, such as {'weak': "
                f"PGD(epsilon=1/255, steps=1), 'strong': PGD()}}; found {shown(self.branches)}."
            )
        object.__setattr__(self, "branches", dict(self.branches))  # the caller's may change, these not
        check_flag("targeted", self.targeted)
        for name, branch in self.branches.items():
            check_name("A key of branches", name)
            if not is_attack(branch) and (isinstance(branch, type) or not callable(branch)):
                raise ConfigurationError(
                    f"The branch {name!r} must be an attack such as PGD(epsilon=4/255), or a function of pixels in "
                    f"[0, 1]; found {branch!r}."
                )
        if self.targeted and not any(map(is_attack, self.branches.values())):
            raise ConfigurationError("targeted=True has no effect without an attack: leave it out.")
        if isinstance(self.weight, Mapping):
            object.__setattr__(self, "weight", {name: as_python(weight) for name, weight in self.weight.items()})
            if set(self.weight) != set(self.branches):
                raise ConfigurationError(
                    f"weight names {list(self.weight)}; expected one for each of {list(self.branches)}."
                )
        for weight in self._weights.values():
            check_number("weight", weight, lambda value: value > 0, "above 0")
        check_choice("attack_statistics", self.attack_statistics, ("running", "batch"))

    @property
    def auxiliaries(self) -> tuple[str, ...]:
        """One auxiliary domain per branch."""
        return tuple(self.branches)

    @property
    def _weights(self) -> Mapping[str, float]:
        return self.weight if isinstance(self.weight, Mapping) else dict.fromkeys(self.branches, self.weight)

    def step(self, step: Step) -> StepOutput:
        """Run the step."""
        return propagate(step, self.branches, self._weights, self.targeted, self.attack_statistics)
