"""The tables of a report: scores, differences, and accuracy by corruption and severity as heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from entprop_wrap.robustness.comparison import Estimate
from entprop_wrap.robustness.reporting.markup import Markup, join, table, tag
from entprop_wrap.robustness.reporting.subjects import Studied
from entprop_wrap.robustness.reporting.wording import estimate, name_of, percent, points

#: Shares of the full colour from which black on it is harder to read than white, or white than black.
_LIGHT, _DARK = 0.72, 0.53

__all__ = ["differences", "heat_maps", "summary", "tiles"]


def tiles(studied: Studied) -> Markup:
    """Return SA, RA and Hscore of the model with the highest Hscore, large."""
    scores = studied.comparison.scores
    best = max(scores, key=lambda name: scores[name]["Hscore"].mean)
    words = {"SA": "clean accuracy", "RA": "accuracy under corruptions", "Hscore": "harmonic mean of SA and RA"}
    found = []
    for key, meaning in words.items():
        value = scores[best][key]
        spread = "" if value.half_width is None else f"± {percent(value.half_width)}"
        number = tag("span", percent(value.mean), tag("small", " %"), class_="number")
        note = join([tag("b", key), f" {meaning}", tag("br") if spread else "", spread])
        found.append(tag("div", number, tag("span", note, class_="meaning"), class_="tile"))
    title = tag("p", "Highest Hscore: ", tag("b", best), class_="lead") if len(scores) > 1 else ""
    return join([title, tag("div", *found, class_="tiles")])


def summary(studied: Studied, costs: Mapping[str, float] | None, cost_name: str) -> Markup:
    """Return one row for each model, and one for each auxiliary domain that was evaluated; best values are bold."""
    columns = studied.columns
    values = {name: [studied.estimate(column, row) for column in columns] for name, row in studied.results.items()}
    best = [
        (min if column.smaller_is_better else max)(row[number].mean for row in values.values())
        for number, column in enumerate(columns)
    ]

    def cell(value: Estimate, top: float) -> Markup:
        shown = estimate(value)
        return tag("td", tag("b", shown) if len(values) > 1 and percent(value.mean) == percent(top) else shown)

    rows = []
    for name, row in values.items():
        cost = [f"{costs[name]:g}" if name in costs else "\N{EN DASH}"] if costs else []
        rows.append([name, *(cell(value, top) for value, top in zip(row, best, strict=True)), *cost])
        for domain in studied.results[name][0].auxiliaries:
            found = [result.auxiliaries[domain] for result in studied.results[name] if domain in result.auxiliaries]
            cells = [estimate(studied.estimate(column, found)) for column in columns]
            label = tag("span", f"{name}, auxiliary {domain}", class_="minor")
            rows.append([label, *cells, *([""] if cost else [])])
    head = ["Model", *(column.name for column in columns), *([cost_name] if costs else [])]
    return table("Scores in percent", head, rows, kind="plain quiet")


def differences(studied: Studied) -> Markup:
    """Return each model minus the first one, seed by seed."""
    baseline, *others = studied.names
    rows = []
    for name in others:
        cells: list[Markup] = []
        for column in studied.columns:
            pairs = zip(studied.results[name], studied.results[baseline], strict=True)
            values = [column.get(ours) - column.get(theirs) for ours, theirs in pairs]
            cells.append(tag("td", estimate(Estimate.of(values, studied.confidence), difference=True)))
        rows.append([name, *cells])
    head = [f"Minus {baseline}", *(column.name for column in studied.columns)]
    return table(f"Differences to {baseline}, in percentage points", head, rows, kind="plain quiet")


def heat_maps(studied: Studied) -> Markup:
    """Return accuracy by corruption and severity: a map for each model, and one for each difference to the first."""
    conditions = list(studied.first.corrupted)
    accuracies = {
        name: {condition: studied.mean(name, condition) for condition in conditions} for name in studied.names
    }
    everything = [value for row in accuracies.values() for value in row.values()]
    low, high = math.floor(10 * min(everything)) / 10, math.ceil(10 * max(everything)) / 10
    high = high if high > low else low + 0.1

    baseline, *others = studied.names
    maps = [
        _map(studied, f"{name}: accuracy, %", row, percent, lambda value: (value - low) / (high - low), "heat")
        for name, row in accuracies.items()
    ]
    changes = {
        name: {condition: accuracies[name][condition] - accuracies[baseline][condition] for condition in conditions}
        for name in others
    }
    # The end of the scale is a whole number of points, so that its label is true.
    most = math.ceil(100 * max((abs(value) for row in changes.values() for value in row.values()), default=0)) / 100
    most = most or 0.01
    for name, row in changes.items():
        title = f"{name} minus {baseline}: percentage points"
        maps.append(_map(studied, title, row, points, lambda value: value / most, "change"))
    legends = [_legend("heat", f"{100 * low:.0f} %", f"{100 * high:.0f} %")]
    if changes:
        legends.append(_legend("change", points(-most).split(".")[0], points(most).split(".")[0] + " points"))
    return join([tag("div", *legends, class_="legends"), tag("div", *maps, class_="maps")])


def _map(
    studied: Studied,
    title: str,
    values: Mapping[tuple[str, int], float],
    write: Callable[[float], str],
    place: Callable[[float], float],
    kind: str,
) -> Markup:
    corruptions, severities = studied.first.corruptions, studied.first.severities

    def mean(conditions: list[tuple[str, int]]) -> float:
        return sum(values[condition] for condition in conditions) / len(conditions)

    def cell(value: float) -> Markup:
        at = place(value)
        side = "" if kind == "heat" else " less" if at < 0 else " more"
        # Where writing must turn from dark to light; the dark page has other colours, and another place.
        strong = (" s1" if abs(at) > _DARK else "") + (" s2" if abs(at) > _LIGHT else "")
        return tag("td", write(value), class_=kind + side + strong, style=f"--v:{min(abs(at), 1):.3f}")

    rows: list[list[str]] = []
    for name in corruptions:
        row = [(name, severity) for severity in severities]
        rows.append([name_of(name), *(cell(values[one]) for one in row), tag("td", write(mean(row)), class_="mean")])
    foot = [tag("td", write(mean([(name, severity) for name in corruptions]))) for severity in severities]
    rows.append(["mean", *foot, tag("td", write(mean(list(values))), class_="mean")])
    head = ["Severity", *map(str, severities), "mean"]
    return table(title, head, rows, kind="map", last_row_is_total=True)


def _legend(kind: str, low: str, high: str) -> Markup:
    return tag("span", low, tag("span", class_=f"ramp {kind}-ramp", aria_hidden="true"), high, class_="legend")
