"""The results of a report in one form, and their scores as cells of tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from entprop_wrap.reporting.formatting import percent, points
from entprop_wrap.robustness import Comparison, RobustnessResult, compare

#: One result; or by the name of a model its result, or one for each seed.
Results: TypeAlias = "RobustnessResult | Mapping[str, RobustnessResult | Sequence[RobustnessResult]]"


@dataclass(frozen=True)
class Study:
    """Results in one form, the first model being the baseline and ``best`` the one with the highest Hscore.

    ``first`` is a result that stands for the protocol.
    """

    results: dict[str, list[RobustnessResult]]
    comparison: Comparison
    baseline: str
    best: str
    first: RobustnessResult
    seeds: int
    decimals: int


def study_of(results: Any) -> Study:
    """Return results as a study.

    Raises:
        ConfigurationError: Results of another type or of different protocols, or different numbers for two models.
    """
    named = {"model": results} if isinstance(results, RobustnessResult) else results
    comparison = compare(named)
    rows = {name: [row] if isinstance(row, RobustnessResult) else list(row) for name, row in named.items()}
    first = rows[comparison.baseline][0]
    return Study(
        results=rows,
        comparison=comparison,
        baseline=comparison.baseline,
        best=max(rows, key=lambda name: comparison.scores[name]["Hscore"].mean),
        first=first,
        seeds=comparison.seeds,
        decimals=1 if first.clean.images < 10_000 else 2,  # a second one would be noise
    )


def lower_is_better(score: str) -> bool:
    """Return whether a score is an error."""
    return score.startswith("Calibration error")


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
    interval = f"95 % interval {low} to {high}, {study.seeds} seeds"
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
    return [{**_cell(study, study.best, name), "name": name, "words": words[name]} for name in words]


def _cell(study: Study, name: str, score: str) -> dict[str, Any]:
    value = study.comparison.scores[name][score]
    cell = {"value": percent(value.mean, study.decimals), "spread": "", "change": "", "change_spread": "", "sign": ""}
    if value.half_width is not None:
        cell["spread"] = f"± {percent(value.half_width, study.decimals)}"
    if name != study.baseline:
        change = study.comparison.differences[name][score]
        cell["change"] = points(change.mean, study.decimals)
        if change.half_width is not None:
            cell["change_spread"] = f"± {percent(change.half_width, study.decimals)}"
            if abs(change.mean) > change.half_width:
                cell["sign"] = "better" if (change.mean > 0) != lower_is_better(score) else "worse"
    return cell


def score_rows(study: Study, costs: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row for each model."""
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "cells": [_cell(study, name, score) for score in study.first.summary],
            "cost": f"{costs[name]:g}" if name in costs else "",
        }
        for name in study.results
    ]
    for number, score in enumerate(study.first.summary):
        cells = [row["cells"][number] for row in rows]
        top = (min if lower_is_better(score) else max)(float(cell["value"]) for cell in cells)
        for cell in cells:
            cell["best"] = len(cells) > 1 and float(cell["value"]) == top
    return rows
