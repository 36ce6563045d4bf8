"""What the diagnostics found, as figures: entropies, domain gap, distances, Jacobian norms.

Results are known by what they hold, so that this package does not import the diagnostics, which build on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.reporting.charts import Axis, Series, chart, ticks_between
from entprop_wrap.robustness.reporting.markup import Markup, join, table, tag

__all__ = ["findings"]

_BINS = 24


@runtime_checkable
class Entropies(Protocol):
    """As ``diagnostics.entropy_stages`` returns."""

    values: Mapping[str, Any]
    stages: Mapping[str, Any]
    classes: int


@runtime_checkable
class Gap(Protocol):
    """As ``diagnostics.domain_gap`` returns."""

    layers: Any


@runtime_checkable
class Jacobian(Protocol):
    """As ``diagnostics.input_jacobian`` returns."""

    frobenius_mean: Any
    spectral_mean: Any


@runtime_checkable
class Distances(Protocol):
    """As ``diagnostics.feature_distance`` returns."""

    distances: Mapping[str, float]
    floor: float


@runtime_checkable
class OutOfDistribution(Protocol):
    """As ``diagnostics.selection_ood`` returns."""

    scores: Mapping[str, Any]
    ood: int


@runtime_checkable
class Picture(Protocol):
    """As ``diagnostics.feature_picture`` returns."""

    points: Mapping[str, Any]
    explained: tuple[float, float]


def findings(diagnostics: Mapping[str, object]) -> Markup:
    """Return a figure or a table for each result, under the title that it comes by.

    Raises:
        ConfigurationError: A result of another type.
    """
    figures, tables = [], []
    jacobians: dict[str, Jacobian] = {}
    for title, found in diagnostics.items():
        if isinstance(found, Entropies):
            figures.append(_entropies(title, found))
        elif isinstance(found, Gap):
            figures += _gap(title, found)
        elif isinstance(found, Picture):
            figures.append(_picture(title, found))
        elif isinstance(found, Jacobian):
            jacobians[title] = found
        elif isinstance(found, Distances):
            rows = [[name, f"{value:.4g}"] for name, value in found.distances.items()]
            rows.append(["two halves of the clean images", f"{found.floor:.4g}"])
            caption = f"{title}: Fréchet distance of features to clean images"
            tables.append(table(caption, ["", "distance"], rows, kind="plain short"))
        elif isinstance(found, OutOfDistribution):
            tables.append(_ood(title, found))
        else:
            raise ConfigurationError(
                f"diagnostics[{title!r}] must be a result of entprop_wrap.diagnostics, found {type(found).__name__}."
            )
    if jacobians:
        rows = [[name, _mean(one.frobenius_mean), _mean(one.spectral_mean)] for name, one in jacobians.items()]
        head = ["", "Frobenius norm", "spectral norm"]
        tables.append(table("Input Jacobian, mean over images", head, rows, kind="plain short"))
    return join([tag("div", *figures, class_="charts") if figures else "", *tables])


def _entropies(title: str, found: Entropies) -> Markup:
    most = math.log(found.classes)
    width = most / _BINS
    series = []
    for colour, (stage, values) in enumerate(found.values.items()):
        counts = [0] * _BINS
        for value in values:
            counts[min(int(value / width), _BINS - 1)] += 1
        shares = [count / len(values) for count in counts]
        # The last corner closes the histogram.
        edges = [(number * width, share) for number, share in enumerate(shares)] + [(most, 0.0)]
        series.append(Series(f"{stage}, mean {_mean(found.stages[stage])}", edges, style="steps", colour=colour))
    x = Axis(f"entropy, nats (at most log {found.classes} = {most:.2f})", ticks_between(0, most), ends=(0, most))
    highest = max(share for one in series for _, share in one.points)
    y = Axis("images, %", ticks_between(0, highest), lambda value: f"{100 * value:g}")
    rows = [[stage, _mean(value)] for stage, value in found.stages.items()]
    means = table(f"{title}: mean entropy, nats", ["stage", "mean"], rows)
    drawn = chart(title, series, x, y, numbers=False)
    return tag("div", drawn, tag("details", tag("summary", "Numbers"), means))


def _gap(title: str, found: Gap) -> list[Markup]:
    """Two drawings over the layers in their order: of parameters, and of statistics where norms keep them."""
    layers = list(found.layers)
    several = len({layer.auxiliary for layer in layers}) > 1
    names = [f"{layer.layer}, {layer.auxiliary}" if several else layer.layer for layer in layers]
    x = Axis(
        "norm layer, from input to output",
        range(1, len(layers) + 1),
        "{:g}".format,
        lambda number: names[int(number) - 1],
    )
    keys = dict.fromkeys(key for layer in layers for key in layer.parameters)
    series = [
        Series(
            key,
            [(n, layer.parameters[key]) for n, layer in enumerate(layers, 1) if key in layer.parameters],
            colour=colour,
        )
        for colour, key in enumerate(keys)
    ]
    statistics = [(n, layer.statistics) for n, layer in enumerate(layers, 1) if layer.statistics is not None]
    drawn = []
    if series:
        drawn.append(_over_layers(f"{title}: parameters", series, x, "relative distance, 0 to 2"))
    if statistics:
        drawn.append(_over_layers(f"{title}: statistics", [Series("statistics", statistics)], x, "divergence, nats"))
    return drawn


def _over_layers(title: str, series: list[Series], x: Axis, name: str) -> Markup:
    highest = max(b for one in series for _, b in one.points)
    y = Axis(name, ticks_between(0, highest), "{:g}".format, "{:.4g}".format)
    return chart(title, series, x, y, note="Between the main norm and its auxiliary copy.")


def _picture(title: str, found: Picture) -> Markup:
    series = [
        Series(name, list(points), style="dots", colour=colour)
        for colour, (name, points) in enumerate(found.points.items())
    ]
    across, up = ([point[axis] for one in series for point in one.points] for axis in (0, 1))
    x, y = (
        Axis(f"component {number}, {100 * share:.0f} % of variance", ticks_between(min(values), max(values)))
        for number, share, values in zip((1, 2), found.explained, (across, up), strict=True)
    )
    return chart(title, series, x, y, numbers=False)


def _ood(title: str, found: OutOfDistribution) -> Markup:
    groups = list(next(iter(found.scores.values())).auroc)
    rows = [
        [name.replace("_", " "), *(_mean(one.auroc[group]) for group in groups), *(_mean(one.fpr95[g]) for g in groups)]
        for name, one in found.scores.items()
    ]
    head = ["score", *(f"AUROC, {group}" for group in groups), *(f"FPR at 95 %, {group}" for group in groups)]
    return table(f"{title}: how well a score tells images of another distribution", head, rows)


def _mean(interval: Any) -> str:
    text = f"{interval.value:.4g}"
    return text if interval.low is None else f"{text} [{interval.low:.4g}, {interval.high:.4g}]"
