"""Every method on the same data, models and seeds: SA, RA and Hscore against vanilla training, and what they cost.

    python benchmarks/methods.py                                # digits, 5 seeds: every method
    python benchmarks/methods.py --tables 7 8 16 17             # ... the shapes of the paper's ablations
    python benchmarks/methods.py --rows AdvProp MixProp         # ... some rows, and the first
    python benchmarks/methods.py --report                       # tables of what is done, nothing is trained
    python benchmarks/methods.py --dataset path/to/pets --model path/to/mobilenet --pretrained --image-size 96

Each row is a command line of ``entprop-train``, to which all options are passed on that this script does not know. Each
run has a folder of its own: a benchmark that was stopped continues where it was. Seeds are paired: each method begins
with the same weights and sees the same data in the same order.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from recipes import difference

from entprop_wrap.cli import main as train
from entprop_wrap.cli.options import parse
from entprop_wrap.robustness import Estimate

#: By row: a method and its options; "again" continues from the vanilla model, shorter and with a smaller learning rate.
METHODS = {
    "vanilla": "vanilla",
    "EntProp k=0.2 n=1": "entprop",
    "EntProp k=0.6 n=1": "entprop --set fraction=0.6",
    "EntProp k=0.2 n=5": "entprop --set attack_steps=5",
    "EntProp k=0.6 n=5": "entprop --set fraction=0.6 attack_steps=5",
    "EntProp k=0.2 n=1, auxiliary images mixed": "entprop --set mix_on=auxiliary",
    "EntProp k=0.2 n=1, random selection": "random_selection",
    "EntProp k=0.2 n=1, shared norms": "shared_norms",
    "MixProp": "mixprop",
    "FastAdvProp": "fast_advprop",
    "AdvProp": "advprop",
    "FineGrainedAdvProp, weak and strong": "fine_grained_advprop",
    "MEADA, in each step": "me_ada --set fraction=1",
    "PGD-AT": "pgd_at --set attack_steps=5",
    "TRADES": "trades --set attack_steps=5",
    "label smoothing 0.1": "label_smoothing",
    "EntM 0.1": "entropy_maximisation",
    "EntM 0.1 + PGD-AT": "pgd_at --set attack_steps=5 entropy_weight=0.1",
    "ME-ADA, data grows": "me_ada_growth",
    "vanilla, trained on": "vanilla again",
    "EntropicRetraining": "entropic_retraining again",
}
COMPONENTS = {
    "vanilla": "vanilla",
    "selection": "entprop --set mix=none attack_steps=0",
    "selection + MixUp": "entprop --set attack_steps=0",
    "selection + free step": "entprop --set mix=none",
    "all": "entprop",
}
SCORES = {
    "entropy": "entprop",
    "cross-entropy": "entprop --set uncertainty=cross_entropy",
    "confidence": "entprop --set uncertainty=least_confidence",
    "logit margin": "entprop --set uncertainty=logit_margin",
    "random": "random_selection",
}
SHARES = {f"{k / 10:g}": f"entprop --set fraction={k / 10:g}" for k in range(1, 11)}
#: By table: the rows. The others are compared with the first.
TABLES = {
    "methods": METHODS,
    "7": COMPONENTS,
    "8": SCORES,
    "16": {"0": "vanilla", **SHARES},
    "17": {str(n): f"entprop --set fraction=0.6 attack_steps={n}" for n in range(1, 6)},
}
NOTE = (
    "Mean and 95 % t-interval over seeds, in percent; differences to {first} are paired by seed, in points, bold where "
    "the interval leaves out 0. RA: {protocol}. Passes: forward and backward of a whole batch, per step. Time: seconds "
    "of the whole training over those of {first} with the same seed; median over seeds."
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["methods"], help="(default: methods)")
    parser.add_argument("--rows", nargs="+", default=[], help="only these rows, and the first (default: all)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("outputs/methods"), help="(default: outputs/methods)")
    parser.add_argument("--report", action="store_true", help="tables of what is done, nothing is trained")
    options, common = parser.parse_known_args()
    for name in options.tables:
        rows = TABLES[name]
        if unknown := [row for row in options.rows if row not in rows]:
            parser.error(f"--rows: expected some of {', '.join(map(repr, rows))}; found {unknown[0]!r}")
        chosen = {row: rows[row] for row in rows if not options.rows or row in (next(iter(rows)), *options.rows)}
        found: dict[str, dict[int, Any]] = {row: {} for row in chosen}
        for seed in range(options.seeds):
            for row, arguments in chosen.items():
                if run := result(arguments, common, seed, options):
                    found[row][seed] = run
        print(f"\nTable {name}\n\n{table(found)}", flush=True)


def result(arguments: str, common: list[str], seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """Return what entprop-train found; train first if need be, or return None with ``--report``."""
    folder = options.output / arguments.replace(" ", "_").replace("--", "") / f"seed{seed}"
    method, *more = arguments.split()
    command = [*common, "--methods", method, "--seed", str(seed), "--output", str(folder), "--resume"]
    if more == ["again"]:
        usual = parse("", command)
        weights = options.output / "vanilla" / f"seed{seed}" / f"vanilla-seed{seed}" / "model"
        more = ["--weights", str(weights), "--epochs", str(max(1, usual.epochs // 4))]
        more += ["--learning-rate", f"{0.1 * usual.learning_rate:g}"]
    path = folder / "results.json"
    if not path.exists():
        if options.report:
            return None
        train([*command, *more])
    found = json.loads(path.read_text())
    wanted = vars(parse("", command + more))
    if differing := [key for key, value in found["options"].items() if value not in (wanted[key], str(wanted[key]))]:
        raise SystemExit(f"{path} was made with other options ({', '.join(differing)}). Choose another --output.")
    return found["runs"][0]


def table(rows: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Return scores, differences to the first row and cost, in Markdown; runs are given by row and seed."""
    first, baseline = next(iter(rows.items()))
    if not baseline:
        return "Nothing is done yet."
    protocol, keys = next((run["protocol"], list(scores(run))) for run in baseline.values())
    head = ["row", "seeds", *keys, *(f"{key}, difference" for key in keys), "passes", "time"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, runs in rows.items():
        pairs = [(runs[seed], baseline[seed]) for seed in runs if seed in baseline]
        if not pairs:
            continue
        lines.append([name, str(len(pairs))])
        lines[-1] += [spread([scores(run)[key] for run, _ in pairs]) for key in keys]
        changes = [difference([scores(run)[key] - scores(base)[key] for run, base in pairs]) for key in keys]
        lines[-1] += changes if name != first else [""] * len(keys)
        lines[-1].append(f"{statistics.fmean(run['passes_per_step'] for run, _ in pairs):.2f}")
        lines[-1].append(f"{statistics.median(run['seconds'] / base['seconds'] for run, base in pairs):.2f}")
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{NOTE.format(first=repr(first), protocol=protocol)}"


def scores(run: dict[str, Any]) -> dict[str, float]:
    """Return the accuracies of a run, in percent."""
    found = {"SA": run["sa"], "RA": run["ra"], "Hscore": run["hscore"]}
    found |= {f"under {name}": attacked["accuracy"] for name, attacked in run["adversarial"].items()}
    return {key: 100 * value for key, value in found.items()}


def spread(values: list[float]) -> str:
    """Return a mean with its 95 % t-interval."""
    found = Estimate.of(values)
    return f"{found.mean:.1f}" + ("" if found.half_width is None else f" ± {found.half_width:.1f}")


if __name__ == "__main__":
    main()
