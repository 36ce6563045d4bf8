"""Numbers with what is known of their spread. Images of a batch share a mix and statistics, so batches are the unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Interval", "bootstrap", "mean_difference", "mean_of", "plain"]

_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A number with its 95 % interval.

    Attributes:
        value: The number itself.
        low: Lower end; None where a single batch, or image, says nothing of the spread.
        high: Upper end, or None.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.3g}" + ("" if self.low is None else f" [{self.low:.3g}, {self.high:.3g}]")


def mean_of(batches: Sequence[Tensor]) -> Interval:
    """Return the mean over all values of all batches, each ``(n,)``, with a t-interval over batches.

    The mean is a ratio of two sums over batches; its variance is that of the linearised ratio (Cochran 1977, "Sampling
    techniques", section 9A).
    """
    return _interval(_mean(batches), _residuals(batches))


def mean_difference(batches: Sequence[Tensor], before: Sequence[Tensor]) -> Interval:
    """Return the mean of ``batches`` minus that of ``before``, paired by batch, with a t-interval over batches."""
    residuals = [a - b for a, b in zip(_residuals(batches), _residuals(before), strict=True)]
    return _interval(_mean(batches) - _mean(before), residuals)


def bootstrap(
    statistics: Callable[[Sequence[int]], Sequence[float]], batches: int, generator: torch.Generator, rounds: int = 200
) -> list[Interval]:
    """Return statistics with percentile intervals over resampled batches.

    Args:
        statistics: From the numbers of the batches to take, some of them several times, to the statistics.
        batches: Number of batches.
        generator: CPU generator that draws the batches.
        rounds: Number of resamplings.

    Source: Efron & Tibshirani 1993, "An introduction to the bootstrap", section 13.3.
    """
    values = statistics(range(batches))
    if batches < 2:
        return [Interval(value) for value in values]
    draws = [torch.randint(batches, (batches,), generator=generator).tolist() for _ in range(rounds)]
    drawn = torch.tensor([statistics(draw) for draw in draws], dtype=torch.float64)
    tail = (1 - _CONFIDENCE) / 2
    low, high = drawn.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0).tolist()
    return [Interval(*one) for one in zip(values, low, high, strict=True)]


def plain(result: Any) -> dict[str, Any]:
    """Return a result as plain types that JSON knows."""
    found: dict[str, Any] = asdict(result)
    return found


def _mean(batches: Sequence[Tensor]) -> float:
    return math.fsum(float(b.double().sum()) for b in batches) / sum(map(len, batches))


def _residuals(batches: Sequence[Tensor]) -> list[float]:
    mean, number = _mean(batches), sum(map(len, batches))
    return [float((b.double() - mean).sum()) / number for b in batches]


def _interval(value: float, residuals: Sequence[float]) -> Interval:
    number = len(residuals)
    if number < 2:
        return Interval(value)
    deviation = math.sqrt(math.fsum(r * r for r in residuals) * number / (number - 1))
    half = t_critical(_CONFIDENCE, number - 1) * deviation
    return Interval(value, value - half, value + half)


def t_critical(confidence: float, degrees: int) -> float:
    """Return t with ``P(|T| <= t) = confidence`` for Student's T with ``degrees`` degrees of freedom.

    The probability of integer degrees is a finite sum over the angle ``atan(t / sqrt(degrees))`` (Abramowitz & Stegun
    1964, equations 26.7.3 and 26.7.4); the angle is found by bisection.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        if _within(angle, degrees) < confidence:
            low = angle
        else:
            high = angle
    return math.tan(high) * math.sqrt(degrees)


def _within(angle: float, degrees: int) -> float:
    """Return ``P(|T| <= sqrt(degrees) * tan(angle))``."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
