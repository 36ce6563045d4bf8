"""``report``: results as one HTML page, filled into the template ``report.html``."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from torch import Tensor

from entprop_wrap.data.pixel_space import PixelSpace, space_of
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.reporting.diagnostic_panels import panels
from entprop_wrap.reporting.formatting import versions
from entprop_wrap.reporting.gallery import gallery_of
from entprop_wrap.reporting.heat_maps import heat_maps
from entprop_wrap.reporting.study import Results, Study, cards, lower_is_better, score_rows, study_of, verdict
from entprop_wrap.reporting.study_charts import study_charts
from entprop_wrap.utils.files import replacing
from entprop_wrap.utils.options import check_mapping, check_number, check_text, is_number, shown


def report(
    results: Results,
    path: str | Path,
    *,
    title: str = "Robustness",
    images: Tensor | None = None,
    pixel_space: PixelSpace | None = None,
    costs: Mapping[str, float] | None = None,
    cost_name: str = "passes per step",
    curves: Mapping[str, Mapping[float, float]] | None = None,
    diagnostics: Mapping[str, object] | None = None,
    warnings: Mapping[str, str] | None = None,
    command: str | None = None,
    facts: Mapping[str, object] | None = None,
) -> Path:
    """Write results as one HTML file that needs no other file and no network.

        report({"vanilla": [v0, v1, v2], "EntProp": [e0, e1, e2]}, "report.html", costs={"vanilla": 1, "EntProp": 1.2})

    Args:
        results: The result of one model; or by name a result, or a list with one for each seed. The first model is the
            baseline of all differences. All must be of one protocol, and results at the same place belong together.
        path: File to write; an existing one is replaced, whole or not at all. Folders are made.
        title: Heading of the page.
        images: Examples ``(N, 3, H, W)`` in ``pixel_space``, shown under each corruption.
        pixel_space: Normalisation of ``images``; None: none.
        costs: Cost of training each model, as a number: passes, seconds, ...
        cost_name: Name of that number.
        curves: By model, what :func:`~entprop_wrap.robustness.accuracy_against_epsilon` returns.
        diagnostics: Results of ``entropy_stages``, ``domain_gap`` and ``input_jacobian``, by title.
        warnings: Texts by name, such as ``Monitor.warnings``, shown above the diagnostics.
        command: Command line that led here.
        facts: More to be told, by name: dataset, commit, hardware, ...

    Returns:
        The path.

    Raises:
        ConfigurationError: Results of different protocols or of other types; costs or curves of unknown models; a
            diagnostic of another type; an option of another type; a path that cannot be written, or is not .html.
        ImageError: Examples of a wrong type or shape, or too small.
        PixelRangeError: Examples outside ``pixel_space``.
    """
    if not isinstance(path, (str, Path)) or Path(path).suffix.lower() not in (".html", ".htm"):
        raise ConfigurationError(
            f"path must be a file such as 'report.html', found {shown(path)}. For Markdown use model_card()."
        )
    path = Path(path)
    title, cost_name = check_text("title", title), check_text("cost_name", cost_name)
    command = None if command is None else check_text("command", command)
    facts = check_mapping("facts", facts, "texts", "facts={'Data': 'pets'}")
    diagnostics = check_mapping("diagnostics", diagnostics, "results", "diagnostics={'Gap': domain_gap(model)}")
    warnings = check_mapping("warnings", warnings, "texts", "warnings=monitor.warnings")
    study = study_of(results)
    costs = _of_models(study, "costs", costs, "numbers", "costs={'EntProp': 1.2}")
    for name, cost in costs.items():
        check_number(f"costs[{name!r}]", cost, lambda number: True, "that is finite")
    curves = _of_models(study, "curves", curves, "curves", "curves={'EntProp': accuracy_against_epsilon(...)}")
    for name, curve in curves.items():
        points = curve.items() if isinstance(curve, Mapping) else ()
        if not points or not all(is_number(e) and e >= 0 and is_number(one) and 0 <= one <= 1 for e, one in points):
            raise ConfigurationError(
                f"curves[{name!r}] must be accuracies in [0, 1] by epsilon, found {shown(curve)}. Write "
                "accuracy_against_epsilon(...)."
            )
    space = space_of(pixel_space)
    gallery, shown_at = ([], "") if images is None else gallery_of(images, space, study.first)
    now = datetime.datetime.now(datetime.timezone.utc)
    page = _template().render(
        title=title,
        study=study,
        verdict=verdict(study),
        cards=cards(study),
        columns=[{"name": name[:1].upper() + name[1:], "lower": lower_is_better(name)} for name in study.first.summary],
        rows=score_rows(study, costs),
        cost_name=cost_name if costs else None,
        charts=study_charts(study, costs, cost_name, curves),
        maps=heat_maps(study),
        gallery=gallery,
        shown_at=shown_at,
        panels=panels(diagnostics),
        warnings=warnings,
        command=command,
        facts={**facts, "Written": f"{now:%Y-%m-%d %H:%M} UTC", **versions()},
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(page, encoding="utf-8")
    except (OSError, ValueError) as error:  # a path that no file can have, or text that no file can hold
        raise ConfigurationError(f"{str(path)!r} cannot be written: {error}.") from error
    return path


def _of_models(study: Study, argument: str, given: Any, what: str, example: str) -> dict[str, Any]:
    found = check_mapping(argument, given, what, example)
    if unknown := [name for name in found if name not in study.results]:
        known = ", ".join(map(repr, study.results))
        raise ConfigurationError(f"{argument} names {unknown[0]!r}, which has no result. Results are of {known}.")
    return found


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = _breakable
    environment.globals["spans"] = _spans
    return environment.from_string(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))


def _breakable(name: str) -> Markup:
    """Return a name that may break after its separators, and nowhere else."""
    return Markup("<wbr>").join(Markup(escape(part)) for part in re.split(r"(?<=[_/.\-])", name))


def _spans(number: int) -> list[str]:
    """Return the widths of a number of boxes, so that every row of two or three is full."""
    if number % 3 == 0:
        return ["third"] * number
    if number % 2 == 0 or number == 1:
        return ["half" if number > 1 else "whole"] * number
    return ["half"] * (number - 3) + ["third"] * 3
