"""Losses on logits, for integer, soft and two-label targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from entprop_wrap.mixing import Mix, take
from entprop_wrap.options import check_number, store_as_python

__all__ = [
    "Loss",
    "Regularised",
    "Target",
    "cross_entropy",
    "is_mean",
    "mean_by_construction",
    "mean_entropy",
    "smooth",
]

#: ``(logits (N, C), labels (N,) or (N, C)) -> scalar``, a mean over the batch.
Loss = Callable[[Tensor, Tensor], Tensor]

cross_entropy: Loss = F.cross_entropy

_Function = TypeVar("_Function", bound=Callable[..., Any])


def mean_by_construction(loss: _Function) -> _Function:
    """Mark ``loss``, a function or a method, as a mean over the rows it is given: it is not called to find out."""
    loss.__dict__["entprop_mean"] = True
    return loss


def is_mean(loss: Loss, logits: Tensor, labels: Tensor, value: Tensor) -> bool:
    """Say whether ``loss`` averages over rows, rather than adds them up; True where that cannot be told.

    It is called once, on every row twice: a sum doubles, a mean stays. Gradients, buffers of a loss that is a module,
    and torch's random states are as before.

    Args:
        loss: What to find out about.
        logits: ``(N, C)``.
        labels: As ``loss`` takes them.
        value: ``loss(logits, labels)``, a scalar.
    """
    if loss is cross_entropy or getattr(loss, "entprop_mean", False):
        return True
    rows = logits.detach().repeat(2, 1), torch.cat([labels, labels])
    again: Callable[[], Tensor] = partial(loss, *rows)
    if isinstance(loss, nn.Module):  # on clones, as the backward needs the buffers untouched
        again = partial(functional_call, loss, {name: buffer.clone() for name, buffer in loss.named_buffers()}, rows)
    devices = [logits.device] if logits.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            doubled = again()
        once, twice = float(value.detach()), float(doubled)
    except Exception:
        return True  # a loss for so many rows and no others: a method that needs others fails by itself
    return not (once != 0 and abs(twice - 2 * once) < 1e-3 * abs(once))


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
        store_as_python(self)
        check_number("label_smoothing", self.label_smoothing, lambda value: 0 <= value < 1, "in [0, 1)")
        check_number("entropy_weight", self.entropy_weight, lambda value: value >= 0, "of at least 0")

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
