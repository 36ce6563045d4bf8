"""Does entropy help against attacks, and beyond the epsilon trained for? Accuracy against epsilon, on digits.

    python benchmarks/entropy_curves.py                              # 5 seeds
    python benchmarks/entropy_curves.py --report --write docs/beyond_epsilon.md

Entropy maximisation (EntM) and label smoothing, alone and with adversarial training (PGD-AT), as Jin et al. (2020,
arXiv 2011.13538) compare them. Each model is attacked by PGD through its own gradients, and through those of a model
that it does not know: the PGD-AT model of the next seed. Where only the first curve rises, gradients are hidden and
nothing is gained. Differences are to the same training without the term, paired by seed, with 95 % t-intervals.

Runs and trained weights are kept in the output folder, which may be that of methods.py: a benchmark that was stopped
continues where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comparison
import sweep
import torch
from method_tables import made
from tqdm.auto import tqdm

from entprop_wrap.methods import Method, Vanilla
from entprop_wrap.robustness import PGD, Estimate, Transfer, accuracy_against_epsilon

PLAIN, HARDENED = "vanilla", "PGD-AT"


def hardened(**terms: float) -> Method:
    """Return adversarial training within 0.1, as methods.py has it."""
    return made("pgd_at", 0.1, attack_steps=5, **terms)


#: By what they are compared with: the same training without a term.
METHODS: dict[str, dict[str, Method]] = {
    PLAIN: {
        PLAIN: Vanilla(),
        "EntM 0.1": Vanilla(entropy_weight=0.1),
        "EntM 0.5": Vanilla(entropy_weight=0.5),
        "smoothing 0.1": Vanilla(label_smoothing=0.1),
        "smoothing 0.3": Vanilla(label_smoothing=0.3),
    },
    HARDENED: {
        HARDENED: hardened(),
        "PGD-AT + EntM 0.1": hardened(entropy_weight=0.1),
        "PGD-AT + EntM 0.5": hardened(entropy_weight=0.5),
        "PGD-AT + smoothing 0.1": hardened(label_smoothing=0.1),
        "PGD-AT + smoothing 0.3": hardened(label_smoothing=0.3),
    },
}
WAYS = {"own": "its own gradients", "transfer": "gradients of a model that it does not know"}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    recipe = sweep.Recipe(epochs=options.epochs)
    runs = sweep.Sweep(options.output, sweep.Protocol(images=options.images))
    seeds = range(options.seeds)
    settings = {name: sweep.Setting(recipe, method) for group in METHODS.values() for name, method in group.items()}
    if not options.report:
        # The models that attacks are transferred from come first.
        names = sorted(settings, key=lambda name: name != HARDENED)
        for name, seed in tqdm([(name, seed) for name in names for seed in seeds], desc="Runs", unit="run"):
            for way in WAYS:
                if runs.table.find(about(settings[name], way, options), seed) is None:
                    found = curve(runs, settings, name, seed, way, options)
                    runs.table.add(about(settings[name], way, options), seed, found)
    text = "\n\n".join(table(runs, settings, way, options) for way in WAYS)
    print(text)
    if options.write:
        figures = options.write.parent / "figures"
        for way, title in WAYS.items():
            plot(runs, settings, way, figures / f"entropy-{way}.png", f"Attacked through {title}", options)
        pictures = "\n".join(f"![{title}](figures/entropy-{way}.png)" for way, title in WAYS.items())
        comparison.between_markers(options.write, "entropy-curves", f"{text}\n\n{pictures}")


def curve(
    runs: Any, settings: Mapping[str, Any], name: str, seed: int, way: str, options: argparse.Namespace
) -> dict[str, float]:
    """Return accuracy in [0, 1] by epsilon."""
    attack: Any = PGD(options.epsilons[-1], steps=options.steps)
    if way == "transfer":
        attack = Transfer(model_of(runs, settings[HARDENED], (seed + 1) % options.seeds), attack)
    data, _ = runs.data(settings[name].recipe)
    found = accuracy_against_epsilon(
        model_of(runs, settings[name], seed),
        data.loader(data.robustness, 100, 0),
        options.epsilons,
        attack=attack,
        pixel_space=data.space,
        progress=False,
    )
    return {f"{epsilon:g}": accuracy for epsilon, accuracy in found.items()}


def model_of(runs: Any, setting: Any, seed: int) -> torch.nn.Module:
    """Return the trained model; train first if need be."""
    model = runs.new_model(setting.recipe, seed)
    model.load_state_dict(runs.weights(setting, seed))
    return model.eval()


def about(setting: Any, way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what a curve belongs to, beside its seed."""
    attack = {"way": way, "steps": options.steps, "epsilons": list(options.epsilons), "sources": options.seeds}
    return {"train": setting, "curve": attack, "images": options.images}


