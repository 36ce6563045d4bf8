"""The charts of a report: differences, accuracy and calibration by severity, cost, and accuracy against epsilon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from entprop_wrap.reporting import charts
from entprop_wrap.reporting.charts import Chart, Line
from entprop_wrap.reporting.study import Study, lower_is_better
from entprop_wrap.robustness import Estimate, RobustnessResult


def study_charts(
    study: Study, costs: Mapping[str, float], cost_name: str, curves: Mapping[str, Mapping[float, float]]
) -> list[Chart]:
    """Return the charts that there are numbers for."""
    found = [_by_severity(study, "accuracy", "accuracy"), _by_severity(study, "calibration_error", "calibration error")]
    if len(study.results) > 1:
        if study.seeds > 1:
            found.insert(0, _differences(study))
        if costs:
            found.append(_against_cost(study, costs, cost_name))
    if curves:
        found.append(_against_epsilon(study, curves))
    return found


def _differences(study: Study) -> Chart:
    # attacks move by tens of points, which would hide the others
    scores = ("SA", "RA", "Hscore", "Calibration error", "Calibration error, corrupted")
    lines = [
        _line(name, range(len(scores)), [study.comparison.differences[name][score] for score in scores], colour)
        for colour, name in enumerate(study.results)
        if name != study.baseline
    ]
    headings = [f"{score}{' ↓' if lower_is_better(score) else ''}" for score in scores]
    title = f"Differences to {study.baseline}"
    return charts.interval_chart(title, lines, headings, "percentage points", f"{_note(study)} ↓: lower is better.")


def _by_severity(study: Study, score: str, words: str) -> Chart:
    labels: dict[float, str] = {0: "clean", **{one: str(one) for one in sorted(study.first.severities)}}
    lines = []
    for colour, (name, results) in enumerate(study.results.items()):
        values = [[_mean_at(result, severity, score) for result in results] for severity in labels]
        estimates = [Estimate.of(row) for row in values]
        lines.append(_line(name, list(labels), estimates, colour))
    options: dict[str, Any] = {"x_labels": labels, "note": _note(study)}
    if score == "calibration_error":
        options["note"] = f"Lower is better: how far confidence is from accuracy. {_note(study)}"
        options["from_zero"] = "y"
    return _chart(study, f"{words.capitalize()} by severity", lines, "severity", f"{words}, %", **options)


def _against_cost(study: Study, costs: Mapping[str, float], cost_name: str) -> Chart:
    lines = [
        _line(name, [float(costs[name])], [study.comparison.scores[name]["Hscore"]], colour)
        for colour, name in enumerate(study.results)
        if name in costs
    ]
    options: dict[str, Any] = {"joined": False, "from_zero": "x", "note": _note(study)}
    return _chart(study, f"Hscore against {cost_name}", lines, cost_name, "Hscore, %", **options)


def _against_epsilon(study: Study, curves: Mapping[str, Mapping[float, float]]) -> Chart:
    lines = []
    for colour, name in enumerate(study.results):
        if curve := curves.get(name):
            sizes = sorted(curve)
            accuracies = [100 * float(curve[size]) for size in sizes]
            lines.append(Line(name, [round(255 * float(size), 6) for size in sizes], accuracies, colour=colour))
    places = sorted({x for line in lines for x in line.x})
    powers = [x for x in places if not x or math.log2(x).is_integer()]
    labels = {x: f"{x:.3g}" for x in (powers if len(powers) > 1 else places)}
    note = "A curve that does not come down to 0 tells of an attack that fails. Axis: log(1 + epsilon)."
    x_name = "epsilon, in 255ths of the pixel range"
    options: dict[str, Any] = {"x_labels": labels, "x_scale": "log1p", "note": note}
    return _chart(study, "Accuracy against epsilon", lines, x_name, "accuracy, %", **options)


def _chart(study: Study, title: str, lines: Sequence[Line], x_name: str, y_name: str, **options: Any) -> Chart:
    return charts.line_chart(title, lines, x_name, y_name, write=f"{{:.{study.decimals}f}}".format, **options)


def _line(name: str, x: Sequence[float], estimates: Sequence[Estimate], colour: int) -> Line:
    spread = [None if one.half_width is None else 100 * one.half_width for one in estimates]
    return Line(name, x, [100 * one.mean for one in estimates], spread, colour)


def _mean_at(result: RobustnessResult, severity: float, score: str) -> Any:
    """Return a score averaged over the corruptions of a severity; 0 is the images as they are."""
    found = [scores for (_, at), scores in result.corrupted.items() if at == severity] if severity else [result.clean]
    return sum(getattr(scores, score) for scores in found) / len(found)


def _note(study: Study) -> str:
    return f"Bars: 95 % t-intervals over {study.seeds} seeds." if study.seeds > 1 else ""
