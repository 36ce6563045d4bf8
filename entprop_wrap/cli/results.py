"""The results: tables, results.json, and a page to look at."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from entprop_wrap import diagnostics
from entprop_wrap.cli.data import Data
from entprop_wrap.methods import EntProp
from entprop_wrap.reporting import report
from entprop_wrap.robustness import compare


@dataclass
class Run:
    """One training run."""

    method: str
    seed: int
    passes: float  # mean per step
    seconds: float  # of the steps, over all resumptions and phases; without evaluations and checkpoints
    scores: Any = None  # of evaluate_robustness
    diagnostics: dict[str, Any] = field(default_factory=dict)  # results by title, of the first seed


def cost(folder: Path, images_per_step: int) -> tuple[float, float]:
    """Return the mean passes per step, and the seconds of all steps, by the metrics.jsonl of each phase."""
    passes, seconds = [], 0.0
    for path in (*sorted(folder.glob("phase*/metrics.jsonl")), folder / "metrics.jsonl"):
        last = 0
        for record in map(json.loads, path.read_text().splitlines()):
            if "images_per_second" in record:
                passes.append(record["passes"])
                seconds += (record["step"] - last) * images_per_step / record["images_per_second"]
                last = record["step"]
    return statistics.fmean(passes), seconds


def by_method(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the scores of each method, in the order of the seeds."""
    return {name: [run.scores for run in runs if run.method == name] for name in dict.fromkeys(r.method for r in runs)}


def means(runs: Sequence[Run], what: str) -> dict[str, float]:
    """Return the mean over the seeds of ``what``, an attribute of runs, by method."""
    return {name: statistics.fmean(getattr(r, what) for r in runs if r.method == name) for name in by_method(runs)}


def table(runs: Sequence[Run], data: Data) -> str:
    """Return scores and differences as tables, and what training cost."""
    passes = means(runs, "passes")
    cost = "; ".join(
        f"{method} {seconds:.0f} seconds of training, {passes[method]:.2f} passes per step"
        for method, seconds in means(runs, "seconds").items()
    )
    about = f"{data.name}: {len(data.train):,} training images, {len(data.classes)} classes."
    return f"{about}\n\n{compare(by_method(runs)).to_markdown()}\n\nCost: {cost}."


def save(runs: Sequence[Run], data: Data, options: Namespace) -> None:
    """Write results.json and report.html into the output folder."""
    output = options.output
    results = {
        "data": data.name,
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "runs": [
            {
                **run.scores.to_dict(),
                "method": run.method,
                "seed": run.seed,  # of the training; that of the corruptions is in "protocol"
                "seconds": round(run.seconds, 2),
                "passes_per_step": round(run.passes, 4),
            }
            for run in runs
        ],
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    page(runs, data, options, output / "report.html")
    print(f"\nResults: {output / 'results.json'}   to look at: {output / 'report.html'}")


def diagnose(name: str, method: Any, model: nn.Module, data: Data, options: Namespace) -> dict[str, Any]:
    """Look at a trained model before its copies go: how far they are, and what the method does to test images."""
    found: dict[str, Any] = {f"{name}: auxiliary against main norms": diagnostics.domain_gap(model)}
    if isinstance(method, EntProp):
        loader = DataLoader(data.test, options.batch_size, num_workers=options.workers)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the page says what there is to say
            stages = diagnostics.entropy_stages(model, loader, method=method, pixel_space=data.space, progress=False)
        found[f"{name}: entropy of test images"] = stages
    return found


def page(runs: Sequence[Run], data: Data, options: Namespace, path: Path) -> Path:
    """Write the report: scores over the seeds, what they cost, and some of the test images under each corruption."""
    seeds = sorted({run.seed for run in runs})
    examples = [data.test[index][0] for index in range(min(4, len(data.test)))]
    facts = {
        "Data": f"{data.name}: {len(data.train):,} training images, {len(data.classes)} classes",
        "Training": f"{options.epochs} epochs; seeds {', '.join(map(str, seeds))}",
        "Seconds of training": ", ".join(f"{method} {mean:.0f}" for method, mean in means(runs, "seconds").items()),
    }
    return report(
        by_method(runs),
        path,
        title=f"{data.name}, {options.model}",
        images=torch.stack(examples),
        pixel_space=data.space,
        costs={method: round(mean, 2) for method, mean in means(runs, "passes").items()},
        diagnostics={title: found for run in runs for title, found in run.diagnostics.items()},
        command=shlex.join(["python", *sys.argv]),
        facts=facts,
    )
