"""Uncertainty scores, and the choice of the samples that score highest.

A score is any function ``(logits, labels) -> (N,)`` where higher means more uncertain; write your own and pass it as
``EntProp(uncertainty=...)``. Logits are ``(N, C)`` and detached; labels are ``(N,)`` integers or ``(N, C)``
probabilities. EntProp (Enomoto, UAI 2024) compares the first four in table 8 and finds no significant difference.

A score that draws takes a third argument named ``generator``, as :func:`random` does: it is then given the step's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.utils.options import asked, shown
from entprop_wrap.utils.tensors import to_device

__all__ = [
    "Uncertainty",
    "compute_scores",
    "cross_entropy",
    "entropy",
    "find_uncertainty",
    "least_confidence",
    "logit_margin",
    "num_selected",
    "random",
    "top_k",
    "two_classes",
]

#: ``(logits (N, C), labels) -> scores (N,)``, or ``(logits, labels, generator) -> scores`` of one that draws.
Uncertainty = Callable[..., Tensor]


def entropy(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """Shannon entropy of the softmax, in nats: ``(N, C) -> (N,)``, between 0 and ``log C``. Labels are not used.

    Source: EntProp, section 3.1.
    """
    probabilities = _float(two_classes(logits)[0]).softmax(dim=-1)
    return cast(Tensor, torch.special.entr(probabilities)).sum(dim=-1)


def least_confidence(logits: Tensor, labels: Tensor | None = None) -> Tensor:
    """One minus the largest probability: ``(N, C) -> (N,)``, between 0 and ``1 - 1/C``. Labels are not used.

    Source: "Confidence" in EntProp, table 8.
    """
    return 1 - _float(two_classes(logits)[0]).softmax(dim=-1).amax(dim=-1)


def logit_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest probability of a wrong class minus that of the true one: ``(N, C) -> (N,)``, between -1 and 1.

    The true class of a soft label is its largest. Source: "Logit margin" in EntProp, table 8.
    """
    logits, labels = two_classes(logits, labels)
    probabilities = _float(logits).softmax(dim=-1)
    true = (labels.argmax(dim=-1) if labels.is_floating_point() else labels).unsqueeze(-1)
    wrong = probabilities.scatter(-1, true, -torch.inf).amax(dim=-1)
    return wrong - probabilities.gather(-1, true).squeeze(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy per sample, in nats: ``(N, C) -> (N,)``, at least 0. Source: EntProp, table 8."""
    logits, labels = two_classes(logits, labels)
    return F.cross_entropy(_float(logits), labels, reduction="none")


def random(logits: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """Uniform random numbers: ``(N, C) -> (N,)``, in [0, 1), so that every sample is as likely to be selected.

    The control of every score. They are drawn on the CPU from ``generator`` (None: torch's default), so that a seed
    selects the same samples on every device. Source: "Random" in EntProp, figure 4.
    """
    # In float32, a tie is not so rare.
    drawn = torch.rand(len(logits), generator=generator, dtype=torch.float64, device="cpu")
    return to_device(drawn.to(_float(logits).dtype if logits.device.type == "mps" else drawn.dtype), logits.device)


def two_classes(logits: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Any]:
    """Return one logit ``(N, 1)``, of a binary loss, as two whose softmax is its sigmoid; others as they are.

    Its labels, ``(N, 1)`` in [0, 1], become probabilities ``(N, 2)``.
    """
    if logits.shape[-1] != 1:
        return logits, labels
    if labels is not None and labels.is_floating_point():
        labels = torch.cat([1 - labels, labels], dim=-1)
    return F.pad(logits, (1, 0)), labels


def find_uncertainty(uncertainty: Uncertainty | str) -> Uncertainty:
    """Return the score that ``uncertainty`` is, or names, such as "entropy".

    Raises:
        ConfigurationError: There is none of that name, or it is not a function.
    """
    named = {score.__name__: score for score in (entropy, least_confidence, logit_margin, cross_entropy, random)}
    found = named.get(uncertainty) if isinstance(uncertainty, str) else uncertainty
    if not callable(found) or isinstance(found, type):
        raise ConfigurationError(
            f"uncertainty must be a function (logits, labels) -> scores, or one of {list(named)}; found "
            f"{shown(uncertainty)}."
        )
    return found


def compute_scores(
    uncertainty: Uncertainty, logits: Tensor, labels: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Return ``uncertainty(logits, labels)``, with ``generator=generator`` if it takes an argument of that name.

    Raises:
        ConfigurationError: It does not return one number per row.
    """
    more: dict[str, Any] = {"generator": generator} if asked(uncertainty, ("generator",), 0) else {}
    found: Any = uncertainty(logits, labels, **more)
    if not isinstance(found, Tensor) or found.shape != logits.shape[:1] or found.dtype == torch.bool:
        what = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ConfigurationError(
            f"An uncertainty gives one score per image, a tensor of shape ({len(logits)},); found {what}. A loss "
            "needs reduction='none'."
        )
    return found


def num_selected(batch: int, fraction: float) -> int:
    """Return how many of ``batch`` samples a ``fraction`` in (0, 1] selects: rounded half up, at least two.

    A batch norm in training mode cannot take the statistics of a single image.
    """
    return min(batch, max(2, math.floor(fraction * batch + 0.5)))


def top_k(values: Tensor, number: int) -> Tensor:
    """Return the indices of the ``number`` highest of ``values`` ``(N,)``, highest first, without a device sync."""
    return values.topk(number).indices


def _float(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
