"""Pictures of the diagnostics, with matplotlib (the ``plots`` extra)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from entprop_wrap.diagnostics.domain_gap import DomainGap
from entprop_wrap.diagnostics.entropy_stages import EntropyStages
from entprop_wrap.diagnostics.feature_distance import FeaturePicture
from entprop_wrap.diagnostics.input_jacobian import InputJacobian
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.utils.options import check_mapping, shown

__all__ = ["plot_entropies", "plot_features", "plot_gap", "plot_jacobians"]


def plot_entropies(result: EntropyStages, axes: Any = None) -> Any:
    """Draw a histogram of entropies (nats) for each stage; returns the matplotlib axes."""
    axes = _axes(axes, result, EntropyStages)
    for stage, values in result.values.items():
        label = f"{stage}: {result.stages[stage].value:.2f}"
        top = math.log(result.classes)
        axes.hist(values, bins=30, range=(0, top), density=True, histtype="step", linewidth=1.5, label=label)
    axes.set(xlabel="entropy (nats)", ylabel="density", title="Entropy by stage (mean)")
    axes.legend()
    return axes


def plot_gap(result: DomainGap, axes: Any = None) -> Any:
    """Draw the distance between main and auxiliary norms by layer; returns the matplotlib axes.

    Parameters are on the left axis, as relative distances in [0, 2]; running statistics on the right, in nats.
    """
    axes = _axes(axes, result, DomainGap)
    many = len({gap.auxiliary for gap in result.layers}) > 1
    names = list(dict.fromkeys(gap.layer for gap in result.layers))
    lines: dict[str, dict[int, float]] = defaultdict(dict)
    for gap in result.layers:
        for name, number in {**gap.parameters, "statistics": gap.statistics}.items():
            if number is not None:
                lines[f"{name}, {gap.auxiliary}" if many else name][names.index(gap.layer)] = number
    right: Any = None
    handles = []
    for index, (name, line) in enumerate(lines.items()):
        statistics = name.startswith("statistics")
        if statistics and right is None:
            right = axes.twinx()
            right.set_ylabel("divergence of statistics (nats)")
        side, style = (right, "--") if statistics else (axes, "-")
        handles += side.plot([*line], [*line.values()], style, marker=".", color=f"C{index}", label=name)
    axes.set(xlabel="norm layer", ylabel="relative distance of parameters", title="Gap between the domains")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
    axes.legend(handles=handles)
    return axes


def plot_jacobians(results: Mapping[str, InputJacobian], axes: Any = None) -> Any:
    """Draw the Frobenius norms of the images as a box for each model, by name; returns the matplotlib axes."""
    found = check_mapping("results", results, "results of input_jacobian()", '{"EntProp": result}')
    if not found:
        raise ConfigurationError("results must be one or more results of input_jacobian(), found none.")
    for result in found.values():
        axes = _axes(axes, result, InputJacobian)
    axes.boxplot([result.frobenius for result in results.values()], showmeans=True)
    axes.set_xticks(range(1, len(results) + 1), list(results))
    axes.set(ylabel="|d logits / d pixels|", title="Frobenius norm of the input Jacobian")
    return axes


def plot_features(result: FeaturePicture, axes: Any = None) -> Any:
    """Draw the features of both domains in one plane, coloured by class; returns the matplotlib axes."""
    axes = _axes(axes, result, FeaturePicture)
    highest = max(max(labels) for labels in result.labels.values())
    for marker, (name, points) in zip("ox", result.points.items(), strict=False):
        x, y = zip(*points, strict=True)
        options = {"c": result.labels[name], "cmap": "tab20", "vmin": 0, "vmax": max(highest, 1)}
        axes.scatter(x, y, marker=marker, s=14, alpha=0.7, label=name, **options)
    first, second = (f"{100 * share:.0f} % of the variance" for share in result.explained)
    axes.set(xlabel=f"component 1, {first}", ylabel=f"component 2, {second}", title="Features, colour by class")
    axes.legend()
    return axes


def _axes(axes: Any, result: Any, kind: type) -> Any:
    if not isinstance(result, kind):
        raise ConfigurationError(f"Expected a result of the type {kind.__name__}, found {shown(result)}.")
    try:
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib, which is missing: pip install "entprop-wrap[plots]".') from error
    if axes is not None:
        if not isinstance(axes, Axes):
            raise ConfigurationError(f"axes must be matplotlib's Axes or None, found {shown(axes)}.")
        return axes
    # Not through pyplot, which would keep every figure alive and pick a window system.
    return Figure(layout="constrained").subplots()