def table(runs: Any, settings: Mapping[str, Any], way: str, options: argparse.Namespace) -> str:
    """Return one way's table in Markdown: accuracy of the baselines, differences to them of the others."""
    head = [f"attacked through {WAYS[way]}", *(f"{epsilon:g}" if epsilon else "clean" for epsilon in options.epsilons)]
    rows = [head, ["---", *["---:"] * len(options.epsilons)]]
    for base, group in METHODS.items():
        for name in group:
            estimates = [estimate(runs, settings, name, base, way, at, options) for at in options.epsilons]
            rows.append([name, *(cell(one, name != base) for one in estimates)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def estimate(
    runs: Any, settings: Mapping[str, Any], name: str, base: str, way: str, epsilon: float, options: argparse.Namespace
) -> Estimate | None:
    """Return mean and interval, in percent; of the difference to ``base`` unless that is ``name``."""
    own, other = (values(runs, settings[one], way, epsilon, options) for one in (name, base))
    seeds = [seed for seed in own if seed in other]
    if not seeds:
        return None
    return Estimate.of([100 * (own[seed] - (other[seed] if name != base else 0.0)) for seed in seeds])


def values(runs: Any, setting: Any, way: str, epsilon: float, options: argparse.Namespace) -> dict[int, float]:
    """Return accuracy in [0, 1] by seed."""
    found = {seed: runs.table.find(about(setting, way, options), seed) for seed in range(options.seeds)}
    return {seed: row[f"{epsilon:g}"] for seed, row in found.items() if row is not None}


def cell(one: Estimate | None, change: bool) -> str:
    """Write mean and interval; a change is bold where the interval leaves out 0."""
    if one is None:
        return ""
    text = f"{one.mean:{'+' if change else ''}.1f}" + ("" if one.half_width is None else f" ± {one.half_width:.1f}")
    return f"**{text}**" if change and one.half_width is not None and abs(one.mean) > one.half_width else text


def plot(runs: Any, settings: Mapping[str, Any], way: str, path: Path, title: str, options: argparse.Namespace) -> None:
    """Draw every curve."""
    series: dict[str, Sequence[Mapping[str, float | None]]] = {}
    for name in settings:
        found = [values(runs, settings[name], way, epsilon, options) for epsilon in options.epsilons]
        if all(found):
            series[name] = [vars(Estimate.of(list(accuracies.values()))) for accuracies in found]
    comparison.plot_scores(series, options.epsilons, path, title, "epsilon (trained for 0.1)")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--epochs", type=int, default=60, help="(default: 60)")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0, 0.02, 0.05, 0.1, 0.15, 0.2])
    parser.add_argument("--steps", type=int, default=10, help="of PGD at each epsilon (default: 10)")
    parser.add_argument("--images", type=int, default=500, help="test images (default: 500)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--output", type=Path, default=Path("outputs/methods"), help="(default: outputs/methods)")
    parser.add_argument("--report", action="store_true", help="tables from what is done; nothing is trained")
    parser.add_argument("--write", type=Path, help="a page whose <!-- entropy-curves --> part gets the tables")
    return parser.parse_args()


if __name__ == "__main__":
    main()
