"""Methods compared over seeds: means with t-intervals, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.result import RobustnessResult, escaped, markdown_table, measured
from entprop_wrap.utils.options import check_mapping
from entprop_wrap.utils.statistics import Result, t_critical


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: In the unit of the values.
        half_width: Half the 95 % t-interval around the mean; None for one seed, which says nothing of the spread.
    """

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Return mean and two-sided 95 % t-interval of independent values, taken to be normally distributed."""
        mean, number = statistics.fmean(values), len(values)
        if number < 2:
            return cls(mean, None)
        return cls(mean, t_critical(number - 1) * statistics.stdev(values) / math.sqrt(number))


@dataclass(frozen=True)
class Comparison(Result):
    """Scores of several methods over the same seeds. Numbers are in [0, 1]; Markdown shows percent.

    Attributes:
        baseline: The method that differences are taken to.
        seeds: Number of seeds.
        protocol: What RA is the mean over.
        scores: Estimates by method and score, the names of ``RobustnessResult.summary``.
        differences: The method minus the baseline, seed by seed, in the same form.
    """

    baseline: str
    seeds: int
    protocol: str
    scores: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]

    def to_markdown(self) -> str:
        """Return a table of scores and a table of differences, in percent and percentage points, as Markdown."""
        note = "One seed: nothing is known of the spread, and a difference may be chance."
        if self.seeds > 1:
            note = (
                f"Mean and 95 % t-interval over {self.seeds} seeds; differences are paired by "
                "seed, and their intervals are not corrected for the number of comparisons."
            )
        tables = [_table("method", self.scores, "{:.2f}")]
        if self.differences:
            tables.append(_table(f"minus {escaped(self.baseline)}", self.differences, "{:+.2f}"))
        return "\n\n".join([*tables, f"Scores are in percent. {note} RA: {self.protocol}."])


def compare(results: Mapping[str, RobustnessResult | Sequence[RobustnessResult]]) -> Comparison:
    """Compare methods over seeds.

        compare({"vanilla": [v0, v1, v2], "EntProp": [e0, e1, e2]}).to_markdown()

    Results at the same place belong together, by the same seed of training and the same data: what a seed does to all
    methods alike drops out of the differences.

    Args:
        results: For each method its results, in the order of the seeds, or one result: a single seed, from which no
            interval can be had. The first method is the baseline.

    Raises:
        ConfigurationError: No results, something else, different numbers for two methods, or different protocols.
    """
    rows = _rows(results)
    if not rows or len(set(map(len, rows.values()))) > 1 or not all(rows.values()):
        found = {name: len(row) for name, row in rows.items()} or "none"
        raise ConfigurationError(f"Expected the same number of results, one per seed, for each method; found {found}.")
    first = next(iter(rows.values()))[0]
    for name, row in rows.items():
        for result in row:
            if measured(result) != measured(first) or set(result.summary) != set(first.summary):
                raise ConfigurationError(
                    f"Only results of one protocol can be compared. Expected {_in_words(first)}; found "
                    f"{_in_words(result)} for {name!r}."
                )
    baseline, *others = rows
    scores = {
        name: {key: Estimate.of([result.summary[key] for result in row]) for key in first.summary}
        for name, row in rows.items()
    }
    pairs = {name: list(zip(rows[name], rows[baseline], strict=True)) for name in others}
    differences = {
        name: {key: Estimate.of([a.summary[key] - b.summary[key] for a, b in seeds]) for key in first.summary}
        for name, seeds in pairs.items()
    }
    return Comparison(baseline, len(rows[baseline]), first.protocol, scores, differences)


def _rows(results: Any) -> dict[str, list[RobustnessResult]]:
    """Return the results of each method as a list; a single result is one seed."""
    example = 'compare({"vanilla": [v0, v1], "EntProp": [e0, e1]})'
    given = check_mapping("results", results, "results", example)
    rows = {name: [row] if isinstance(row, RobustnessResult) else row for name, row in given.items()}
    for name, row in rows.items():
        if not isinstance(row, (list, tuple)) or not all(isinstance(result, RobustnessResult) for result in row):
            raise ConfigurationError(
                f"Expected results of evaluate_robustness() for {name!r}, found {type(row).__name__}. Write {example}."
            )
    return rows


def _in_words(result: RobustnessResult) -> str:
    return f"{', '.join(result.summary)} over {result.protocol}"


def _table(head: str, estimates: dict[str, dict[str, Estimate]], form: str) -> str:
    """Return accuracies as a table; what else there is would make it too wide."""
    keys = [key for key in next(iter(estimates.values())) if not key.startswith(("Mean class", "Calibration"))]
    rows = [[escaped(name), *(_percent(row[key], form) for key in keys)] for name, row in estimates.items()]
    return markdown_table([[head, *map(escaped, keys)], *rows])


def _percent(estimate: Estimate, form: str) -> str:
    mean = form.format(100 * estimate.mean)
    return mean if estimate.half_width is None else f"{mean} ± {100 * estimate.half_width:.2f}"
