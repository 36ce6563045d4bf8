"""Methods compared over seeds: means with t-intervals, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.result import RobustnessResult, escaped, markdown_table
from entprop_wrap.utils.options import check_number
from entprop_wrap.utils.statistics import t_critical

__all__ = ["Comparison", "Estimate", "compare"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: In the unit of the values.
        half_width: Of the t-interval around the mean; None for one seed, which says nothing of the spread.
    """

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float], confidence: float = 0.95) -> Estimate:
        """Return mean and two-sided t-interval of independent values, taken to be normally distributed."""
        number = len(values)
        mean = math.fsum(values) / number
        if number < 2:
            return cls(mean, None)
        variance = math.fsum((value - mean) ** 2 for value in values) / (number - 1)
        return cls(mean, t_critical(confidence, number - 1) * math.sqrt(variance / number))


@dataclass(frozen=True)
class Comparison:
    """Scores of several methods over the same seeds. Numbers are in [0, 1]; Markdown shows percent.

    Attributes:
        baseline: The method that differences are taken to.
        seeds: Number of seeds.
        confidence: Of all intervals, in (0, 1).
        protocol: What RA is the mean over.
        scores: Estimates by method and score: "SA", "RA", "Hscore", and those of shifts and attacks.
        differences: Of the method minus the baseline, seed by seed, in the same form.
    """

    baseline: str
    seeds: int
    confidence: float
    protocol: str
    scores: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types that JSON knows."""
        return asdict(self)

    def to_markdown(self) -> str:
        """Return a table of scores and a table of differences, in percent and percentage points, as Markdown."""
        keys = list(self.scores[self.baseline])
        heads = list(map(escaped, keys))
        scores = [["method", *heads]]
        scores += [
            [escaped(name), *(_percent(row[key], "{:.2f}") for key in keys)] for name, row in self.scores.items()
        ]
        changes = [[f"minus {escaped(self.baseline)}", *heads]]
        changes += [
            [escaped(name), *(_percent(row[key], "{:+.2f}") for key in keys)] for name, row in self.differences.items()
        ]
        if self.seeds > 1:
            note = (
                f"Mean and {100 * self.confidence:g} % t-interval over {self.seeds} seeds; differences are paired by "
                "seed, and their intervals are not corrected for the number of comparisons."
            )
        else:
            note = "One seed: nothing is known of the spread, and a difference may be chance."
        tables = [markdown_table(scores)] + ([markdown_table(changes)] if self.differences else [])
        return "\n\n".join([*tables, f"{note} RA: {self.protocol}."])


def compare(
    results: Mapping[str, RobustnessResult | Sequence[RobustnessResult]], *, confidence: float = 0.95
) -> Comparison:
    """Compare methods over seeds.

        compare({"vanilla": [v0, v1, v2], "EntProp": [e0, e1, e2]}).to_markdown()

    Results at the same place belong together: same seed of training, same data. That is what pairing makes use of: what
    a seed does to all methods alike drops out of the differences.

    Args:
        results: For each method its results, in the order of the seeds, or one result: a single seed, from which no
            interval can be had. The first method is the baseline.
        confidence: Of all intervals, in (0, 1).

    Raises:
        ConfigurationError: No results, something else, not as many for each method, or of different protocols.
    """
    confidence = check_number("confidence", confidence, lambda value: 0 < value < 1, "in (0, 1), such as 0.95")
    rows = _rows(results)
    lengths = {name: len(row) for name, row in rows.items()}
    if not lengths or len(set(lengths.values())) > 1 or 0 in lengths.values():
        raise ConfigurationError(
            f"Expected as many results for each method, one for each seed; found {lengths or 'none'}."
        )
    first = next(iter(rows.values()))[0]
    for name, row in rows.items():
        for result in row:
            if _measured(result) != _measured(first):
                raise ConfigurationError(
                    f"Only results of one protocol can be compared. Expected {_measured(first)}; found "
                    f"{_measured(result)} for {name!r}."
                )
    values = {
        name: {key: [_values(result)[key] for result in row] for key in _values(first)} for name, row in rows.items()
    }
    baseline, *others = values
    return Comparison(
        baseline=baseline,
        seeds=lengths[baseline],
        confidence=confidence,
        protocol=first.protocol,
        scores={
            name: {key: Estimate.of(column, confidence) for key, column in row.items()} for name, row in values.items()
        },
        differences={
            name: {
                key: Estimate.of([a - b for a, b in zip(column, values[baseline][key], strict=True)], confidence)
                for key, column in values[name].items()
            }
            for name in others
        },
    )


def _rows(results: Any) -> dict[str, list[RobustnessResult]]:
    """Return the results of each method as a list; a single result is one seed."""
    example = 'Write compare({"vanilla": [v0, v1], "EntProp": [e0, e1]}).'
    if not isinstance(results, Mapping):
        raise ConfigurationError(f"Expected a dict of results by method, found {type(results).__name__}. {example}")
    rows = {}
    for name, row in results.items():
        row = [row] if isinstance(row, RobustnessResult) else row
        if isinstance(row, str) or not isinstance(row, Sequence):
            raise ConfigurationError(
                f"Expected a result or a list of them for {name!r}, found {type(row).__name__}. {example}"
            )
        for result in row:
            if not isinstance(result, RobustnessResult):
                raise ConfigurationError(
                    f"Expected results of evaluate_robustness() for {name!r}, found {type(result).__name__}. {example}"
                )
        rows[name] = list(row)
    return rows


def _values(result: RobustnessResult) -> dict[str, float]:
    return {
        "SA": result.sa,
        "RA": result.ra,
        "Hscore": result.hscore,
        **{f"SA on {name}": scores.accuracy for name, scores in result.shifts.items()},
        **{f"under {name}": scores.accuracy for name, scores in result.adversarial.items()},
    }


def _measured(result: RobustnessResult) -> str:
    return f"{', '.join(_values(result))} over {result.protocol}"


def _rows_of(estimates: Mapping[str, Mapping[str, Estimate]], keys: Sequence[str], form: str) -> list[list[str]]:
    return [[escaped(name), *(_percent(row[key], form) for key in keys)] for name, row in estimates.items()]


def _percent(estimate: Estimate, form: str) -> str:
    mean = form.format(100 * estimate.mean)
    return mean if estimate.half_width is None else f"{mean} ± {100 * estimate.half_width:.2f}"
