"""Vanilla training: the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass

from entprop_wrap.losses import Target
from entprop_wrap.selection import entropy
from entprop_wrap.step import Step, StepOutput

__all__ = ["Vanilla"]


@dataclass(frozen=True)
class Vanilla:
    """One pass, one loss. Works on plain and wrapped models; the copies of a wrapped model stay as they are.

    Cost: 1 pass.
    """

    @property
    def auxiliaries(self) -> tuple[str, ...]:
        """No auxiliary domain."""
        return ()

    def step(self, step: Step) -> StepOutput:
        """Run the step."""
        logits = step.forward(step.images)
        loss = Target(step.labels).loss(step.loss, logits)
        step.backward(loss)
        logits, loss = logits.detach(), loss.detach()
        return StepOutput(loss, loss, logits, entropy(logits), passes=1.0, checker=step.checker)
