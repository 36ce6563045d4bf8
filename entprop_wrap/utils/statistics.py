"""Numbers with what is known of their spread. Images of a batch share a mix and statistics, so batches are the unit."""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CONFIDENCE = 0.95  # of all intervals


class Result:
    """A dataclass of numbers."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types that JSON knows."""
        found: dict[str, Any] = asdict(self)  # type: ignore[call-overload]
        return found


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
    return mean_difference(batches, [torch.zeros_like(batch) for batch in batches])


def mean_difference(batches: Sequence[Tensor], before: Sequence[Tensor]) -> Interval:
    """Return the mean of ``batches`` minus that of ``before``, paired by batch, with a t-interval over batches."""
    (mean, residuals), (other, others) = _residuals(batches), _residuals(before)
    value, number = mean - other, len(batches)
    if number < 2:
        return Interval(value)
    differences = [a - b for a, b in zip(residuals, others, strict=True)]
    half = t_critical(number - 1) * statistics.stdev(differences, 0.0) * math.sqrt(number)
    return Interval(value, value - half, value + half)


def _residuals(batches: Sequence[Tensor]) -> tuple[float, list[float]]:
    """Return the mean, and what each batch adds to its deviation; these sum to 0."""
    number = sum(map(len, batches))
    mean = math.fsum(float(batch.double().sum()) for batch in batches) / number
    return mean, [float((batch.double() - mean).sum()) / number for batch in batches]


def bootstrap(
    statistics: Callable[[Sequence[int]], Sequence[float]], batches: int, generator: torch.Generator, rounds: int = 200
) -> list[Interval]:
    """Return statistics with percentile intervals over resampled batches.

    ``statistics`` are those of the batches of some numbers, which may come several times; NaN where these batches say
    nothing, which are left out.

    Source: Efron & Tibshirani 1993, "An introduction to the bootstrap", section 13.3.
    """
    values = statistics(range(batches))
    if batches < 2:
        return [Interval(value) for value in values]
    draws = [torch.randint(batches, (batches,), generator=generator).tolist() for _ in range(rounds)]
    drawn = torch.tensor([statistics(draw) for draw in draws], dtype=torch.float64)
    tail = (1 - _CONFIDENCE) / 2
    low, high = drawn.nanquantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0).tolist()
    return [
        Interval(value) if math.isnan(least) else Interval(value, least, most)
        for value, least, most in zip(values, low, high, strict=True)
    ]


def t_critical(degrees: int) -> float:
    """Return t with ``P(|T| <= t) = 0.95`` for Student's T with ``degrees`` degrees of freedom.

    With ``T = sqrt(degrees) tan(angle)`` the density of the angle is proportional to ``cos(angle) ** (degrees - 1)``.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)

    def area(angle: float) -> float:
        return float(weights @ np.cos(angle * (nodes + 1) / 2) ** (degrees - 1)) * angle

    steps = 2**52
    found = bisect.bisect_left(
        range(steps), _CONFIDENCE * area(math.pi / 2), key=lambda k: area(k / steps * math.pi / 2)
    )
    return math.tan(found / steps * math.pi / 2) * math.sqrt(degrees)
