"""Vanilla training: the baseline of every comparison; alone, or with label smoothing or entropy maximisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from entprop_wrap.functional.losses import Regularised
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput


@dataclass(frozen=True)
class Vanilla(Method):
    """One pass, one loss. Works on plain and wrapped models; the copies of a wrapped model stay as they are.

    Cost: 1 pass.

    Attributes:
        label_smoothing: Share of the uniform distribution in the labels, in [0, 1) (Szegedy et al., CVPR 2016, sec. 7).
        entropy_weight: Coefficient of the entropy bonus (EntM, the confidence penalty of Pereyra et al. 2017), at least
            0.

    Either alone makes gradients small, and a model look robust to attacks by its own gradients when it is not (Fu et
    al., arXiv 2009.08233): evaluate with transferred attacks too.
    """

    label_smoothing: float = 0.0
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        Regularised(F.cross_entropy, self.label_smoothing, self.entropy_weight)  # raises if out of range

    def step(self, step: Step) -> StepOutput:
        """Run the step."""
        logits = step.forward(step.images)
        loss = Regularised(step.loss, self.label_smoothing, self.entropy_weight)(logits, step.labels)
        step.backward(loss)
        return step.output(main_loss=loss, logits=logits, passes=1.0)
