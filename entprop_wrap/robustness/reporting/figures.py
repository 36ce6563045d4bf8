"""The figures of a report: accuracy against severity, cost against Hscore, accuracy against epsilon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.comparison import Estimate
from entprop_wrap.robustness.reporting.charts import Axis, Series, chart, plain_number, ticks_between
from entprop_wrap.robustness.reporting.markup import Markup
from entprop_wrap.robustness.reporting.subjects import Studied
from entprop_wrap.robustness.reporting.wording import percent

__all__ = ["against_cost", "against_epsilon", "against_severity", "check_costs", "check_curves", "intervals"]


def against_severity(studied: Studied) -> Markup:
    """Return accuracy by severity, averaged over corruptions and seeds; 0 is the images as they are."""
    series = []
    for colour, (name, results) in enumerate(studied.results.items()):
        points = [(0.0, Estimate.of([result.sa for result in results], studied.confidence))]
        for severity in sorted(studied.first.severities):
            values = [result.per_severity[severity] for result in results]
            points.append((float(severity), Estimate.of(values, studied.confidence)))
        series.append(_series(name, points, colour))
    x = Axis("severity (0: images as they are)", sorted({a for one in series for a, _ in one.points}))
    return chart("Accuracy by severity", series, x, _accuracy(series), note=_spread(studied))


def against_cost(studied: Studied, costs: Mapping[str, float], name: str) -> Markup:
    """Return Hscore against what each model has cost."""
    scores = studied.comparison.scores
    series = [
        _series(model, [(float(costs[model]), scores[model]["Hscore"])], colour, "dots")
        for colour, model in enumerate(studied.names)
        if model in costs
    ]
    ticks = ticks_between(min(0.0, *costs.values()), max(costs.values()))
    x = Axis(name, ticks)
    return chart(f"Hscore against {name}", series, x, _accuracy(series, "Hscore, %"), note=_spread(studied))


def against_epsilon(studied: Studied, curves: Mapping[str, Mapping[float, float]]) -> Markup:
    """Return accuracy against the size of an attack, in 255ths of the pixel range."""
    series = [
        Series(name, [(255 * epsilon, accuracy) for epsilon, accuracy in sorted(curves[name].items())], colour=colour)
        for colour, name in enumerate(studied.names)
        if name in curves
    ]
    x = Axis(
        "epsilon, in 255ths of the pixel range",
        sorted({a for one in series for a, _ in one.points}),
        "{:.4g}".format,
        place=math.log1p,
    )
    ticks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    y = Axis("accuracy, %", ticks, lambda value: f"{100 * value:.0f}", percent)
    note = "The axis is that of log(1 + x). A curve that does not come down to 0 tells of an attack that fails."
    return chart("Accuracy against epsilon", series, x, y, note=note)


def intervals(studied: Studied) -> Markup:
    """Return differences of SA, RA and Hscore to the first model, with their intervals."""
    keys = ("SA", "RA", "Hscore")
    differences = studied.comparison.differences
    number = len(differences)
    series = []
    for place, (name, row) in enumerate(differences.items()):
        shift = 0.5 * ((place + 0.5) / number - 0.5)
        series.append(_series(name, [(at + shift, row[key]) for at, key in enumerate(keys)], place + 1, "dots"))
    low, high = _ends(series)
    y = Axis(
        "percentage points",
        ticks_between(min(low, 0), max(high, 0)),
        lambda value: plain_number(100 * value),
    )
    x = Axis("score", (0, 1, 2), lambda value: keys[round(value)], ends=(-0.5, 2.5))
    title = f"Differences to {studied.comparison.baseline}"
    return chart(title, series, x, y, note=_spread(studied), numbers=False)


def check_costs(studied: Studied, costs: Mapping[str, float]) -> None:
    """Raise :class:`ConfigurationError` unless costs are finite numbers of models that there are."""
    studied.check_names("costs", costs)
    for name, cost in costs.items():
        if isinstance(cost, bool) or not isinstance(cost, (int, float)) or not math.isfinite(cost):
            raise ConfigurationError(f"costs[{name!r}] must be a finite number, found {cost!r}.")


def check_curves(studied: Studied, curves: Mapping[str, Mapping[float, float]]) -> None:
    """Raise :class:`ConfigurationError` unless curves are accuracies by epsilon, of models that there are."""
    studied.check_names("curves", curves)
    for name, curve in curves.items():
        if not isinstance(curve, Mapping) or not curve or not all(0 <= value <= 1 for value in curve.values()):
            raise ConfigurationError(
                f"curves[{name!r}] must be accuracies in [0, 1] by epsilon, as accuracy_against_epsilon() returns "
                f"them; found {curve!r}."
            )


def _series(name: str, points: Sequence[tuple[float, Estimate]], colour: int, style: str = "line") -> Series:
    return Series(name, [(a, b.mean) for a, b in points], [b.half_width for _, b in points], style, colour)


def _ends(series: Sequence[Series]) -> tuple[float, float]:
    values = [
        y + side * (half or 0.0)
        for one in series
        for (_, y), half in zip(one.points, one.spread, strict=True)
        for side in (-1, 1)
    ]
    return min(values), max(values)


def _accuracy(series: Sequence[Series], name: str = "accuracy, %") -> Axis:
    low, high = _ends(series)
    ticks = ticks_between(low, min(high, 1.0) if max(y for one in series for _, y in one.points) <= 1 else high)
    return Axis(name, ticks, lambda value: plain_number(100 * value), percent, ends=(min(ticks), max(ticks)))


def _spread(studied: Studied) -> str:
    if studied.comparison.seeds < 2:
        return ""
    return f"Bars: {100 * studied.confidence:g} % t-interval over {studied.comparison.seeds} results."
