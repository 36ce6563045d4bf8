"""Uncertainty scores, and the choice of the samples that score highest.

A score is any function ``(logits, labels) -> (N,)`` where higher means more uncertain; write your own and pass it as
``EntProp(uncertainty=...)``. Logits are ``(N, C)`` and detached; labels are ``(N,)`` integers or ``(N, C)``
probabilities. EntProp (Enomoto, UAI 2024) compares the four of them in table 8 and finds no significant difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.errors import ConfigurationError

__all__ = ["Uncertainty", "count", "cross_entropy", "entropy", "least_confidence", "logit_margin", "top"]

Uncertainty = Callable[[Tensor, Tensor], Tensor]


def entropy(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Shannon entropy of the softmax, in nats: ``(N, C) -> (N,)``, between 0 and ``log C``. Labels are not used.

    Source: EntProp, section 3.1.
    """
    probabilities = _float(logits).softmax(dim=-1)
    return cast(Tensor, torch.special.entr(probabilities)).sum(dim=-1)


def least_confidence(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """One minus the largest probability: ``(N, C) -> (N,)``, between 0 and ``1 - 1/C``. Labels are not used.

    Source: "Confidence" in EntProp, table 8.
    """
    return 1 - _float(logits).softmax(dim=-1).amax(dim=-1)


def logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest probability of a wrong class minus that of the true one: ``(N, C) -> (N,)``, between -1 and 1.

    The true class of a soft label is its largest. Source: "Logit margin" in EntProp, table 8.
    """
    probabilities = _float(logits).softmax(dim=-1)
    true = (labels.argmax(dim=-1) if labels.is_floating_point() else labels).unsqueeze(-1)
    wrong = probabilities.scatter(-1, true, -torch.inf).amax(dim=-1)
    return wrong - probabilities.gather(-1, true).squeeze(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per sample, in nats: ``(N, C) -> (N,)``, at least 0. Source: EntProp, table 8."""
    return F.cross_entropy(_float(logits), labels, reduction="none")


def count(batch: int, fraction: float) -> int:
    """Return how many of ``batch`` samples a ``fraction`` in (0, 1] selects: rounded half up, at least two.

    A batch norm in training mode cannot take the statistics of a single image.

    Raises:
        ConfigurationError: The batch holds fewer than two samples.
    """
    if batch < 2:
        raise ConfigurationError(
            f"Expected a batch of at least 2 images to select from, found {batch}. Drop the last incomplete "
            "batch (DataLoader(..., drop_last=True)) or choose a batch size that leaves no such rest."
        )
    return min(batch, max(2, math.floor(fraction * batch + 0.5)))


def top(scores: Tensor, number: int) -> Tensor:
    """Return the indices of the ``number`` highest of ``scores`` ``(N,)``, highest first, without a device sync.

    Raises:
        ConfigurationError: The scores are no vector of at least ``number`` entries.
    """
    if scores.ndim != 1 or len(scores) < number:
        raise ConfigurationError(
            f"An uncertainty gives one score per image, (N,); found shape {tuple(scores.shape)}. A loss needs "
            "reduction='none'."
        )
    return scores.topk(number).indices


def _float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
