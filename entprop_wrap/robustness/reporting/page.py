"""The page: which sections there are, and their order."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.perturbation import PixelSpace
from entprop_wrap.robustness.pixels import space_of
from entprop_wrap.robustness.reporting import figures, tables
from entprop_wrap.robustness.reporting.files import write_atomically
from entprop_wrap.robustness.reporting.findings import findings
from entprop_wrap.robustness.reporting.markup import Markup, join, tag
from entprop_wrap.robustness.reporting.pictures import strips
from entprop_wrap.robustness.reporting.provenance import protocol, provenance
from entprop_wrap.robustness.reporting.style import STYLE
from entprop_wrap.robustness.reporting.subjects import Results, Studied, study

__all__ = ["report"]


def report(
    results: Results,
    path: str | os.PathLike[str],
    *,
    title: str = "Robustness",
    images: Tensor | None = None,
    pixel_space: PixelSpace | None = None,
    costs: Mapping[str, float] | None = None,
    cost_name: str = "passes per step",
    curves: Mapping[str, Mapping[float, float]] | None = None,
    diagnostics: Mapping[str, object] | None = None,
    command: str | None = None,
    facts: Mapping[str, str] | None = None,
    confidence: float = 0.95,
) -> Path:
    """Write results as one HTML file, which needs no other file and no network; needs no other package either.

        report({"vanilla": [v0, v1, v2], "EntProp": [e0, e1, e2]}, "report.html", costs={"vanilla": 1, "EntProp": 1.2})

    Args:
        results: Of one model; or by name a result, or a list with one for each seed. The first model is what
            differences are taken to. All must be of one protocol, and results at the same place belong together.
        path: File to write; one that is there is replaced, whole or not at all. Folders are made.
        title: Of the page.
        images: Examples ``(N, 3, H, W)`` in ``pixel_space``, to be shown under each corruption.
        pixel_space: What ``images`` are normalised with; None: nothing.
        costs: What training each model has cost, as a number: passes, seconds, ...
        cost_name: What that number is.
        curves: By model, what :func:`~entprop_wrap.robustness.accuracy_against_epsilon` returns.
        diagnostics: Results of ``entprop_wrap.diagnostics``, by the titles that they shall have.
        command: Command line that led here, to be shown.
        facts: More to be told, by name: data set, commit, hardware, ...
        confidence: Of intervals over seeds, in (0, 1).

    Returns:
        The path.

    Raises:
        ConfigurationError: Results of different protocols or of other types; costs or curves of unknown models; a
            diagnostic of another type; a path that is a folder, or does not end in .html.
        ImageError: Examples of a wrong type or shape, or too small.
        PixelRangeError: Examples that do not lie in ``pixel_space``.
    """
    _check_path(path)
    studied = study(results, confidence)
    for name, value in (("costs", costs), ("curves", curves), ("diagnostics", diagnostics), ("facts", facts)):
        if value is not None and not isinstance(value, Mapping):
            raise ConfigurationError(f"{name} must be a dict, found {type(value).__name__}.")
    if costs:
        figures.check_costs(studied, costs)
    if curves:
        figures.check_curves(studied, curves)

    sections = [_scores(studied, costs, cost_name)]
    if len(studied.names) > 1:
        sections.append(_changes(studied))
    charts = [figures.against_severity(studied)]
    if costs and len(studied.names) > 1:
        charts.append(figures.against_cost(studied, costs, cost_name))
    if curves:
        charts.append(figures.against_epsilon(studied, curves))
    sections.append(_section("Accuracy under stress", "", tag("div", *charts, class_="charts")))
    over = f", mean over {studied.comparison.seeds} results" if studied.comparison.seeds > 1 else ""
    said = f"Accuracy in percent{over}. All maps share one scale."
    sections.append(_section("By corruption and severity", said, tables.heat_maps(studied)))
    if images is not None:
        shown, note = strips(images, space_of(pixel_space), studied.first.corrupted, studied.first.seed)
        sections.append(_section("What the corruptions look like", note, shown))
    if diagnostics:
        sections.append(_section("Diagnostics", "", findings(diagnostics)))
    sections.append(_section("Protocol and provenance", "", join([protocol(studied), provenance(command, facts)])))
    return write_atomically(path, _page(title, studied, sections))


def _check_path(path: str | os.PathLike[str]) -> None:
    if Path(path).is_dir():
        raise ConfigurationError(f"{path} is a folder. Write the file, {str(Path(path) / 'report.html')!r} say.")
    if Path(path).suffix.lower() not in (".html", ".htm"):
        more = "; for a section in Markdown, model_card()" if Path(path).suffix.lower() == ".md" else ""
        raise ConfigurationError(
            f"report() writes HTML, found the path {str(path)!r}. Write {str(Path(path).with_suffix('.html'))!r}{more}."
        )


def _scores(studied: Studied, costs: Mapping[str, float] | None, cost_name: str) -> Markup:
    said = "In percent; higher is better, but for calibration errors."
    if len(studied.names) > 1:
        said += " The best of each column is bold."
    return _section("Scores", said, tables.summary(studied, costs, cost_name))


def _changes(studied: Studied) -> Markup:
    seeds = studied.comparison.seeds
    if seeds < 2:
        said = "In percentage points. One result for each model: a difference may be chance."
        return _section("Differences", said, tables.differences(studied))
    said = (
        f"In percentage points, paired over {seeds} results, with {100 * studied.confidence:g} % t-intervals. An "
        "interval that holds 0 is no evidence of a difference."
    )
    return _section("Differences", said, join([tables.differences(studied), figures.intervals(studied)]))


def _section(title: str, said: str, *content: Markup) -> Markup:
    return tag("section", tag("h2", title), tag("p", said) if said else "", *content)


def _page(title: str, studied: Studied, sections: list[Markup]) -> str:
    # Nothing outside of the page can be asked for, whatever is in it.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = tag(
        "head",
        Markup('<meta charset="utf-8"/>'),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content="entprop-wrap"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    header = tag("header", tag("h1", title), tag("p", f"{studied.first.protocol}."))
    body = tag("body", tag("main", header, tables.tiles(studied), *sections))
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"
