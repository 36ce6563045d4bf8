"""Line charts, scatter charts and histograms as SVG, drawn in the colours of the page, each with its numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from entprop_wrap.robustness.reporting.markup import Markup, join, tag
from entprop_wrap.robustness.reporting.markup import table as table_of

__all__ = ["Axis", "Series", "chart", "plain_number", "ticks_between"]

_WIDTH, _HEIGHT = 520, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 16, 14, 48
_COLOURS = 8


def plain_number(value: float) -> str:
    """Return a number as short as it goes, with a true minus sign."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Series:
    """Points of one name.

    Attributes:
        name: In the legend.
        points: ``(x, y)``.
        spread: Half the length of a vertical interval at each point, or none.
        colour: Place in the colours; the same name has the same in every chart.
        style: "line", "dots" or "steps" (a histogram: y holds from x to the next x).
    """

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[float | None] = ()
    style: str = "line"
    colour: int = 0


@dataclass(frozen=True)
class Axis:
    """An axis.

    Attributes:
        name: With its unit.
        ticks: Where it has labels.
        write: Number to label.
        exact: Number to cell of the table below the drawing; None: as ``write``.
        place: Number to position, where the axis is not linear.
        ends: Range that is shown; None: that of the ticks.
    """

    name: str
    ticks: Sequence[float]
    write: Callable[[float], str] = plain_number
    exact: Callable[[float], str] | None = None
    place: Callable[[float], float] = float
    ends: tuple[float, float] | None = None


def chart(title: str, series: Sequence[Series], x: Axis, y: Axis, *, note: str = "", numbers: bool = True) -> Markup:
    """Return a figure: legend, drawing, and its numbers as a table that can be unfolded.

    Args:
        title: Caption.
        series: What is drawn, in the order of their colours.
        x: Horizontal axis.
        y: Vertical axis.
        note: More to say below.
        numbers: Whether the table comes with it.
    """
    across = _scale(x, _LEFT, _WIDTH - _RIGHT)
    up = _scale(y, _HEIGHT - _BOTTOM, _TOP)
    parts = [*_grid(x, y, across, up)]
    for one in series:
        parts.append(tag("g", *_draw(one, across, up), class_=f"c{one.colour % _COLOURS}"))
    words = f"{title}. {y.name} against {x.name}, for {', '.join(one.name for one in series)}."
    svg = tag("svg", *parts, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=words)
    shown = [_key(one) for one in series]
    return tag(
        "figure",
        tag("figcaption", title),
        tag("div", *shown, class_="keys") if len(series) > 1 else "",
        svg,
        tag("p", note, class_="note") if note else "",
        _numbers(title, series, x, y) if numbers else "",
    )


def ticks_between(low: float, high: float, number: int = 5) -> list[float]:
    """Return about so many round numbers whose ends hold ``low`` and ``high``."""
    span = high - low or abs(high) or 1.0
    raw = span / number
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * k, 12) for k in range(first, max(last, first + 1) + 1)]


def _scale(axis: Axis, start: float, end: float) -> Callable[[float], float]:
    low, high = axis.ends or (min(axis.ticks), max(axis.ticks))
    origin, length = axis.place(low), axis.place(high) - axis.place(low) or 1.0
    return lambda value: start + (end - start) * (axis.place(value) - origin) / length


def _grid(x: Axis, y: Axis, across: Callable[[float], float], up: Callable[[float], float]) -> list[Markup]:
    parts = []
    base = _HEIGHT - _BOTTOM
    for value in y.ticks:
        height = up(value)
        kind = "grid" if value else "grid zero"
        parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=height, y2=height, class_=kind))
        parts.append(tag("text", y.write(value), x=_LEFT - 8, y=height + 4, class_="tick end"))
    taken = -math.inf
    for value in x.ticks:
        place, label = across(value), x.write(value)
        width = 9.5 * len(label)  # as wide as it gets on a phone
        if place - width / 2 > taken + 6:  # labels that would touch are left out, not their values
            parts.append(tag("text", label, x=place, y=base + 18, class_="tick middle"))
            parts.append(tag("line", x1=place, x2=place, y1=base, y2=base + 4, class_="axis"))
            taken = place + width / 2
    parts.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=base, y2=base, class_="axis"))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(tag("text", x.name, x=middle, y=_HEIGHT - 8, class_="name middle"))
    turned = f"rotate(-90 14 {(_TOP + base) / 2:g})"
    parts.append(tag("text", y.name, x=14, y=(_TOP + base) / 2, transform=turned, class_="name middle"))
    return parts


def _draw(one: Series, across: Callable[[float], float], up: Callable[[float], float]) -> list[Markup]:
    number = one.colour
    places = [(across(a), up(b)) for a, b in one.points]
    if one.style == "steps":
        corners = [places[0], *((after, b) for (_, b), (after, _) in itertools.pairwise(places))]
        base = up(0.0)
        path = f"M{places[0][0]:.1f},{base:.1f}"
        for (a, b), (after, _) in itertools.pairwise(places):
            path += f"L{a:.1f},{b:.1f}L{after:.1f},{b:.1f}"
        path += f"L{corners[-1][0]:.1f},{base:.1f}"
        return [tag("path", d=path, class_="area"), tag("path", d=path, class_=f"stroke d{number // _COLOURS % 3}")]
    parts = []
    if one.style == "line" and len(places) > 1:
        joined = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(tag("polyline", points=joined, class_=f"stroke d{number // _COLOURS % 3}"))
    for (a, b), half in zip(one.points, one.spread, strict=False):
        if half is not None:
            parts.append(tag("line", x1=across(a), x2=across(a), y1=up(b - half), y2=up(b + half), class_="stroke"))
    return [*parts, *(_marker(number, a, b) for a, b in places)]


def _marker(number: int, x: float, y: float) -> Markup:
    """Shapes tell series apart where colours do not."""
    r = 4.5
    kind = number % 4
    if kind == 0:
        return tag("circle", cx=x, cy=y, r=r, class_="mark")
    if kind == 1:
        return tag("rect", x=x - r, y=y - r, width=2 * r, height=2 * r, class_="mark")
    corners = [(0, -1.3), (1.2, 0.9), (-1.2, 0.9)] if kind == 2 else [(0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)]
    path = "M" + "L".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in corners) + "Z"
    return tag("path", d=path, class_="mark")


def _key(one: Series) -> Markup:
    number = one.colour
    if one.style == "steps":
        drawn = tag("rect", x=5, y=3, width=16, height=10, class_="area")
    else:
        line = tag("line", x1=0, x2=26, y1=8, y2=8, class_=f"stroke d{number // _COLOURS % 3}")
        drawn = join([line if one.style == "line" else "", _marker(number, 13, 8)])
    svg = tag("svg", drawn, viewBox="0 0 26 16", class_=f"key c{number % _COLOURS}", aria_hidden="true")
    return tag("span", svg, one.name)


def _numbers(title: str, series: Sequence[Series], x: Axis, y: Axis) -> Markup:
    """A table with one row for each x, and a column for each series."""
    values = [dict(one.points) for one in series]
    found = sorted({a for row in values for a in row})
    write_x, write_y = x.exact or x.write, y.exact or y.write
    rows = [[write_x(a), *(write_y(row[a]) if a in row else "\N{EN DASH}" for row in values)] for a in found]
    head = [x.name, *(one.name for one in series)]
    return tag("details", tag("summary", "Numbers"), table_of(f"{title}: {y.name}", head, rows))
