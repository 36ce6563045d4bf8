"""Adversarial training: PGD-AT (Madry et al., ICLR 2018) and TRADES (Zhang et al., ICML 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.attacks import PGD, Attack
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.losses import Regularised
from entprop_wrap.selection import entropy
from entprop_wrap.step import Step, StepOutput

__all__ = ["AdversarialTraining"]


@dataclass(frozen=True)
class AdversarialTraining:
    """Train on adversarial images through the model's own norms; no auxiliary copies, on plain or wrapped models.

    "pgd": ``L(f(x_adv), y)``, or ``(1 - w) L(f(x_adv), y) + w L(f(x), y)`` with ``clean_weight`` w, where ``x_adv``
    increases the loss. Cost: ``n + 1`` passes, ``n + 2`` with a clean part.

    "trades": ``L(f(x), y) + beta KL(f(x) || f(x_adv))``, where ``x_adv`` increases the divergence. Cost:
    ``n + 2`` passes.

    Entropy maximisation (EntM) and label smoothing act on the parts that ``regularise`` names. They are the standard
    definitions; which part Jin et al. ("Rethinking Uncertainty in Deep Learning", arXiv 2011.13538) apply them to, and
    their coefficients, are not in the public sources we could read. A model trained with these terms alone can look
    robust to attacks by its own gradients without being so: evaluate with transferred attacks too.

    Attributes:
        attack: How images become adversarial; by default 8/255, 10 steps of 2/255.
        kind: "pgd" or "trades".
        beta: Weight of the divergence in TRADES, above 0.
        clean_weight: Share of the clean loss in "pgd", in [0, 1).
        entropy_weight: Coefficient of the entropy bonus, at least 0 (Pereyra et al. 2017: 0.1 to 1).
        label_smoothing: Share of the uniform distribution in the labels, in [0, 1).
        regularise: "adversarial", "clean" or "both": the losses that get the two terms. In TRADES the only loss with
            labels is the clean one, and the entropy of the adversarial part joins the divergence.
    """

    attack: Attack = PGD(epsilon=8 / 255, steps=10, step_size=2 / 255)  # noqa: RUF009 - frozen
    kind: Literal["pgd", "trades"] = "pgd"
    beta: float = 6.0
    clean_weight: float = 0.0
    entropy_weight: float = 0.0
    label_smoothing: float = 0.0
    regularise: Literal["adversarial", "clean", "both"] = "both"

    def __post_init__(self) -> None:
        if self.kind not in ("pgd", "trades"):
            raise ConfigurationError(f"kind must be 'pgd' or 'trades', found {self.kind!r}.")
        if self.regularise not in ("adversarial", "clean", "both"):
            raise ConfigurationError(f"regularise must be adversarial, clean or both, found {self.regularise!r}.")
        if not self.beta > 0 or not 0 <= self.clean_weight < 1:
            raise ConfigurationError(
                f"Expected beta > 0 and clean_weight in [0, 1), found {self.beta!r} and {self.clean_weight!r}."
            )
        Regularised(F.cross_entropy, self.label_smoothing, self.entropy_weight)  # raises if out of range

    @property
    def auxiliaries(self) -> tuple[str, ...]:
        """No auxiliary domain."""
        return ()

    def step(self, step: Step) -> StepOutput:
        """Run the step."""
        clean_loss, hard_loss = (self._loss(step, part) for part in ("clean", "adversarial"))
        with_clean = self.kind == "trades" or self.clean_weight > 0
        reference = None
        if self.kind == "trades":
            with torch.no_grad(), step.norms_frozen(), step.only_local():
                reference = step.forward(step.images).log_softmax(-1)
        images = self._attack(step, reference)

        clean = step.forward(step.images) if with_clean else None
        hard = step.forward(images)
        if clean is None:
            loss = hard_loss(hard, step.labels)
        elif self.kind == "pgd":
            loss = (1 - self.clean_weight) * hard_loss(hard, step.labels) + self.clean_weight * clean_loss(
                clean, step.labels
            )
        else:
            divergence = F.kl_div(hard.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="batchmean")
            loss = clean_loss(clean, step.labels) + self.beta * divergence
            if self.regularise != "clean":
                loss = loss - self.entropy_weight * entropy(hard).mean()
        step.backward(loss)
        logits = (hard if clean is None else clean).detach()
        passes = self.attack.steps + 1.0 + with_clean
        return StepOutput(loss.detach(), loss.detach(), logits, entropy(logits), passes=passes, checker=step.checker)

    def _loss(self, step: Step, part: str) -> Regularised:
        chosen = self.regularise in (part, "both")
        return Regularised(step.loss, self.label_smoothing if chosen else 0.0, self.entropy_weight if chosen else 0.0)

    def _attack(self, step: Step, reference: Tensor | None) -> Tensor:
        def objective(logits: Tensor) -> Tensor:
            if reference is None:
                return step.loss(logits, step.labels)
            return F.kl_div(logits.log_softmax(-1), reference, log_target=True, reduction="batchmean")

        with step.norms_frozen():
            return self.attack.run(
                step.images, lambda images: step.pixel_gradient_of(images, objective), step.space, step.generator
            )
