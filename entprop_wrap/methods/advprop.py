"""AdvProp (Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import PGD, Attack, check_attack, is_attack
from entprop_wrap.functional.targets import Target
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.methods.views import Augmentation, augmented
from entprop_wrap.utils.options import check_choice, check_flag, check_number
from entprop_wrap.utils.tensors import to_device


@dataclass(frozen=True)
class AdvProp(Method):
    """Clean images through the main norms, adversarial ones, made through the auxiliary norms, through these.

    Cost: ``2 + n`` passes, with n the steps of the attack.

    Attributes:
        attack: How images become adversarial. The defaults (4/255, 5 steps of 1/255) are those of EntProp's AdvProp
            baseline; the paper's own values per model size are not in the public sources we could read.
        targeted: Move towards a random wrong class rather than away from the true one (the paper's default, while
            EntProp's baseline and Fast AdvProp attack untargeted). Integer labels only.
        attack_statistics: What batch norms normalise with during the attack: "running" (AdvProp, by Fast AdvProp,
            section 3.2) or "batch" (Fast AdvProp, which saw NaN otherwise). Neither records anything.
        weight: Weight of the auxiliary loss, above 0; the paper adds both losses.
        auxiliary: Name of the auxiliary domain.
    """

    attack: PGD | Attack = PGD()  # noqa: RUF009 - frozen
    targeted: bool = False
    attack_statistics: Literal["running", "batch"] = "running"
    weight: float = 1.0
    auxiliary: str = "aux"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_attack(self.attack)
        check_choice("attack_statistics", self.attack_statistics, ("running", "batch"))
        check_flag("targeted", self.targeted)
        check_number("weight", self.weight, lambda value: value > 0, "above 0")

    def step(self, step: Step) -> StepOutput:
        """Run the step (slide 15 of the authors' talk: equal weights)."""
        branches, weights = {self.auxiliary: self.attack}, {self.auxiliary: self.weight}
        return propagate(step, branches, weights, self.targeted, self.attack_statistics)


def propagate(
    step: Step,
    branches: Mapping[str, Attack | Augmentation],
    weights: Mapping[str, float],
    targeted: bool,
    statistics: Literal["running", "batch"],
) -> StepOutput:
    """Train on clean images through the main norms, then on those of each branch through its auxiliary norms.

    The images of a branch are attacked through its norms, ``targeted`` or not, or augmented.
    """
    if targeted and step.labels.is_floating_point():
        raise ConfigurationError("A targeted attack needs integer labels, found soft ones: write targeted=False.")
    logits, main_loss = step.main_pass(step.images, step.labels)
    images, aux_logits, losses, passes = [], [], [], 1.0
    for position, (auxiliary, branch) in enumerate(branches.items(), start=1):
        if is_attack(branch):
            target = Target(wrong_labels(step.labels, logits.shape[1], step.generator) if targeted else step.labels)
            images.append(attacked(step, branch, auxiliary, target, -1 if targeted else 1, statistics))
            passes += branch.steps
        else:
            change = cast(Augmentation, branch)
            images.append(augmented(step, step.images, change, f"of the branch {auxiliary!r}"))
        with step.only_local() if position < len(branches) else nullcontext():
            logits_of_branch, loss = step.auxiliary_pass(auxiliary, images[-1], step.labels, weight=weights[auxiliary])
        aux_logits.append(logits_of_branch)
        losses.append(weights[auxiliary] * loss)
    aux_loss = torch.stack(losses).sum()
    return step.output(
        loss=main_loss + aux_loss,
        main_loss=main_loss,
        logits=logits,
        passes=passes + len(branches),
        aux_loss=aux_loss / sum(weights.values()),
        aux_logits=torch.cat(aux_logits),
        aux_images=torch.cat(images),
    )


def attacked(
    step: Step, attack: Attack, auxiliary: str, target: Target, sign: int, statistics: Literal["running", "batch"]
) -> Tensor:
    """Return the step's images, attacked through ``auxiliary``: away from ``target``, or towards it for ``sign`` -1."""
    with step.auxiliary(auxiliary, record_statistics=False), step.norms_frozen(statistics == "running"):
        return step.attack(attack, lambda images: sign * step.pixel_gradient(images, target))


def wrong_labels(labels: Tensor, classes: int, generator: torch.Generator | None) -> Tensor:
    """Return for each of ``labels`` ``(N,)`` another class, uniformly at random."""
    shift = to_device(torch.randint(1, max(classes, 2), labels.shape, generator=generator, device="cpu"), labels.device)
    return (labels + shift) % max(classes, 2)
