"""Accuracy by corruption and severity, as tables whose cells are coloured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from entprop_wrap.reporting.formatting import percent, points
from entprop_wrap.reporting.study import Study

#: Shares of the full colour from which black on it is harder to read than white, or white than black.
_LIGHT, _DARK = 0.72, 0.53


def heat_maps(study: Study) -> dict[str, Any]:
    """Return accuracy by corruption and severity: a map for each model, and one for each difference to the baseline."""
    baseline, *others = study.results
    tables = {
        name: {at: sum(one.table[at] for one in row) / len(row) for at in study.first.corrupted}
        for name, row in study.results.items()
    }
    changes = {name: {at: tables[name][at] - tables[baseline][at] for at in tables[name]} for name in others}
    everything = [value for table in tables.values() for value in table.values()]
    low, high = math.floor(10 * min(everything)) / 10, math.ceil(10 * max(everything)) / 10
    high = high if high > low else low + 0.1
    # the end of the scale is a whole number of points, so that its label is true
    most = math.ceil(100 * max((abs(value) for row in changes.values() for value in row.values()), default=0)) / 100
    most = most or 0.01
    accuracy = [
        _map(study, f"{name}: accuracy, %", table, percent, lambda value: (value - low) / (high - low), "heat")
        for name, table in tables.items()
    ]
    change = [
        _map(study, f"{name} minus {baseline}: points", table, points, lambda value: value / most, "change")
        for name, table in changes.items()
    ]
    groups = [accuracy + change] if len(others) < 2 else [accuracy, change]
    ends = {"low": percent(low, 0), "high": percent(high, 0), "less": points(-most, 0), "more": points(most, 0)}
    return {"groups": groups, **ends}


def _map(
    study: Study,
    title: str,
    values: Mapping[tuple[str, int], float],
    write: Callable[[float, int], str],
    place: Callable[[float], float],
    kind: str,
) -> dict[str, Any]:
    severities = study.first.severities

    def mean(found: Sequence[float]) -> str:
        return write(sum(found) / len(found), study.decimals)

    def cell(value: float) -> dict[str, str]:
        at = place(value)
        side = "" if kind == "heat" else " less" if at < 0 else " more"
        # where lettering turns from dark to light; the dark page has other colours, and another place
        strong = (" s1" if abs(at) > _DARK else "") + (" s2" if abs(at) > _LIGHT else "")
        text = write(value, study.decimals)
        return {"text": text, "class": kind + side + strong, "share": f"{min(abs(at), 1):.3f}"}

    rows = []
    for name in study.first.corruptions:
        row = [values[name, severity] for severity in severities]
        rows.append({"name": name.replace("_", " "), "cells": [cell(one) for one in row], "mean": mean(row)})
    foot = [mean([values[name, severity] for name in study.first.corruptions]) for severity in severities]
    return {"title": title, "severities": severities, "rows": rows, "foot": [*foot, mean(list(values.values()))]}
