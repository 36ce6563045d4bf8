"""Change one option of EntProp at a time, over seeds, and see what it does.

    python benchmarks/ablate.py k n                             # digits: share of the batch, and attack steps
    python benchmarks/ablate.py threshold --values 0.5 1 1.5    # other values than the usual ones
    python benchmarks/ablate.py data --max-train 1200           # vanilla and EntProp on 5 % to 100 % of the images
    python benchmarks/ablate.py metric --dataset path/to/images --model resnet18 --pretrained

    k          share of the batch that is selected
    n          attack steps
    threshold  select only above this entropy, in nats
    metric     what to select by
    mixing     MixUp or CutMix, of the whole batch or of the auxiliary images, or none
    norms      auxiliary copies of the norm layers, or none
    data       share of the training images, for as many steps

Each run is written to runs.jsonl in the output folder when it is over: a sweep that was stopped continues where it was
(--list says what is left). Each sweep ends in a table, as Markdown, and a figure.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import comparison
from sweep import Protocol, Recipe, Setting, Sweep

from entprop_wrap import EntProp, MixUp
from entprop_wrap.errors import EntPropError
from entprop_wrap.functional import CutMix
from entprop_wrap.methods import Vanilla
from entprop_wrap.train.methods import NAMED
from entprop_wrap.train.options import fraction

MIXING = {
    "MixUp of the batch": {"mix": MixUp(), "mix_on": "batch"},
    "MixUp of the auxiliary images": {"mix": MixUp(), "mix_on": "auxiliary"},
    "CutMix of the batch": {"mix": CutMix(), "mix_on": "batch"},
    "CutMix of the auxiliary images": {"mix": CutMix(), "mix_on": "auxiliary"},
    "none": {"mix": None},
}


@dataclass(frozen=True)
class Option:
    """What a sweep changes.

    Attributes:
        values: The usual values; names where ``number`` is None.
        change: ``value -> fields of EntProp``.
        number: How to read a value from the command line.
    """

    values: tuple[Any, ...]
    change: Callable[[Any], dict[str, Any]]
    number: Callable[[str], float] | None = float


OPTIONS = {
    "k": Option((0.1, 0.2, 0.4, 0.6, 0.8, 1.0), lambda value: {"fraction": value}),
    "n": Option((0, 1, 2, 3, 4, 5), lambda value: {"attack_steps": value}, int),
    "threshold": Option((0.25, 0.5, 1.0, 1.5, 2.0), lambda value: {"threshold": value}),
    "metric": Option(tuple(NAMED["uncertainty"]), lambda name: {"uncertainty": NAMED["uncertainty"][name]}, None),
    "mixing": Option(tuple(MIXING), lambda name: MIXING[name], None),
    "norms": Option(
        ("auxiliary copies", "shared"), lambda name: {"auxiliary": None if name == "shared" else "aux"}, None
    ),
}
DATA = "data"
SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)


def main() -> None:
    options = parse()
    protocol = Protocol(options.robustness_images, tuple(options.severities))
    sweep = Sweep(options.output, protocol)
    seeds = range(options.seed, options.seed + options.seeds)
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe) if field.name != "share"})
    base = EntProp(options.fraction, options.attack_steps, options.epsilon, mix_on=options.mix_on)
    chosen = {name: settings(name, options.values, recipe, base) for name in options.sweeps}
    everything = [setting for rows in chosen.values() for setting in rows.values()]
    if options.list:
        for name, rows in chosen.items():
            for row, setting in rows.items():
                left = [seed for seed in seeds if sweep.result(setting, seed) is None]
                print(f"{name}: {row}: seeds left: {left or 'none'}")
        return
    sweep.run(everything, seeds)
    for name, rows in chosen.items():
        report(name, rows, sweep, seeds, options.output)


def settings(name: str, values: list[Any] | None, recipe: Recipe, base: EntProp) -> dict[str, Setting]:
    """Return what a sweep trains, by name; what the others are compared with comes first."""
    vanilla = Vanilla()
    if name == DATA:
        shares = {f"{100 * share:g} %": replace(recipe, share=share) for share in values or SHARES}
        pairs = {"vanilla": vanilla, "EntProp": base}
        return {f"{key}, {size}": Setting(part, one) for size, part in shares.items() for key, one in pairs.items()}
    option = OPTIONS[name]
    rows = {str(value): Setting(recipe, replace(base, **option.change(value))) for value in values or option.values}
    return {"vanilla": Setting(recipe, vanilla), **rows}


def report(name: str, rows: dict[str, Setting], sweep: Sweep, seeds: range, output: Path) -> None:
    """Print the table of a sweep, and write table and figure."""
    path, title = output / f"{name}.png", f"EntProp: {name}"
    if name == DATA:
        keys = list(rows)
        pairs = [keys[index : index + 2] for index in range(0, len(keys), 2)]
        lines = [line for pair in pairs for line in comparison.records(sweep, {key: rows[key] for key in pair}, seeds)]
        text = comparison.markdown(lines, name, baseline="vanilla training on as many images")
        curves = {
            key: [line["scores"]["Hscore"] for line in lines[place::2]]
            for place, key in enumerate(("Hscore of vanilla", "Hscore of EntProp"))
        }
        places = [100 * rows[key].recipe.share for key in keys[::2]]
        comparison.plot_scores(curves, places, path, title, "% of the training images")
    else:
        lines = comparison.records(sweep, rows, seeds)
        text = comparison.markdown(lines, name)
        names = [line["name"] for line in lines]
        if OPTIONS[name].number:  # vanilla training has no place on an axis of numbers
            lines, names = lines[1:], [float(key) for key in names[1:]]
        comparison.plot_scores(comparison.all_scores(lines), names, path, title, name)
    (output / f"{name}.md").write_text(text + "\n")
    print(f"\n{title}\n\n{text}\n\nFigure: {path}")


def parse() -> argparse.Namespace:
    """Read the command line. Defaults are those of train.py: digits from scratch, everything else fine-tuned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*OPTIONS, DATA]
    parser.add_argument("sweeps", nargs="+", choices=names, metavar="sweep", help=", ".join(names))
    parser.add_argument("--values", nargs="+", help="of the one sweep that is named, instead of the usual ones")

    group = parser.add_argument_group("EntProp, where it is not swept")
    group.add_argument("--fraction", type=float, default=0.2, help="k (default: 0.2)")
    group.add_argument("--attack-steps", type=int, default=1, help="n (default: 1)")
    group.add_argument("--epsilon", type=fraction, help="such as 4/255 (default: the paper's; digits: 0.1)")
    group.add_argument("--mix-on", choices=["batch", "auxiliary"], default="batch", help="(default: batch)")

    group = parser.add_argument_group("data, model and training, as in train.py")
    group.add_argument("--dataset", default="digits", help="(default: digits)")
    group.add_argument("--train-split")
    group.add_argument("--eval-split")
    group.add_argument("--max-train", type=int, help="(digits: 300)")
    group.add_argument("--max-eval", type=int)
    group.add_argument("--in-memory", action="store_true", help="decode images once")
    group.add_argument("--model", default="small_cnn", help="(default: small_cnn)")
    group.add_argument("--pretrained", action="store_true")
    group.add_argument("--image-size", type=int)
    group.add_argument("--epochs", type=int, help="(default: 10; digits: 60)")
    group.add_argument("--batch-size", type=int, default=64, help="(default: 64)")
    group.add_argument("--optimizer", choices=["adamw", "adam", "sgd"], help="(default: adamw; digits: sgd)")
    group.add_argument("--learning-rate", type=float, help="(default: 3e-4; digits: 0.1)")
    group.add_argument("--weight-decay", type=float, help="(default: 0.01; digits: 5e-4)")
    group.add_argument("--warmup", type=float, default=0.1, help="(default: 0.1)")
    group.add_argument("--channels-last", action="store_true")

    group = parser.add_argument_group("runs and results")
    group.add_argument("--seed", type=int, default=0, help="first seed (default: 0)")
    group.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    group.add_argument("--severities", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(default: all five)")
    group.add_argument("--robustness-images", type=int, default=500, help="test images (default: 500)")
    group.add_argument("--output", type=Path, default=Path("outputs/ablate"), help="(default: outputs/ablate)")
    group.add_argument("--list", action="store_true", help="say what is left, and stop")

    options = parser.parse_args()
    digits = options.dataset == "digits"
    defaults = {
        "epochs": 60 if digits else 10,
        "optimizer": "sgd" if digits else "adamw",
        "learning_rate": 0.1 if digits else 3e-4,
        "weight_decay": 5e-4 if digits else 0.01,
        "epsilon": 0.1 if digits else None,
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.values:
        options.values = read(options.values, options.sweeps, parser)
    return options


def read(values: list[str], sweeps: list[str], parser: argparse.ArgumentParser) -> list[Any]:
    """Return the values of ``--values``, as the sweep takes them."""
    if len(sweeps) > 1:
        parser.error("--values belongs to one sweep: name one, or leave --values out")
    usual, number = (SHARES, float) if sweeps[0] == DATA else (OPTIONS[sweeps[0]].values, OPTIONS[sweeps[0]].number)
    try:
        found = values if number is None else [number(value) for value in values]
    except ValueError:
        parser.error(f"--values of {sweeps[0]} are numbers, found {' '.join(values)}")
    if number is None and (unknown := [value for value in found if value not in usual]):
        parser.error(f"--values of {sweeps[0]} are among {', '.join(map(repr, usual))}; found {unknown[0]!r}")
    if sweeps[0] == DATA and not all(0 < share <= 1 for share in found):
        parser.error(f"--values of data are shares in (0, 1], found {' '.join(values)}")
    return found


if __name__ == "__main__":
    try:
        main()
    except EntPropError as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error
