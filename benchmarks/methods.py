"""Every method on the same data, models and seeds: SA, RA and Hscore against vanilla training, and what they cost.

    python benchmarks/methods.py                                      # digits, 5 seeds: every method
    python benchmarks/methods.py --tables 7 8 16 17                   # ... the shapes of the paper's ablations
    python benchmarks/methods.py --list                               # what is done, and what is left
    python benchmarks/methods.py --attack 8/255                       # ... and accuracy under PGD-20
    python benchmarks/methods.py --report --write docs/benchmarks.md  # tables from what is done, nothing is trained
    python benchmarks/methods.py --dataset path/to/pets --model path/to/mobilenet --image-size 96 --max-train 1575

Runs are kept in the output folder, in runs.jsonl: a benchmark that was stopped continues where it was, and one that is
changed trains only what has changed. Seeds are paired: each method begins with the same weights and sees the same data
in the same order. Each table is written as Markdown, as JSON, and as a figure.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import comparison
import sweep
import torch
from method_tables import TABLES, Table
from step_ratios import ratio_of, times

from entprop_wrap.train.options import fraction

FINE_TUNING = {
    "pretrained": True,
    "in_memory": True,
    "channels_last": True,
    "optimizer": "adamw",
    "learning_rate": 3e-4,
    "weight_decay": 0.01,
}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    digits = options.dataset == "digits"
    sizes = {"epochs": options.epochs, "image_size": options.image_size, "max_train": options.max_train}
    recipe = sweep.Recipe(**sizes) if digits else fine_tuning(options, sizes)
    epsilon = options.epsilon or (0.1 if digits else None)
    protocol = sweep.Protocol(options.images, tuple(options.severities), options.attack)
    runs = sweep.Sweep(options.output, protocol, options.together)
    seeds = range(options.seed, options.seed + options.seeds)
    chosen = {name: settings_of(TABLES[name], recipe, epsilon) for name in options.tables}
    if options.rows:
        chosen = {name: only(table, options.rows) for name, table in chosen.items()}
    settings = [setting for table in chosen.values() for setting in table.values()]
    if options.list:
        print(listing(runs, chosen, seeds))
        return
    if not options.report:
        runs.run(settings, seeds)
        if options.rounds:
            times(runs, settings, options.rounds)
    for name, table in chosen.items():
        write(runs, name, table, seeds, options)


def settings_of(table: Table, recipe: Any, epsilon: float | None) -> dict[str, Any]:
    """Return what a table trains, by the names of its rows."""
    settings: dict[str, Any] = {}
    for name, entry in table.entries(epsilon, recipe.epochs).items():
        start = settings[entry["start"]] if "start" in entry else None
        own = recipe
        if "recipe" in entry:
            share = entry["recipe"]["learning_rate"]
            own = replace(recipe, epochs=entry["recipe"]["epochs"], learning_rate=share * recipe.learning_rate)
        settings[name] = sweep.Setting(own, entry["method"], entry.get("grows", False), start)
    return settings


def only(table: dict[str, Any], rows: list[str]) -> dict[str, Any]:
    """Return the first row of a table, which the others are compared with, and those that are named."""
    if unknown := [row for row in rows if row not in table]:
        raise SystemExit(f"--rows: expected some of {', '.join(map(repr, table))}; found {unknown[0]!r}.")
    return {name: setting for name, setting in table.items() if name in (next(iter(table)), *rows)}


def fine_tuning(options: argparse.Namespace, sizes: dict[str, int | None]) -> Any:
    """Return how a pretrained model is trained, for a few epochs."""
    if options.model is None:
        raise SystemExit(
            "Data of your own needs --model: a folder, a Hub id, or a name of torchvision or timm. Digits come with "
            "a model of their own."
        )
    return sweep.Recipe(dataset=options.dataset, model=options.model, **sizes, **FINE_TUNING)


def write(runs: Any, name: str, table: dict[str, Any], seeds: range, options: argparse.Namespace) -> None:
    """Print a table, and write it as Markdown, JSON and figure; and into a page, where one is given."""
    lines = comparison.records(runs, table, seeds)
    for line in lines:
        line["step_time"] = ratio_of(runs, table[line["name"]], options.rounds) if options.rounds else None
    paper = {key: f"{value:.2f}" for key, value in TABLES[name].paper.items()}
    timed = {line["name"]: f"{line['step_time']['median']:.2f}" for line in lines if line["step_time"]}
    extra = ({"step": timed} if timed else {}) | ({"paper's Hscore": paper} if paper else {})
    text = comparison.markdown(lines, TABLES[name].first, extra)
    if timed:
        text += " Step: wall time of a step over that of a vanilla step, timed in turns; median."
    left = runs.left(table.values(), seeds)
    if left:
        text += f"\n\n*{len(left)} of {len(table) * len(seeds)} runs are not done yet.*"
    print(f"\n{TABLES[name].title}\n\n{text}", flush=True)
    data = Path(options.dataset).name
    stem = f"{data}-{name if name == 'methods' else f'table{name}'}"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{stem}.md").write_text(text + "\n")
    (options.output / f"{stem}.json").write_text(json.dumps(lines, indent=2) + "\n")
    pages = [options.output] + ([options.write.parent / "figures"] if options.write else [])
    for folder in pages if lines else []:
        figure = folder / f"{stem}.png"
        if name == "methods":
            comparison.plot_cost(lines, figure, TABLES[name].title)
        else:
            places = [float(line["name"]) if name in ("16", "17") else line["name"] for line in lines]
            scores = comparison.all_scores(lines)
            comparison.plot_scores(scores, places, figure, TABLES[name].title, TABLES[name].first)
    if options.write:
        picture = f"\n\n![{TABLES[name].title}](figures/{stem}.png)" if lines else ""
        comparison.between_markers(options.write, stem, text + picture)


def listing(runs: Any, chosen: dict[str, dict[str, Any]], seeds: range) -> str:
    """Return which seeds of which rows are done."""
    text = []
    for name, table in chosen.items():
        for row, setting in table.items():
            done = [seed for seed in seeds if runs.result(setting, seed) is not None]
            left = [seed for seed in seeds if seed not in done]
            text.append(f"{name:<8} {row:<45} done {done or '-'}  left {left or '-'}")
    settings = [setting for table in chosen.values() for setting in table.values()]
    count = len(runs.left(settings, seeds))
    return "\n".join([*text, f"{count} of {len(set(settings)) * len(seeds)} runs are left."])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["methods"], help="(default: methods)")
    parser.add_argument("--rows", nargs="+", help="train and show only these rows, and the first (default: all)")
    parser.add_argument("--dataset", default="digits", help="digits, or what examples/train.py takes")
    parser.add_argument("--model", help="pretrained; digits have a small CNN")
    parser.add_argument("--max-train", type=int, help="maximum number of training images, stratified (digits: 300)")
    parser.add_argument("--image-size", type=int, help="pixels (default: what the model was made for)")
    parser.add_argument("--epochs", type=int, help="(default: 60 on digits, else 8)")
    parser.add_argument(
        "--epsilon",
        type=fraction,
        help="of all attacks in training (default: 0.1 on digits, else each method's)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first (default: 0)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--images", type=int, default=500, help="test images for SA and RA (default: 500)")
    parser.add_argument("--severities", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(default: all five)")
    parser.add_argument("--attack", type=fraction, help="epsilon of PGD-20, such as 8/255 (default: no attack)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of a step; 0: none (default: 15)")
    parser.add_argument("--together", type=int, default=10, help="models that are evaluated at once (default: 10)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("outputs/methods"), help="(default: outputs/methods)")
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, and stop")
    parser.add_argument("--report", action="store_true", help="make tables of what is done, train nothing")
    parser.add_argument("--write", type=Path, help="also put tables into this page, between its markers")
    options = parser.parse_args()
    options.epochs = options.epochs or (60 if options.dataset == "digits" else 8)
    return options


if __name__ == "__main__":
    main()
