"""Losses on logits, for integer, soft and two-label targets."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.mixing import Mix, take

__all__ = ["Loss", "Target", "cross_entropy"]

#: ``(logits (N, C), labels (N,) or (N, C)) -> scalar``, a mean over the batch.
Loss = Callable[[Tensor, Tensor], Tensor]

cross_entropy: Loss = F.cross_entropy


class Target:
    """The labels of a batch, and, for mixed images, those of their partners.

    The loss of a two-label target is ``share * loss(logits, labels) + (1 - share) * loss(logits, partner labels)``,
    which needs nothing of the loss but that it takes labels. Source: MixUp (Zhang et al., ICLR 2018), official code.
    """

    def __init__(self, labels: Tensor, partners: Tensor | None = None, share: float = 1.0) -> None:
        self.labels = labels
        self.partners = partners
        self.share = share

    @classmethod
    def mixed(cls, labels: Tensor, mix: Mix) -> Target:
        """Return the two-label target of a batch that was mixed."""
        return cls(labels, take(labels, mix.partner), mix.share)

    def rows(self, rows: Tensor) -> Target:
        """Return the target of the selected ``rows``."""
        return Target(self.labels[rows], None if self.partners is None else self.partners[rows], self.share)

    def source(self) -> Target:
        """Return the one-label target: every image counts as its first parent only."""
        return Target(self.labels)

    def loss(self, loss: Loss, logits: Tensor) -> Tensor:
        """Return the scalar loss of ``logits`` ``(N, C)``."""
        if self.partners is None:
            return loss(logits, self.labels)
        return self.share * loss(logits, self.labels) + (1 - self.share) * loss(logits, self.partners)
