"""Losses on logits: what one is, smoothed labels, and the entropy bonus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.uncertainty import two_classes
from entprop_wrap.utils.options import check_number, store_as_python

__all__ = [
    "Loss",
    "Pass",
    "Regularised",
    "cross_entropy",
    "log_probabilities",
    "mean_by_construction",
    "mean_entropy",
    "smooth",
    "takes_any_targets",
]

#: ``(logits (N, C), labels (N,) or (N, C)) -> scalar``, a mean over the rows; :class:`Pass` has what else it may take.
Loss = Callable[..., Tensor]

cross_entropy: Loss = F.cross_entropy

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Pass:
    """The context of a loss beyond logits and labels, passed where it declares parameters of these names.

        def loss(logits, labels, outputs, images): ...

    Attributes:
        outputs: What the model returned, whole: other heads, features.
        images: ``(n, C, H, W)``: what the model was given: mixed or attacked, where the method does that.
        rows: ``(n,)`` int64: where the labels stand in the batch of the step.
    """

    outputs: Any
    images: Tensor
    rows: Tensor


def takes_any_targets(loss: Loss) -> bool:
    """Return whether ``loss`` may take labels other than probabilities over classes, as a binary cross-entropy."""
    return loss is not cross_entropy and not isinstance(loss, nn.CrossEntropyLoss)


def mean_by_construction(loss: _Function) -> _Function:
    """Mark ``loss``, a function or a method, as a mean over the rows it is given: it is not called to find out."""
    loss.__dict__["entprop_mean"] = True
    return loss


def smooth(labels: Tensor, smoothing: float, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``(1 - smoothing) * labels + smoothing / classes`` as probabilities ``(N, C)``.

    Source: Szegedy et al., CVPR 2016, section 7.
    """
    probabilities = (labels if labels.is_floating_point() else F.one_hot(labels, classes)).to(dtype)
    return torch.lerp(probabilities, torch.full_like(probabilities, 1 / classes), smoothing)


def mean_entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of the softmax of ``logits`` ``(N, C)``, in nats, with a finite gradient everywhere.

    The gradient of ``uncertainty.entropy`` is NaN where a probability underflows to zero.
    """
    logarithms = log_probabilities(logits)
    return -(logarithms.exp() * logarithms).sum(dim=-1).mean()


def log_probabilities(logits: Tensor) -> Tensor:
    """Return the log-probabilities of the classes ``(N, C)``, finite where a logit of -inf masks a class."""
    found = two_classes(logits)[0].log_softmax(dim=-1)
    return found.clamp_min(torch.finfo(found.dtype).min)


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
            if logits.shape[1] == 1:
                raise ConfigurationError("label_smoothing needs a logit per class, found one logit: smooth the labels.")
            labels = smooth(labels, self.label_smoothing, logits.shape[1], logits.dtype)
        value = self.loss(logits, labels)
        return value - self.entropy_weight * mean_entropy(logits) if self.entropy_weight else value
