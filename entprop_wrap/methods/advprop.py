"""AdvProp (Xie et al., "Adversarial Examples Improve Image Recognition", CVPR 2020)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import PGD, Attack, check_attack
from entprop_wrap.functional.targets import Target
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
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
        check_targets(step, self.targeted)

        def branch(classes: int) -> Tensor:
            return attacked(step, self.attack, self.auxiliary, classes, self.targeted, self.attack_statistics)

        return propagate(step, {self.auxiliary: branch}, {self.auxiliary: self.weight}, passes=2.0 + self.attack.steps)


def propagate(
    step: Step, branches: Mapping[str, Callable[[int], Tensor]], weights: Mapping[str, float], passes: float
) -> StepOutput:
    """Train on clean images through the main norms, then on those of each branch through its auxiliary norms.

    A branch maps the number of classes to its images, in the rows of the batch.
    """
    logits, main_loss = step.main_pass(step.images, step.labels)
    images, aux_logits, losses = [], [], []
    for position, (auxiliary, branch) in enumerate(branches.items(), start=1):
        images.append(branch(logits.shape[1]))
        weight = weights[auxiliary]
        with step.only_local() if position < len(branches) else nullcontext():
            logits_of_branch, loss = step.auxiliary_pass(auxiliary, images[-1], step.labels, weight=weight)
        aux_logits.append(logits_of_branch)
        losses.append(weight * loss)
    aux_loss = torch.stack(losses).sum()
    return step.output(
        loss=main_loss + aux_loss,
        main_loss=main_loss,
        logits=logits,
        passes=passes,
        aux_loss=aux_loss / sum(weights.values()),
        aux_logits=torch.cat(aux_logits),
        aux_images=torch.cat(images),
    )


def attacked(
    step: Step, attack: Attack, auxiliary: str, classes: int, targeted: bool, statistics: Literal["running", "batch"]
) -> Tensor:
    """Return the step's images, attacked through ``auxiliary``; the other arguments are :class:`AdvProp`'s."""
    target, sign = Target(step.labels), 1
    if targeted:
        target, sign = Target(wrong_labels(step.labels, classes, step.generator)), -1
    with step.auxiliary(auxiliary, record_statistics=False), step.norms_frozen(statistics == "running"):
        return step.attack(attack, lambda images: sign * step.pixel_gradient(images, target))


def check_targets(step: Step, targeted: bool) -> None:
    """Raise :class:`ConfigurationError` if a targeted attack is asked for where labels are soft."""
    if targeted and step.labels.is_floating_point():
        raise ConfigurationError("A targeted attack needs integer labels, found soft ones: write targeted=False.")


def wrong_labels(labels: Tensor, classes: int, generator: torch.Generator | None) -> Tensor:
    """Return for each of ``labels`` ``(N,)`` another class, uniformly at random."""
    shift = to_device(torch.randint(1, max(classes, 2), labels.shape, generator=generator, device="cpu"), labels.device)
    return (labels + shift) % max(classes, 2)
