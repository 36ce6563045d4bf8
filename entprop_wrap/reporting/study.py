"""The results of a report in one form, and their scores as cells of tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from entprop_wrap.reporting.formatting import decimals_of, percent, points
from entprop_wrap.robustness import Comparison, Estimate, RobustnessResult, compare
from entprop_wrap.utils.options import check_text

__all__ = ["Column", "Results", "Study", "cards", "score_rows", "study_of", "verdict"]

#: One result; or by the name of a model its result, or one for each seed.
Results: TypeAlias = "RobustnessResult | Mapping[str, RobustnessResult | Sequence[RobustnessResult]]"


@dataclass(frozen=True)
class Column:
    """A score: its heading, how it is read from a result (None: not measured), and which way is better."""

    name: str
    get: Callable[[RobustnessResult], float | None]
    lower_is_better: bool = False


@dataclass(frozen=True)
class Study:
    """Results in one form.

    Attributes:
        results: For each model one for each seed, all of one protocol; the first model is the baseline.
        comparison: Their means and differences over seeds.
        columns: The scores.
        baseline: Name of the baseline.
        best: Name of the model with the highest Hscore.
        first: A result that stands for the protocol.
        seeds: Number of results of each model.
        confidence: Level of intervals, as text: "95 %".
        decimals: Decimals of percentages.
    """

    results: dict[str, list[RobustnessResult]]
    comparison: Comparison
    columns: list[Column]
    baseline: str
    best: str
    first: RobustnessResult
    seeds: int
    confidence: str
    decimals: int

    def score(self, name: str, get: Callable[[RobustnessResult], Any]) -> Estimate:
        """Return the mean of a model's score over seeds, with its interval."""
        return Estimate.of([get(result) for result in self.results[name]], self.comparison.confidence)

    def difference(self, name: str, get: Callable[[RobustnessResult], Any]) -> Estimate:
        """Return a model's score minus the baseline's, paired by seed."""
        pairs = zip(self.results[name], self.results[self.baseline], strict=True)
        return Estimate.of([get(ours) - get(theirs) for ours, theirs in pairs], self.comparison.confidence)


def study_of(results: Any, confidence: float) -> Study:
    """Return results as a study.

    Raises:
        ConfigurationError: Results of another type or of different protocols, or not as many for each model.
    """
    named = {"model": results} if isinstance(results, RobustnessResult) else results
    comparison = compare(named, confidence=confidence)
    for name in named:
        check_text("The name of a model", name)
    rows = {name: [row] if isinstance(row, RobustnessResult) else list(row) for name, row in named.items()}
    first = rows[comparison.baseline][0]
    return Study(
        results=rows,
        comparison=comparison,
        columns=_columns(first),
        baseline=comparison.baseline,
        best=max(rows, key=lambda name: comparison.scores[name]["Hscore"].mean),
        first=first,
        seeds=comparison.seeds,
        confidence=f"{100 * comparison.confidence:g} %",
        decimals=decimals_of(first),
    )


def _columns(first: RobustnessResult) -> list[Column]:
    def accuracy(group: str, name: str) -> Callable[[RobustnessResult], float | None]:
        return lambda result: scores.accuracy if (scores := getattr(result, group).get(name)) else None

    return [
        Column("SA", lambda result: result.sa),
        Column("RA", lambda result: result.ra),
        Column("Hscore", lambda result: result.hscore),
        *(Column(f"Under {name}", accuracy("adversarial", name)) for name in first.adversarial),
        *(Column(f"SA on {name}", accuracy("shifts", name)) for name in first.shifts),
        Column("Mean class accuracy", lambda result: result.mean_class_accuracy),
        Column("Calibration error", lambda result: result.calibration_error, True),
        Column("Calibration error, corrupted", lambda result: result.corrupted_calibration_error, True),
    ]


def verdict(study: Study) -> str:
    """Return in a sentence which model is ahead of the baseline, and whether that is evidence."""
    if len(study.results) < 2:
        return ""
    if study.best == study.baseline:
        return f"{study.baseline}, the baseline, has the highest Hscore."
    change = study.comparison.differences[study.best]["Hscore"]
    ahead = f"{study.best} has the highest Hscore, {percent(change.mean, study.decimals)} points above {study.baseline}"
    if change.half_width is None:
        return f"{ahead}, from one result each: that may be chance."
    low, high = (points(change.mean + side * change.half_width, study.decimals) for side in (-1, 1))
    interval = f"{study.confidence} interval {low} to {high}, {study.seeds} seeds"
    if change.mean > change.half_width:
        return f"{ahead} ({interval})."
    return f"{ahead}, but that is no evidence of a difference: the interval includes 0 ({interval})."


def cards(study: Study) -> list[dict[str, Any]]:
    """Return the four main scores of the model that is ahead, each with its difference to the baseline."""
    words = {
        "SA": "accuracy on clean images",
        "RA": "mean accuracy under corruptions",
        "Hscore": "harmonic mean of SA and RA",
        "Calibration error": "clean images; lower is better",
    }
    shown = [column for column in study.columns if column.name in words]
    return [{**_cell(study, study.best, one), "name": one.name, "words": words[one.name]} for one in shown]


def _cell(study: Study, name: str, column: Column) -> dict[str, Any]:
    value = study.score(name, column.get)
    cell = {"value": percent(value.mean, study.decimals), "spread": "", "change": "", "change_spread": "", "sign": ""}
    if value.half_width is not None:
        cell["spread"] = f"± {percent(value.half_width, study.decimals)}"
    if name != study.baseline:
        change = study.difference(name, column.get)
        cell["change"] = points(change.mean, study.decimals)
        if change.half_width is not None:
            cell["change_spread"] = f"± {percent(change.half_width, study.decimals)}"
            if abs(change.mean) > change.half_width:
                cell["sign"] = "better" if (change.mean > 0) != column.lower_is_better else "worse"
    return cell


def score_rows(study: Study, costs: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row for each model, and one for each auxiliary domain that was evaluated."""
    rows: list[dict[str, Any]] = []
    for name, results in study.results.items():
        cells: list[dict[str, Any]] = [_cell(study, name, column) for column in study.columns]
        rows.append({"name": name, "domain": "", "cells": cells, "cost": f"{costs[name]:g}" if name in costs else ""})
        for domain in results[0].auxiliaries:
            found = [result.auxiliaries[domain] for result in results if domain in result.auxiliaries]
            cells = []
            for column in study.columns:
                values = [value for one in found if (value := column.get(one)) is not None]
                mean = percent(sum(values) / len(values), study.decimals) if values else "\N{EN DASH}"
                cells.append({"value": mean, "spread": "", "change": "", "best": False})
            rows.append({"name": name, "domain": domain, "cells": cells, "cost": ""})
    for number, column in enumerate(study.columns):
        mains = [row["cells"][number] for row in rows if not row["domain"]]
        top = (min if column.lower_is_better else max)(float(cell["value"]) for cell in mains)
        for cell in mains:
            cell["best"] = len(mains) > 1 and float(cell["value"]) == top
    return rows
