"""Runs of several settings, compared with the first of them: records, a Markdown table, and figures."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sweep import Setting, Sweep

from entprop_wrap.robustness import RobustnessResult, compare

NOTE = (
    "Mean and 95 % t-interval over seeds, in percent; differences to {baseline} are paired by seed, in points, bold "
    "where the interval leaves out 0, and not corrected for their number. RA: {protocol}. "
    "Passes: forward and backward of a whole batch, per step. Training: processor time of the whole training, one "
    "thread, over that of {baseline} with the same seed; median over seeds."
)


def records(sweep: Sweep, settings: Mapping[str, Setting], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Return one record per setting that has a seed in common with the first one, the baseline.

    Scores are dicts of "mean" and "half_width" (of the 95 % interval, None for one seed), in [0, 1].
    """
    baseline, *_ = settings.values()
    found = {name: _results(sweep, setting, seeds) for name, setting in settings.items()}
    reference = next(iter(found.values()))
    lines = []
    for name, setting in settings.items():
        common = [seed for seed in found[name] if seed in reference]
        if not common:
            continue
        pair = {"baseline": [reference[seed] for seed in common], name: [found[name][seed] for seed in common]}
        both = compare(pair)
        done = [sweep.training(setting, seed) for seed in common]
        ratios = [_seconds(sweep, setting, seed) / _seconds(sweep, baseline, seed) for seed in common]
        lines.append(
            {
                "name": name,
                "seeds": common,
                "scores": {key: vars(value) for key, value in both.scores[name].items()},
                "differences": {key: vars(value) for key, value in both.differences[name].items()}
                if setting is not baseline
                else None,
                "passes": statistics.fmean(row["passes"] for row in done),
                "training": statistics.median(ratios),
                "protocol": both.protocol,
            }
        )
    return lines


def markdown(
    lines: Sequence[Mapping[str, Any]],
    first: str = "method",
    extra: Mapping[str, Mapping[str, str]] | None = None,
    baseline: str | None = None,
) -> str:
    """Return records as a table.

    Args:
        lines: The records.
        first: Heading of the column of names.
        extra: Further columns, by heading and by the name of the record.
        baseline: What the note calls that which differences are taken to; None: the name of the first record.
    """
    if not lines:
        return "Nothing is finished yet."
    extra, keys = extra or {}, list(lines[0]["scores"])
    head = [first, "seeds", *keys, *(f"{key}, difference" for key in keys), "passes", "training", *extra]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for line in lines:
        changes = line["differences"]
        rows.append(
            [
                line["name"],
                str(len(line["seeds"])),
                *(_cell(line["scores"][key]) for key in keys),
                *("" if changes is None else _cell(changes[key], change=True) for key in keys),
                f"{line['passes']:.2f}",
                f"{line['training']:.2f}",
                *(column.get(line["name"], "") for column in extra.values()),
            ]
        )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    note = NOTE.format(baseline=baseline or f'"{lines[0]["name"]}"', protocol=lines[0]["protocol"])
    return f"{table}\n\n{note}"


def plot_cost(lines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw Hscore against the time that training took, one point per record."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(8.5, 5), layout="constrained")
    for index, line in enumerate(lines):
        style = {"fmt": "os^Dv"[index // 10 % 5], "color": f"C{index % 10}", "capsize": 2, "markersize": 5}
        mean, half_width = _percent(line["scores"]["Hscore"])
        axis.errorbar(line["training"], mean, half_width, label=line["name"], **style)
    axis.axhline(_percent(lines[0]["scores"]["Hscore"])[0], color="grey", linewidth=0.8, linestyle=":")
    axis.set(xscale="log", xlabel="time of training, vanilla = 1", ylabel="Hscore, %", title=title)
    most = max(line["training"] for line in lines)
    ticks = [tick for tick in (1, 2, 4, 8, 16, 32, 64) if tick < 2 * most]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    _save(figure, path)


def plot_scores(
    series: Mapping[str, Sequence[Mapping[str, float | None]]],
    places: Sequence[Any],
    path: Path,
    title: str,
    label: str,
) -> None:
    """Draw scores over ``places``: a curve where these are numbers, points where they are names.

    Args:
        series: Scores, as records have them, by what the legend calls them; one per place.
        places: Numbers or names.
        path: File to write.
        title: Of the figure.
        label: Of the horizontal axis.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    named = any(isinstance(place, str) for place in places)
    values = range(len(places)) if named else places
    for name, scores in series.items():
        means, spreads = zip(*map(_percent, scores), strict=True)
        axis.errorbar(values, means, spreads, fmt="o", linestyle="none" if named else "-", label=name, capsize=2)
    if named:
        axis.set_xticks(values, places, rotation=20, ha="right")
    axis.set(xlabel=label, ylabel="%", title=title)
    axis.grid(alpha=0.3)
    if len(series) > 5:
        figure.legend(loc="outside right upper", fontsize=7)
    else:
        axis.legend()
    _save(figure, path)


def all_scores(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, float | None]]]:
    """Return SA, RA and Hscore of the records, for :func:`plot_scores`."""
    return {key: [line["scores"][key] for line in lines] for key in ("SA", "RA", "Hscore")}


def between_markers(page: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->`` in a page.

    Raises:
        ValueError: The page has no such markers.
    """
    before = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    if not pattern.search(before):
        raise ValueError(f"{page} has no <!-- {name} --> ... <!-- /{name} -->: write them where the table shall be.")
    page.write_text(pattern.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", before), encoding="utf-8")


def _results(sweep: Sweep, setting: Setting, seeds: Sequence[int]) -> dict[int, RobustnessResult]:
    found = {seed: sweep.result(setting, seed) for seed in seeds}
    return {seed: result for seed, result in found.items() if result is not None}


def _seconds(sweep: Sweep, setting: Setting, seed: int) -> float:
    before = 0.0 if setting.start is None else _seconds(sweep, setting.start, seed)
    return before + sweep.training(setting, seed)["cpu_seconds"]


def _percent(score: Mapping[str, float | None]) -> tuple[float, float]:
    return 100 * (score["mean"] or 0.0), 100 * (score["half_width"] or 0.0)


def _cell(value: Mapping[str, float | None], change: bool = False) -> str:
    mean, half_width = value["mean"], value["half_width"]
    text = f"{100 * mean:{'+' if change else ''}.1f}"
    if half_width is None:
        return text
    text += f" ± {100 * half_width:.1f}"
    return f"**{text}**" if change and abs(mean) > half_width else text


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    _pyplot().close(figure)
