"""Losses on logits, for integer, soft and two-label targets."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.mixing import Mix
from entprop_wrap.functional.uncertainty import two_classes
from entprop_wrap.utils.options import check_number, store_as_python
from entprop_wrap.utils.tensors import index_rows, to_device

__all__ = [
    "Loss",
    "Pass",
    "Regularised",
    "Target",
    "asked",
    "cross_entropy",
    "is_mean",
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


def asked(function: Callable[..., Any], names: Collection[str], given: int) -> frozenset[str]:
    """Return which of ``names`` are parameters of ``function`` beyond the first, ``given`` ones."""
    called: Any = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = list(inspect.signature(called).parameters.values())[given:]
    except (TypeError, ValueError):  # of a callable that is written in C
        return frozenset()
    return frozenset(p.name for p in parameters if p.name in names and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))


def takes_any_targets(loss: Loss) -> bool:
    """Return whether ``loss`` may take labels other than probabilities over classes, as a binary cross-entropy."""
    return loss is not cross_entropy and not isinstance(loss, nn.CrossEntropyLoss)


def mean_by_construction(loss: _Function) -> _Function:
    """Mark ``loss``, a function or a method, as a mean over the rows it is given: it is not called to find out."""
    loss.__dict__["entprop_mean"] = True
    return loss


def is_mean(loss: Loss, logits: Tensor, labels: Tensor, value: Tensor, more: Mapping[str, Any] | None = None) -> bool:
    """Return whether ``loss`` averages over rows, rather than adds them up; True where that cannot be told.

    It is called once, on every row twice: a sum doubles, a mean stays. Gradients, buffers of a loss that is a module,
    and torch's random states are as before.

    Args:
        loss: What to find out about.
        logits: ``(N, C)``.
        labels: As ``loss`` takes them.
        value: ``loss(logits, labels, **more)``, a scalar.
        more: What else ``loss`` asks for.
    """
    if loss is cross_entropy or getattr(loss, "entprop_mean", False):
        return True
    rows = logits.detach().repeat(2, 1), torch.cat([labels, labels])
    more = {name: _twice(value, len(logits)) for name, value in (more or {}).items()}
    again: Callable[[], Tensor] = partial(loss, *rows, **more)
    if isinstance(loss, nn.Module):  # on clones, as the backward needs the buffers untouched
        buffers = {name: buffer.clone() for name, buffer in loss.named_buffers()}
        again = partial(functional_call, loss, buffers, rows, more)
    devices = [logits.device] if logits.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            doubled = again()
        once, twice = float(value.detach()), float(doubled)
    except Exception:
        return True  # a loss for this number of rows only: a method that needs others fails by itself
    return not (once != 0 and abs(twice - 2 * once) < 1e-3 * abs(once))


def _twice(value: Any, rows: int) -> Any:
    if isinstance(value, Tensor):
        return torch.cat([value.detach()] * 2) if value.ndim and len(value) == rows else value
    if isinstance(value, dict):
        twice = copy.copy(value)
        for key in value:
            twice[key] = _twice(value[key], rows)
        return twice
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_twice(item, rows) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_twice(item, rows) for item in value)
    return value


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
    log_probabilities = two_classes(logits)[0].log_softmax(dim=-1)
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
            if logits.shape[1] == 1:
                raise ConfigurationError("label_smoothing needs a logit per class, found one logit: smooth the labels.")
            labels = smooth(labels, self.label_smoothing, logits.shape[1], logits.dtype)
        value = self.loss(logits, labels)
        return value - self.entropy_weight * mean_entropy(logits) if self.entropy_weight else value


class Target:
    """The labels of a batch, and, for mixed images, those of their partners.

    The loss of a two-label target is ``share * loss(logits, labels) + (1 - share) * loss(logits, partner labels)``,
    which needs nothing of the loss but that it takes labels. Source: MixUp (Zhang et al., ICLR 2018), official code.

    Args:
        labels: ``(n,)`` or ``(n, C)``.
        partners: Labels of the partners, in the same form.
        share: Weight of the first labels, in [0, 1].
        index: ``(n,)``: where the labels stand in the batch; None: they are its first n.
        partner_index: Where the partners' do.
    """

    def __init__(
        self,
        labels: Tensor,
        partners: Tensor | None = None,
        share: float = 1.0,
        index: Tensor | None = None,
        partner_index: Tensor | None = None,
    ) -> None:
        self.labels, self.partners, self.share = labels, partners, share
        self.index, self.partner_index = index, partner_index

    @classmethod
    def mixed(cls, labels: Tensor, mix: Mix, index: Tensor | None = None) -> Target:
        """Return the two-label target of images that were mixed."""
        partner = to_device(mix.partner, labels.device)
        return cls(labels, index_rows(labels, partner), mix.share, index, partner if index is None else index[partner])

    def rows(self, rows: Tensor) -> Target:
        """Return the target of the selected ``rows``."""
        index = rows if self.index is None else self.index[rows]
        partners, partner_index = (None if x is None else x[rows] for x in (self.partners, self.partner_index))
        return Target(self.labels[rows], partners, self.share, index, partner_index)

    def source(self) -> Target:
        """Return the one-label target: every image counts as its first parent only."""
        return Target(self.labels, index=self.index)

    def loss(self, loss: Loss, logits: Tensor) -> Tensor:
        """Return the scalar loss of ``logits`` ``(N, C)``."""
        if self.partners is None:
            return _at(loss, self.index)(logits, self.labels)
        own = _at(loss, self.index)(logits, self.labels)
        return self.share * own + (1 - self.share) * _at(loss, self.partner_index)(logits, self.partners)


def _at(loss: Loss, index: Tensor | None) -> Loss:
    """Return ``loss`` for labels that stand at ``index``, if it wants to know."""
    at: Callable[[Tensor | None], Loss] | None = getattr(loss, "at", None)
    return loss if at is None or index is None else at(index)
