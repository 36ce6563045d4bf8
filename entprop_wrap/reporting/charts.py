"""Charts: matplotlib's SVG, with the page's CSS variables for colours, so that they follow dark mode."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = 8
_GLYPHS = "●■▲◆▼✚"
_MARKERS = "os^Dvp"
#: Colours that matplotlib draws with and the page replaces, by the name of the CSS variable.
_THEME = {"ink": "#0000a0", "soft": "#0000a1", "rule": "#0000a2", "card": "#0000a3"} | {
    f"c{number}": f"#0000c{number}" for number in range(COLOURS)
}
_NAMES = {colour: name for name, colour in _THEME.items()}
_COLOUR = re.compile("|".join(_NAMES))
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_INK, _SOFT, _RULE, _CARD = (_THEME[name] for name in ("ink", "soft", "rule", "card"))
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.labelcolor": _INK,
    "grid.color": _RULE,
    "ytick.major.size": 0,
    "ytick.major.pad": 5,
    "xtick.major.size": 2,
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), _SOFT),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.6),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False),
    **dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"), 7.2),
}
_MARK = {"markersize": 4.6, "markeredgecolor": _CARD, "markeredgewidth": 0.8}
#: In inches. One size for all, so that lettering is of one size; style sheets enlarge it in narrow columns.
_WIDTH, _HEIGHT = 3.4, 2.1


@dataclass(frozen=True)
class Chart:
    """A drawing, its legend as ``(colour, glyph, name)``, the text below, and a table of its numbers."""

    title: str
    svg: Markup
    keys: Sequence[tuple[int, str, str]] = ()
    note: str = ""
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Line:
    """Values ``y`` of one name at ``x``, with half the length of their intervals; ``colour`` is also its marker."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float | None] = ()
    colour: int = 0


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_name: str,
    y_name: str,
    *,
    write: Callable[[float], str] = "{:.4g}".format,
    x_labels: Mapping[float, str] | None = None,
    x_scale: str = "linear",
    joined: bool = True,
    from_zero: str = "",
    note: str = "",
    numbers: bool = True,
) -> Chart:
    """Draw lines, or dots where they are not ``joined``, with their intervals.

    ``write`` formats the table of ``numbers``; ``x_labels`` are ticks by place; ``x_scale`` is "linear", or "log1p" for
    sizes that begin at 0; ``from_zero`` names the axis that begins at 0.
    """

    def draw(axes: Any) -> None:
        if x_scale == "log1p":
            axes.set_xscale("function", functions=(np.log1p, np.expm1))
        width = 0.0 if x_labels is None or x_scale != "linear" or len(lines) < 2 else 0.05
        for number, line in enumerate(lines):
            # intervals at one place stand beside each other
            places = [x + width * (number - (len(lines) - 1) / 2) for x in line.x]
            _plot(axes, line, places, joined)
        axes.set(xlabel=x_name, ylabel=y_name)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(_ticks())
        if x_labels is not None:
            axes.set_xticks(list(x_labels), list(x_labels.values()))
        else:
            integer = all(float(x).is_integer() for line in lines for x in line.x)
            axes.xaxis.set_major_locator(_ticks(integer))
        if from_zero:
            axes.margins(0.08)
            axes.autoscale_view()
            axes.set(**{f"{from_zero}lim": (0, None)})

    places = sorted({x for line in lines for x in line.x})
    values = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    rows = [
        [(x_labels or {}).get(x) or f"{x:.4g}", *(write(row[x]) if x in row else "\N{EN DASH}" for row in values)]
        for x in places
    ]
    svg = _svg(draw, f"{title}: {y_name} against {x_name}, for {', '.join(line.name for line in lines)}.")
    table = ([x_name, *(line.name for line in lines)], rows) if numbers else ((), ())
    return Chart(title, svg, _keys(lines), note, *table)


def interval_chart(title: str, lines: Sequence[Line], names: Sequence[str], x_name: str, note: str) -> Chart:
    """Draw values with intervals from left to right, a row for each of ``names``, and a vertical line at 0."""

    def draw(axes: Any) -> None:
        axes.axvline(0, color=_SOFT, linewidth=0.8)
        for number, line in enumerate(lines):
            rows = [row + 0.6 * ((number + 0.5) / len(lines) - 0.5) for row in range(len(names))]
            options = {"color": _colour(line.colour), "linewidth": 1.4}
            for row, value, half in zip(rows, line.y, line.spread, strict=False):
                if half is not None:
                    axes.plot([value - half, value + half], [row, row], **options)
            axes.plot(line.y, rows, _marker(line.colour), color=options["color"], **_MARK)
        axes.set(xlabel=x_name, ylim=(len(names) - 0.5, -0.5))
        axes.set_yticks(range(len(names)), names)
        axes.xaxis.set_major_locator(_ticks())
        axes.grid(axis="y", visible=False)

    named = ", ".join(line.name for line in lines)
    height = max(_HEIGHT, 0.16 * len(names) * len(lines) + 0.6)
    return Chart(title, _svg(draw, f"{title}, {x_name}, for {named}.", height), _keys(lines), note)


