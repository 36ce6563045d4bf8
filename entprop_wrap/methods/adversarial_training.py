"""Adversarial training: PGD-AT (Madry et al., ICLR 2018) and TRADES (Zhang et al., ICML 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import PGD, Attack, check_attack
from entprop_wrap.functional.losses import Regularised, log_probabilities, mean_entropy
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.utils.options import check_choice, check_number


@dataclass(frozen=True)
class AdversarialTraining(Method):
    """Train on adversarial images through the model's own norms; no auxiliary copies, on plain or wrapped models.

    "pgd": ``L(f(x_adv), y)``, or ``(1 - w) L(f(x_adv), y) + w L(f(x), y)`` with ``clean_weight`` w, where ``x_adv``
    increases the loss. Cost: ``n + 1`` passes, ``n + 2`` with a clean part.

    "trades": ``L(f(x), y) + beta KL(f(x) || f(x_adv))``, where ``x_adv`` increases the divergence. Cost:
    ``n + 2`` passes, and a forward pass without a backward, which is not counted.

    The attack sees batch norms as in evaluation, on running statistics (as the official code of TRADES does); only the
    passes that train record statistics. It starts where ``attack`` does (that code: at normal noise of std 0.001).

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
            labels is the clean one; of the adversarial part only the entropy is added, at ``entropy_weight``.

    Raises:
        ConfigurationError: An option is out of range, or has no effect together with the others.
    """

    attack: PGD | Attack = PGD(epsilon=8 / 255, steps=10, step_size=2 / 255)  # noqa: RUF009 - frozen
    kind: Literal["pgd", "trades"] = "pgd"
    beta: float = 6.0
    clean_weight: float = 0.0
    entropy_weight: float = 0.0
    label_smoothing: float = 0.0
    regularise: Literal["adversarial", "clean", "both"] = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_attack(self.attack)
        check_choice("kind", self.kind, ("pgd", "trades"))
        check_choice("regularise", self.regularise, ("adversarial", "clean", "both"))
        check_number("beta", self.beta, lambda value: value > 0, "above 0")
        check_number("clean_weight", self.clean_weight, lambda value: 0 <= value < 1, "in [0, 1)")
        Regularised(F.cross_entropy, self.label_smoothing, self.entropy_weight)  # raises if out of range
        if self.kind == "trades":
            self._check_trades()
        elif self.regularise == "clean" and not self.clean_weight and (self.entropy_weight or self.label_smoothing):
            raise ConfigurationError("regularise='clean' needs a clean part: write clean_weight=0.5, say.")

    def _check_trades(self) -> None:
        if self.clean_weight:
            raise ConfigurationError("TRADES has a clean part at weight 1: leave out clean_weight, choose beta.")
        if self.label_smoothing and self.regularise == "adversarial":
            raise ConfigurationError(
                "The adversarial part of TRADES has no labels to smooth: write regularise='clean' or 'both'."
            )
        if not getattr(self.attack, "random_start", True):
            raise ConfigurationError(
                "The divergence has no gradient at the image itself: the attack of TRADES needs random_start=True."
            )

    def step(self, step: Step) -> StepOutput:
        """Run the step."""
        images = self._attack(step)
        loss, logits = self._trades(step, images) if self.kind == "trades" else self._pgd(step, images)
        passes = self.attack.steps + 1.0 + (self.kind == "trades" or self.clean_weight > 0)
        return step.output(main_loss=loss, logits=logits, passes=passes)

    def _pgd(self, step: Step, images: Tensor) -> tuple[Tensor, Tensor]:
        weight = self.clean_weight
        if weight:
            with step.only_local():
                clean = step.forward(step.images)
                clean_loss = self._loss(step, "clean")(clean, step.labels)
                step.backward(weight * clean_loss)
        hard = step.forward(images)
        hard_loss = self._loss(step, "adversarial")(hard, step.labels)
        step.backward((1 - weight) * hard_loss)
        return (weight * clean_loss + (1 - weight) * hard_loss, clean) if weight else (hard_loss, hard)

    def _trades(self, step: Step, images: Tensor) -> tuple[Tensor, Tensor]:
        with step.only_local():  # else DDP broadcasts buffers between two forwards of one backward
            clean = step.forward(step.images)
        hard = step.forward(images)
        loss = self._loss(step, "clean")(clean, step.labels) + self.beta * divergence(log_probabilities(clean), hard)
        if self.entropy_weight and self.regularise != "clean":
            loss = loss - self.entropy_weight * mean_entropy(hard)
        step.backward(loss)
        return loss, clean

    def _loss(self, step: Step, part: str) -> Regularised:
        chosen = self.regularise in (part, "both")
        return Regularised(step.loss, self.label_smoothing if chosen else 0.0, self.entropy_weight if chosen else 0.0)

    def _attack(self, step: Step) -> Tensor:
        with step.norms_frozen():
            if self.kind == "trades":
                with torch.no_grad(), step.only_local():
                    prediction = log_probabilities(step.forward(step.images))
                # Older torch keeps the weights cast without gradients for the next pass, which would train nothing.
                torch.clear_autocast_cache()

            def objective(logits: Tensor) -> Tensor:
                return divergence(prediction, logits) if self.kind == "trades" else step.loss(logits, step.labels)

            return step.attack(self.attack, lambda images: step.pixel_gradient_of(images, objective))


def divergence(expected: Tensor, logits: Tensor) -> Tensor:
    """Return the mean over the batch of ``KL(exp(expected) || softmax(logits))``."""
    return F.kl_div(log_probabilities(logits), expected, log_target=True, reduction="batchmean")
