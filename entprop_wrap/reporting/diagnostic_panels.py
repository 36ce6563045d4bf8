"""Results of ``entprop_wrap.diagnostics`` as panels: a picture, its numbers, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from entprop_wrap.diagnostics import DomainGap, EntropyStages, InputJacobian
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.reporting import charts
from entprop_wrap.reporting.charts import Chart, Line

#: A stage has one colour in all pictures, none of which the first three models have.
_STAGES = {"clean": 4, "mixed": 6, "selected": 3, "perturbed": 7}
#: Distances below which copies act nearly as their norms; a judgement.
_SMALL = 0.02


@dataclass(frozen=True)
class Panel:
    """One diagnostic: paragraphs on how to read it, charts, tables ``(caption, head, rows)``, and warnings."""

    title: str
    reading: Sequence[str]
    charts: Sequence[Chart] = ()
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    warnings: Sequence[str] = ()


def panels(diagnostics: Mapping[str, Any]) -> list[Panel]:
    """Return a panel for each result, under the title that it comes by; Jacobians share one.

    Raises:
        ConfigurationError: A result of another type.
    """
    found = []
    jacobians = {title: one for title, one in diagnostics.items() if isinstance(one, InputJacobian)}
    for title, result in diagnostics.items():
        if type(result) in _MAKERS:
            found.append(_MAKERS[type(result)](title, result))
        elif title not in jacobians:
            raise ConfigurationError(
                f"diagnostics[{title!r}] must be a result of entropy_stages, domain_gap or input_jacobian, found "
                f"{type(result).__name__}."
            )
    return found + ([_jacobians(jacobians)] if jacobians else [])


def _entropies(title: str, found: EntropyStages) -> Panel:
    most = math.log(found.classes)
    sets = {stage: (values, _STAGES.get(stage, 5)) for stage, values in found.values.items()}
    head, *rows = found.rows()
    flat = " and ".join(", ".join(found.notes).rsplit(", ", 1))
    reading = [
        f"How uncertain the trained model is of the images, from 0 nats (certain) to log {found.classes} = {most:.2f} "
        "(a guess), at each stage on their way into the auxiliary norms: as they are, mixed, selected for their "
        "entropy, and perturbed. The method wants each stage more uncertain than the one before.",
        "Here every stage is." if not flat else f"Here {flat} images are not: see below.",
    ]
    return Panel(
        title,
        reading,
        [charts.histograms("Entropy by stage", sets, most, "entropy, nats")],
        [(f"{title}: mean entropy", head, rows)],
        list(found.notes.values()),
    )


def _gap(title: str, found: DomainGap) -> Panel:
    layers = found.layers
    numbers = [one.parameters | ({} if one.statistics is None else {"statistics": one.statistics}) for one in layers]
    keys = dict.fromkeys(key for row in numbers for key in row)
    if not keys:
        return Panel(title, ["Both domains share all tensors of the norm layers: there is no gap between them."])
    lines = []
    for colour, key in enumerate(keys):
        there = {place: row[key] for place, row in enumerate(numbers, 1) if key in row}
        lines.append(Line(key, list(there), list(there.values()), colour=colour))
    groups = {
        ("Parameters", "relative distance, 0 to 2"): [line for line in lines if line.name != "statistics"],
        ("Running statistics", "divergence, nats"): [line for line in lines if line.name == "statistics"],
    }
    drawn = [
        charts.line_chart(name, group, "norm layer, from input to output", unit, numbers=False)
        for (name, unit), group in groups.items()
        if group
    ]
    head, *rows = found.rows()
    largest = {line.name: max(zip(line.y, line.x, strict=True)) for line in lines}
    words = [f"{key} {value:.2g} in layer {layers[int(at) - 1].layer!r}" for key, (value, at) in largest.items()]
    reading = [
        "How far the auxiliary norms have moved from the main ones. 0 is equal, as right after wrap(). A gap says that "
        "the two domains look different to the model, which is what a second set of norms is for.",
        f"Largest here: {'; '.join(words)}.",
    ]
    if max(value for value, _ in largest.values()) < _SMALL:
        reading.append("All of it is small: few steps or a small learning rate, as in fine-tuning, move copies little.")
    return Panel(title, reading, drawn, [(f"{title}: distance by layer", head, rows)])


def _jacobians(found: Mapping[str, InputJacobian]) -> Panel:
    rows = [[title, str(one.frobenius_mean), str(one.spectral_mean)] for title, one in found.items()]
    reading = [
        "How strongly logits move with pixels, as the norm of their Jacobian: smaller is smoother, so small changes of "
        "an image change less. Logits of a larger scale have larger norms: compare models of similar confidence."
    ]
    head = ["", "Frobenius norm", "spectral norm"]
    return Panel("Input Jacobian", reading, tables=[("Input Jacobian, mean over images", head, rows)])


_MAKERS: dict[type, Any] = {EntropyStages: _entropies, DomainGap: _gap}