def histograms(title: str, sets: Mapping[str, tuple[Sequence[float], int]], highest: float, x_name: str) -> Chart:
    """Draw a histogram for each name, below one another on one axis that ends at ``highest``, with a mark at its mean.

    ``sets`` holds by name the values, in [0, highest], and the number of the colour.
    """
    edges = np.linspace(0, highest, 31)
    counts = {name: np.histogram(np.clip(values, 0, highest), edges)[0] for name, (values, _) in sets.items()}
    means = {name: sum(values) / len(values) for name, (values, _) in sets.items()}

    def draw(axes: Any) -> None:
        for row, (name, (_, colour)) in enumerate(sets.items()):
            # shares differ by orders of magnitude between stages: each has a height of its own
            heights = row - 0.8 * counts[name] / counts[name].max()
            axes.stairs(heights, edges, baseline=row, fill=True, color=_colour(colour), alpha=0.3)
            axes.stairs(heights, edges, baseline=row, color=_colour(colour), linewidth=1)
            axes.plot([means[name]], [row], marker="^", color=_colour(colour), **_MARK, clip_on=False)
        axes.set(xlabel=x_name, xlim=(0, highest), ylim=(len(sets) - 0.85, -0.95))
        axes.set_yticks([row - 0.25 for row in range(len(sets))], [f"{name}\nmean {means[name]:.2f}" for name in sets])
        axes.xaxis.set_major_locator(_ticks())
        axes.grid(axis="y", visible=False)

    note = "Share of images at each entropy, each row to its own height; triangles are means."
    words = ", ".join(f"{name} (mean {mean:.3g})" for name, mean in means.items())
    return Chart(title, _svg(draw, f"{title}: histograms of {words}, {x_name}."), note=note)


def _plot(axes: Any, line: Line, places: Sequence[float], joined: bool) -> None:
    dashes = ("-", (0, (5, 2)), (0, (1, 1.5)))[line.colour // COLOURS % 3] if joined else ""
    colour, mark = _colour(line.colour), _marker(line.colour)
    for x, y, half in zip(places, line.y, line.spread, strict=False):
        if half is not None:
            axes.plot([x, x], [y - half, y + half], color=colour, linewidth=1.2)
    crowd = {"markersize": 3, "markeredgewidth": 0, "alpha": 0.6} if len(places) > 60 else {}
    axes.plot(places, line.y, linestyle=dashes, marker=mark, color=colour, linewidth=1.5, **{**_MARK, **crowd})


def _ticks(integer: bool = False) -> MaxNLocator:
    return MaxNLocator(6, steps=[1, 2, 5, 10], integer=integer)


def _keys(lines: Sequence[Line]) -> list[tuple[int, str, str]]:
    return [(line.colour % COLOURS, _GLYPHS[line.colour % len(_GLYPHS)], line.name) for line in lines if len(lines) > 1]


def _colour(number: int) -> str:
    return _THEME[f"c{number % COLOURS}"]


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]


def _svg(draw: Callable[[Any], None], label: str, height: float = _HEIGHT) -> Markup:
    """Return what ``draw`` puts on matplotlib axes as an element of the page, read out as ``label``."""
    file = io.StringIO()
    # the caller's style sheets and rcParams are not the page's
    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": label}]):
        warnings.filterwarnings("ignore", "Glyph")  # the reader's fonts have it, or the browser finds another
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    root = ElementTree.fromstring(_NOT_XML.sub("", file.getvalue()))
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", file.getvalue()))
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]  # HTML knows SVG without its namespace
        attributes = {key.split("}")[-1]: value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        if "style" in attributes:
            rules = [rule for rule in attributes["style"].split("; ") if not rule.startswith("font")]
            attributes["style"] = _COLOUR.sub(lambda found: f"var(--{_NAMES[found[0]]})", "; ".join(rules))
        element.attrib.clear()
        element.attrib.update(attributes)
        element.tail = None
        if element.tag != "text":
            element.text = None
    for part in root.findall("metadata") + root.findall("defs"):
        if part.find("style") is not None or part.tag == "metadata":
            root.remove(part)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": _NOT_XML.sub("", label)}
    return Markup(ElementTree.tostring(root, encoding="unicode"))
