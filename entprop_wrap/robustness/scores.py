"""Scores of a classifier on one set of images, counted batch by batch and exact over any number of processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError, DataError
from entprop_wrap.utils.options import check_number

#: Bins of the calibration error, as Guo et al. (2017) have them.
_BINS = 15


def hscore(sa: float, ra: float) -> float:
    """Return the harmonic mean ``2 SA RA / (SA + RA)`` of two accuracies, in their unit; 0 if both are 0.

    Args:
        sa: Accuracy on clean images, in [0, 1] or in percent.
        ra: Accuracy on corrupted ones, in the same unit.

    Raises:
        ConfigurationError: An accuracy is not a number from 0 to 100; or one is above 1 and the other in (0, 1], which
            looks like percent and a fraction. Where an accuracy is below 1 percent, pass fractions.

    Source: EntProp (Enomoto, UAI 2024), section 4.1.
    """
    sa, ra = (
        check_number(name, value, lambda value: 0 <= value <= 100, "of at least 0 and at most 1 (or 100, in percent)")
        for name, value in (("sa", sa), ("ra", ra))
    )
    if 0 < min(sa, ra) <= 1 < max(sa, ra):
        raise ConfigurationError(
            f"Expected two accuracies in one unit, found sa={sa!r} and ra={ra!r}. Divide percent by 100."
        )
    return 2 * sa * ra / (sa + ra) if sa + ra else 0.0


@dataclass(frozen=True)
class Scores:
    """How well a model does on one set of images.

    Attributes:
        images: Number of images counted, each once.
        accuracy: Share of images whose largest logit is that of their label, in [0, 1].
        mean_class_accuracy: Mean over the classes that occur of the accuracy within the class, in [0, 1].
        loss: Mean cross-entropy, in nats.
        calibration_error: Expected calibration error, in [0, 1]: over 15 equal bins of confidence, the mean distance
            between confidence and accuracy, weighted by images (Guo et al., ICML 2017, equation 3).
    """

    images: int
    accuracy: float
    mean_class_accuracy: float
    loss: float
    calibration_error: float


class Tally:
    """Counts from which :class:`Scores` are made. Adding waits for no device; sums are float64, so counts are exact."""

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        # MPS has no float64.
        self.device = torch.device("cpu" if torch.device(device).type == "mps" else device)
        self._by_class = torch.zeros(2, classes, dtype=torch.float64, device=self.device)  # right, seen
        self._by_bin = torch.zeros(2, _BINS, dtype=torch.float64, device=self.device)  # right, sum of confidence
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._unusable = torch.zeros((), dtype=torch.int64, device=self.device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch of logits ``(N, C)`` and int64 labels ``(N,)``."""
        logits, labels = logits.detach().to(self.device), labels.to(self.device)
        log_probabilities = logits.double().log_softmax(1)
        right = (logits.argmax(1) == labels).double()
        confidence = log_probabilities.amax(1).exp()
        # A bin is open below and closed above; NaN goes anywhere, since unusable logits make no score.
        bins = (confidence.nan_to_num() * _BINS).ceil().long().sub_(1).clamp_(0, _BINS - 1)
        self._by_class[0].index_add_(0, labels, right)
        self._by_class[1].index_add_(0, labels, torch.ones_like(right))
        self._by_bin[0].index_add_(0, bins, right)
        self._by_bin[1].index_add_(0, bins, confidence)
        self._loss -= log_probabilities.gather(1, labels[:, None]).sum()
        self._unusable += (~logits.isfinite()).any(1).sum()

    @property
    def unusable(self) -> int:
        """Number of images whose logits were NaN or infinite; waits for the device."""
        return int(self._unusable)

    def state(self) -> tuple[Tensor, ...]:
        """Return what has been counted, on the CPU, to be sent to another process."""
        return tuple(part.cpu() for part in (self._by_class, self._by_bin, self._loss))

    @staticmethod
    def scores(states: Iterable[tuple[Tensor, ...]], name: str = "The data") -> Scores:
        """Return the scores of what several tallies have counted, from the :meth:`state` of each."""
        added = [torch.stack(parts).sum(0) for parts in zip(*states, strict=True)]
        if not added or not added[0][1].any():
            raise DataError(f"{name} is empty. Expected at least one batch with at least one image.")
        (right, seen), by_bin, loss = added
        images = int(seen.sum())
        return Scores(
            images=images,
            accuracy=float(right.sum()) / images,
            mean_class_accuracy=float((right / seen)[seen > 0].mean()),
            loss=float(loss) / images,
            calibration_error=float((by_bin[0] - by_bin[1]).abs().sum()) / images,
        )
