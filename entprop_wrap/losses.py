"""Losses on logits, for integer, soft and two-label targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.mixing import Mix, take

__all__ = ["Loss", "Regularised", "Target", "cross_entropy", "mean_entropy", "smooth"]

#: ``(logits (N, C), labels (N,) or (N, C)) -> scalar``, a mean over the batch.
Loss = Callable[[Tensor, Tensor], Tensor]

cross_entropy: Loss = F.cross_entropy


def smooth(labels: Tensor, smoothing: float, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``(1 - smoothing) * labels + smoothing / classes`` as probabilities ``(N, C)``.

    Source: Szegedy et al., CVPR 2016, section 7.
    """
    probabilities = (labels if labels.is_floating_point() else F.one_hot(labels, classes)).to(dtype)
    return torch.lerp(probabilities, torch.full_like(probabilities, 1 / classes), smoothing)


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of the softmax of ``logits`` ``(N, C)``, in nats, with a finite gradient everywhere.

    The gradient of ``selection.entropy`` is NaN where a probability underflows to zero.
    """
    log_probabilities = logits.log_softmax(dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()


@dataclass(frozen=True)
class Regularised:
    """A loss with an entropy bonus and smoothed labels: ``loss(logits, smooth(labels)) - weight * mean entropy``.

    Source: label smoothing as in :func:`smooth`; the bonus is the confidence penalty of Pereyra et al., ICLR workshop
    2017, equation 2.

    Attributes:
        loss: What to regularise; it has to take probabilities if labels are smoothed.
        label_smoothing: In [0, 1).
        entropy_weight: At least 0, in units of the loss per nat.

    Raises:
        ConfigurationError: A coefficient is out of its range.
    """

    loss: Loss
    label_smoothing: float = 0.0
    entropy_weight: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ConfigurationError(f"label_smoothing must be in [0, 1), found {self.label_smoothing!r}.")
        if not self.entropy_weight >= 0:
            raise ConfigurationError(f"entropy_weight must be at least 0, found {self.entropy_weight!r}.")

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the scalar loss of ``logits`` ``(N, C)``."""
        if self.label_smoothing:
            labels = smooth(labels, self.label_smoothing, logits.shape[1], logits.dtype)
        value = self.loss(logits, labels)
        return value - self.entropy_weight * mean_entropy(logits) if self.entropy_weight else value


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
