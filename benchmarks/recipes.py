"""EntProp beside, and on top of, the augmentations that people use: which recipe pays for which data and budget.

    python benchmarks/recipes.py --runs benchmarks/recipes/runs.jsonl                       # digits, 5 seeds
    python benchmarks/recipes.py --runs ... --regimes cifar-1000 --cifar path/to/cifar10 --augment none trivialaugment
    python benchmarks/recipes.py --runs ... --regimes pets-40 --pets path/to/pets --weights path/to/mobilenet
    python benchmarks/recipes.py --runs ... --tables --write docs/recipes.md                # nothing is trained
    python benchmarks/recipes.py --rows vanilla "EntProp, view" --augment randaugment --epochs 20 --turns 8  # time

Seeds are paired: with one seed, every row begins with the same weights and sees the same images, augmented alike, in
the same order. SA is the accuracy on all test images; RA the mean accuracy under a suite of corruptions x 5 severities
of some of them; Hscore the harmonic mean of SA and RA on ImageNet-C's. Seconds are CPU seconds of one thread. Each
finished run is a line in ``--runs``; with ``--keep FOLDER`` weights are kept, and can be evaluated on further suites.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torchvision
from recipe_rows import ROWS, TRIVIAL_AUGMENT, Row
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

import entprop_wrap as entprop
from entprop_wrap import PixelSpace
from entprop_wrap.data.augmentation import AUGMENTATIONS, augmentation
from entprop_wrap.finetuning import interpolate, linear_probe, repair_keep_probabilities
from entprop_wrap.robustness import Estimate, evaluate_robustness
from entprop_wrap.robustness.scores import hscore


@dataclass(frozen=True)
class Regime:
    """What is trained on what, and for how long; the same for all rows."""

    data: str
    epochs: int
    images: int | None = None
    width: int = 16
    size: int = 32
    batch: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    warmup: float = 0.1
    epsilon: float | None = None
    tested: int = 500
    norm: str = "batch"
    pretrained: bool = False
    half: int | None = None  # of the classes: the first, 0, or the second, 1
    begins_with: str | None = None  # a regime, of whose plain training with TrivialAugment all but the head is taken


def _cifar(images: int, epochs: int) -> Regime:
    return Regime("cifar", epochs, images, width=24)


def _tuned(data: str, epochs: int, images: int | None = None) -> Regime:
    fine = {"size": 96, "optimizer": "adamw", "learning_rate": 3e-4, "weight_decay": 0.01, "tested": 335}
    return Regime(data, epochs, images, pretrained=True, **fine)


def _other_classes(epochs: int, norm: str = "batch") -> Regime:
    features = "cifar, first classes" if norm == "batch" else f"cifar, first classes, {norm} norm"
    return Regime("cifar", epochs, 500, width=24, norm=norm, half=1, begins_with=features)


REGIMES = {
    "digits": Regime("digits", 60, 300, epsilon=0.1),
    "digits-120": Regime("digits", 120, 300, epsilon=0.1),
    "digits, group norm": Regime("digits", 60, 300, epsilon=0.1, norm="group"),
    "digits, layer norm": Regime("digits", 60, 300, epsilon=0.1, norm="layer"),
    "digits-240, group norm": Regime("digits", 240, 300, epsilon=0.1, norm="group"),
    "digits-240, layer norm": Regime("digits", 240, 300, epsilon=0.1, norm="layer"),
    "cifar-1000": _cifar(1000, 100),
    "cifar-1000-300": _cifar(1000, 300),
    "cifar-2500": _cifar(2500, 60),
    "cifar-2500-200": _cifar(2500, 200),
    "cifar-5000": _cifar(5000, 40),
    "cifar-10000": _cifar(10000, 30),
    "pets-12": _tuned("pets", 12),
    "pets-40": _tuned("pets", 40),
    "cifar-1000, pretrained": _tuned("cifar", 12, 1000),
    "cifar, first classes": Regime("cifar", 60, width=24, half=0),
    "cifar, first classes, group norm": Regime("cifar", 60, width=24, norm="group", half=0),
    "cifar-500, other classes, 30": _other_classes(30),
    "cifar-500, other classes, 90": _other_classes(90),
    "cifar-500, other classes, 30, group norm": _other_classes(30, "group"),
}

SUITES = ("c", "c-bar")


# Data: uint8 images in memory


@dataclass
class Part:
    """Images ``(N, 3, H, W)`` uint8 and labels ``(N,)``."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, rows: Tensor) -> Part:
        return Part(self.images[rows], self.labels[rows])


class Task:
    """Data, transforms and model of a regime."""

    def __init__(self, regime: Regime, options: argparse.Namespace) -> None:
        self.regime, self.options = regime, options
        load = {"digits": digits, "cifar": folder, "pets": folder}[regime.data]
        self.train, self.test = load(regime, options)
        if regime.half is not None:
            self.train, self.test = (half(part, regime.half) for part in (self.train, self.test))
        if options.explore and regime.data != "digits":  # on images that the evidence does not use
            self.train, self.test = split(self.train, round(0.65 * len(self.train.labels)), seed=99)
        self.classes = int(self.train.labels.max()) + 1
        self.space = PixelSpace(0.5, 0.5)
        if regime.pretrained:
            flip_crop = [v2.RandomResizedCrop(regime.size, (0.35, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        elif regime.data == "cifar":
            flip_crop = [v2.RandomCrop(regime.size, 4), v2.RandomHorizontalFlip()]
        else:
            flip_crop = []
        self.transform = flip_crop

    def part(self, seed: int) -> Part:
        """Return the training images of a seed: of CIFAR-10 another stratified part each time."""
        number = self.regime.images
        return self.train if number in (None, len(self.train.labels)) else split(self.train, number, seed)[0]

    def build(self, seed: int) -> nn.Module:
        """Return the model that training begins with."""
        torch.manual_seed(seed)
        if self.regime.pretrained:
            return pretrained(self.options.weights, self.classes)
        model = small_cnn(self.classes, self.regime.width, self.regime.norm)
        if self.regime.begins_with is not None:
            model[:-1].load_state_dict(self.features)
        return model

    @cached_property
    def features(self) -> dict[str, Tensor]:
        """The weights that training begins with, but for the head."""
        name = self.regime.begins_with
        model, _ = trained(Task(REGIMES[name], self.options), "vanilla", name, "trivialaugment", 0, self.options)
        return model[:-1].state_dict()

    def floats(self, images: Tensor) -> Tensor:
        """Return pixels as the model takes them."""
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        pixels = (pixels - 0.5) / 0.5
        return pixels.contiguous(memory_format=torch.channels_last) if self.regime.pretrained else pixels

    def test_batches(self, tested: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """Return a seeded part of the test images, cropped to the centre."""
        order = torch.randperm(len(self.test.labels), generator=torch.Generator().manual_seed(0))[:tested]
        part = self.test[order.sort().values]
        images = self.floats(v2.functional.center_crop(part.images, [self.regime.size]))
        return list(zip(images.split(50), part.labels.split(50), strict=True))


def digits(regime: Regime, options: argparse.Namespace) -> tuple[Part, Part]:
    """Return what examples/train.py trains on: 300 of scikit-learn's digits, at 32 px."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(raw, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    pixels = nn.functional.interpolate(pixels, size=regime.size, mode="bilinear").clamp(0, 1).expand(-1, 3, -1, -1)
    images, targets = (255 * pixels).round().to(torch.uint8).contiguous(), torch.tensor(labels)
    rows = train_test_split(
        range(len(labels)), train_size=regime.images, stratify=labels, random_state=99 if options.explore else 0
    )
    train, test = (Part(images[part], targets[part]) for part in rows)
    return train, test


def folder(regime: Regime, options: argparse.Namespace) -> tuple[Part, Part]:
    """Return the images of a folder of parquet files, a little larger than the model's, for random crops."""
    from entprop_wrap.integrations.hub_datasets import in_memory, load_images

    path = {"cifar": options.cifar, "pets": options.pets}[regime.data]
    if path is None:
        raise SystemExit(f"--{regime.data} PATH says where the images are.")
    data = load_images(str(path), eval_split="test")
    stored = round(regime.size * 8 / 7) if regime.pretrained else regime.size
    train, test = (in_memory(part, stored) for part in (data.train, data.eval))
    return Part(train.images, train.labels), Part(test.images, test.labels)


def half(part: Part, second: int) -> Part:
    """Return the images of the first or the second half of the classes, numbered from 0."""
    number = (int(part.labels.max()) + 1) // 2
    found = part[part.labels // number == second]
    return Part(found.images, found.labels % number)


def split(part: Part, number: int, seed: int) -> tuple[Part, Part]:
    """Split off a seeded, stratified part of ``number`` images."""
    from sklearn.model_selection import train_test_split

    rows = range(len(part.labels))
    first, second = train_test_split(rows, train_size=number, stratify=part.labels.numpy(), random_state=seed)
    return part[torch.tensor(first)], part[torch.tensor(second)]


def small_cnn(classes: int, width: int, norm: str = "batch") -> nn.Module:
    """Return the CNN of the main job: four convolutions with batch norm, or with another norm."""
    norms = {
        "batch": nn.BatchNorm2d,
        "group": lambda channels: nn.GroupNorm(4, channels),
        "layer": lambda channels: nn.GroupNorm(1, channels),  # over channels and pixels, as "layer norm" of a CNN
    }

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norms[norm](outputs), nn.ReLU()]

    layers = block(3, width, 1) + block(width, 2 * width, 2) + block(2 * width, 4 * width, 2)
    layers += block(4 * width, 4 * width, 2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


def pretrained(path: Path | None, classes: int) -> nn.Module:
    """Return a Hugging Face classifier with a new head."""
    from transformers import AutoModelForImageClassification

    if path is None:
        raise SystemExit("--weights PATH says where the pretrained model is.")
    found = AutoModelForImageClassification.from_pretrained(path, num_labels=classes, ignore_mismatched_sizes=True)
    repair_keep_probabilities(found)
    return found.train().to(memory_format=torch.channels_last)


# Training


def train(task: Task, row: Row, augment: str, seed: int) -> tuple[nn.Module, dict[str, float]]:
    """Train one model; return it without copies, and what it cost."""
    regime, method = task.regime, row.method(task.regime.epsilon)
    part, model = task.part(seed), task.build(seed)
    if method.auxiliaries:
        entprop.wrap(model, auxiliaries=method.auxiliaries, copies=row.copies)
    if row.head_first:
        fit_head(model, task, part)
    groups = entprop.parameter_groups(model, regime.weight_decay)
    if regime.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=regime.learning_rate, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(groups, lr=regime.learning_rate)
    epochs = round(regime.epochs * row.epochs)
    steps = epochs * (len(part.labels) // regime.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps, round(regime.warmup * steps)))
    # The method draws from a generator of its own: the images are those of every other row.
    order, generator = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1000)
    torch.manual_seed(seed)
    average = (
        None
        if row.average is None
        else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(row.average), use_buffers=True)
    )
    first, last = (method if made is None else made(regime.epsilon) for made in (row.first, row.last))
    loading, begin = 0.0, time.process_time()
    for number, (images, labels, seconds) in enumerate(batches(task, part, augment, epochs, order)):
        loading += seconds
        if row.twice:
            with torch.random.fork_rng(devices=[]):  # the images of all rows stay the same
                torch.manual_seed(seed + 1000 + number)
                images = task.floats(TRIVIAL_AUGMENT((images + 1) / 2))
        optimizer.zero_grad()
        chosen = first if number < 0.3 * steps else last if number >= 0.7 * steps else method
        entprop.training_step(model, images, labels, method=chosen, pixel_space=task.space, generator=generator)
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(model)
    model = model if average is None else average.module
    cost = {"seconds": time.process_time() - begin, "loading_seconds": loading, "steps": steps}
    model = entprop.unwrap(model) if method.auxiliaries else model
    if row.recalibrate:
        recalibrate(model, task, part, augment, order)
    return model.eval(), cost


def recalibrate(model: nn.Module, task: Task, part: Part, augment: str, order: torch.Generator) -> None:
    """Estimate the running statistics anew, on images hardened by a signed gradient step."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    hardened = []
    for images, labels, _ in batches(task, part, augment, 4, order):
        leaf = images.requires_grad_()
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(model.eval()(leaf), labels), leaf)
        step = 2 * (task.regime.epsilon or 1 / 255) * gradient.sign()  # pixels are in [-1, 1]
        hardened.append((images.detach() + step).clamp(-1, 1))
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    with torch.no_grad():
        for images in hardened:
            model.train()(images)


def fit_head(model: nn.Module, task: Task, part: Part) -> None:
    """Fit the head on the features of the pretrained model, of images cropped to the centre."""
    images = task.floats(v2.functional.center_crop(part.images, [task.regime.size]))
    linear_probe(model, zip(images.split(50), part.labels.split(50), strict=True))


def halfway(task: Task, model: nn.Module, seed: int) -> nn.Module:
    """Return a model half-way between the weights after training and those when the head was fitted."""
    start = task.build(seed)
    fit_head(start, task, task.part(seed))
    return interpolate(deepcopy(model), start.state_dict()).eval()


def cosine(steps: int, warmup: int) -> Callable[[int], float]:
    """Return the learning rate's factor at a step: linear warm-up, then half a cosine."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def batches(
    task: Task, part: Part, augment: str, epochs: int, order: torch.Generator
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield normalised images, labels and the CPU seconds that they took."""
    changes, size = [*task.transform, *([] if augment == "none" else [augmentation(augment)])], task.regime.batch
    transform = v2.Compose(changes) if changes else None
    for _ in range(epochs):
        rows = torch.randperm(len(part.labels), generator=order)
        for chosen in rows[: len(rows) // size * size].split(size):
            begin = time.process_time()
            images = part.images[chosen]
            if transform is not None:
                images = torch.stack([transform(image) for image in images])
            yield task.floats(images), part.labels[chosen], time.process_time() - begin


# Evaluation


def evaluate(task: Task, models: dict[str, nn.Module], suite: str) -> dict[str, dict[str, float]]:
    """Return SA on all test images and RA on a part of them, by model."""
    chosen = {} if suite == "c" else {"suite": suite}
    robust = task.test_batches(task.regime.tested)
    results = evaluate_robustness(models, robust, pixel_space=task.space, progress=False, **chosen)
    name = {"c": "ra", "c-bar": "ra_bar"}[suite]
    found = {key: {name: result.ra} for key, result in results.items()}
    if suite == "c":
        clean = evaluate_clean(models, task.test_batches())
        for key, scores in found.items():
            scores |= {"sa": clean[key], "hscore": hscore(clean[key], scores["ra"])}
    return found


@torch.no_grad()
def evaluate_clean(models: dict[str, nn.Module], data: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Return the accuracy on clean images, by model."""
    found = {}
    for name, model in models.items():
        outputs = ((model(images), labels) for images, labels in data)
        right = [(getattr(output, "logits", output).argmax(1) == labels) for output, labels in outputs]
        found[name] = torch.cat(right).double().mean().item()
    return found


# Runs


class Runs:
    """Finished runs, a JSON line each. A later line of the same run adds to an earlier one."""

    KEY = ("regime", "augmentation", "row", "seed", "explore")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[tuple[Any, ...], dict[str, Any]] = defaultdict(dict)
        for line in path.read_text().splitlines() if path.exists() else ():
            self._merge(json.loads(line))

    def get(self, *key: Any) -> dict[str, Any]:
        """Return what is known of a run; empty if nothing is."""
        return self.found.get(key, {})

    def add(self, line: dict[str, Any]) -> None:
        """Append a line."""
        self._merge(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _merge(self, line: dict[str, Any]) -> None:
        found = self.found[tuple(line[name] for name in self.KEY)]
        found.update(line)
        if {"sa", "ra_bar"} <= found.keys():
            found["hscore_bar"] = hscore(found["sa"], found["ra_bar"])


def trained(
    task: Task, name: str, regime: str, augment: str, seed: int, options: argparse.Namespace
) -> tuple[nn.Module, dict[str, float]]:
    """Return the model of a row and what it cost: kept, or trained now."""
    key = (regime, augment, name, seed, options.explore)
    kept = None if options.keep is None else options.keep / f"{'-'.join(map(str, key))}.pt"
    if kept is not None and kept.exists():
        saved = torch.load(kept, weights_only=True)
        model = task.build(seed).eval()
        model.load_state_dict(saved["weights"])
        return model, saved["cost"]
    model, cost = train(task, ROWS[name], augment, seed)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"weights": model.state_dict(), "cost": cost}, kept.with_suffix(".part"))
        os.replace(kept.with_suffix(".part"), kept)
    return model, cost


def run(task: Task, regime: str, augment: str, seed: int, runs: Runs, options: argparse.Namespace) -> None:
    """Train and evaluate what is missing of one seed; its models are evaluated together."""
    models, costs = {}, {}
    lines = {name: (regime, augment, name, seed, options.explore) for name in options.rows}
    wanted = [{"c": "ra", "c-bar": "ra_bar"}[suite] for suite in options.suites]
    for name in [name for name, key in lines.items() if not set(wanted) <= set(runs.get(*key))]:
        if (whole := ROWS[name].halfway_of) is None:
            models[name], costs[name] = trained(task, name, regime, augment, seed, options)
        else:
            model, costs[name] = (
                (models[whole], costs[whole])
                if whole in models
                else trained(task, whole, regime, augment, seed, options)
            )
            models[name] = halfway(task, model, seed)
        print(f"{lines[name]}: {costs[name]}", flush=True)
    scores: dict[str, dict[str, float]] = {name: {} for name in models}
    for suite in options.suites if models else ():
        for name, found in evaluate(task, models, suite).items():
            scores[name] |= found
    for name, found in scores.items():
        config = {"method": repr(ROWS[name].method(task.regime.epsilon)), "copies": ROWS[name].copies}
        config |= {**asdict(task.regime), "epochs": round(task.regime.epochs * ROWS[name].epochs)}
        versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
        line = dict(zip(Runs.KEY, lines[name], strict=True))
        runs.add(line | found | costs[name] | {"config": config, "versions": versions})
        print(f"{lines[name]}: {found}", flush=True)


def in_turns(task: Task, names: list[str], augment: str, times: int) -> str:
    """Train rows in turns; return the quartiles of their times, over that of the first."""
    seconds = [[train(task, ROWS[name], augment, seed)[1]["seconds"] for name in names] for seed in range(times)]
    quartiles = {
        name: statistics.quantiles([row[number] / row[0] for row in seconds], n=4)
        for number, name in enumerate(names[1:], start=1)
    }
    return "\n".join(f"{name}: {b:.2f} ({a:.2f} to {c:.2f})" for name, (a, b, c) in quartiles.items())


# Tables


def tables(runs: Runs, options: argparse.Namespace) -> str:
    """Return a table in Markdown for each regime and augmentation that has runs."""
    groups: dict[tuple[str, str], dict[str, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
    for (regime, augment, row, seed, explore), found in runs.found.items():
        if explore == options.explore and "ra" in found:
            groups[regime, augment][row][seed] = found
    order = [(name, augment) for name in REGIMES for augment in ("none", *AUGMENTATIONS) if (name, augment) in groups]
    return "\n\n".join(
        table(f"{regime}, {augment}", groups[regime, augment], options.versus) for regime, augment in order
    )


def table(title: str, rows: dict[str, dict[int, dict[str, Any]]], versus: str) -> str:
    """Return means over seeds, and paired differences to the row ``versus`` with 95 % t-intervals."""
    lines = [
        f"**{title}**",
        "",
        f"| row | seeds | SA | RA | RA on C-bar | Hscore | SA - {versus} | RA | C-bar | Hscore | on C-bar | time "
        "| loading |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base = rows.get(versus, {})
    for name in [name for name in ROWS if name in rows]:
        found = rows[name]
        paired = sorted(found.keys() & base.keys())
        cells = [name, str(len(found)), *(mean(found, score) for score in ("sa", "ra", "ra_bar", "hscore"))]
        for score in ("sa", "ra", "ra_bar", "hscore", "hscore_bar"):
            both = [seed for seed in paired if score in found[seed] and score in base[seed]]
            cells.append(difference([100 * (found[seed][score] - base[seed][score]) for seed in both]))
        ratios = [found[seed]["seconds"] / base[seed]["seconds"] for seed in paired]
        cells.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        cells.append(f"{statistics.median(run['loading_seconds'] / run['seconds'] for run in found.values()):.0%}")
        if name == versus:
            cells[6:11] = [""] * 5
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(found: dict[int, dict[str, Any]], score: str) -> str:
    values = [100 * run[score] for run in found.values() if score in run]
    return f"{statistics.fmean(values):.1f}" if values else ""


def difference(values: list[float]) -> str:
    """Return a mean with its 95 % t-interval, in bold where zero is outside."""
    if not values:
        return ""
    change = Estimate.of(values)
    if change.half_width is None:
        return f"{change.mean:+.1f}"
    text = f"{change.mean:+.1f} ± {change.half_width:.1f}"
    return f"**{text}**" if abs(change.mean) > change.half_width else text


def write_between_markers(page: Path, text: str) -> None:
    """Put ``text`` into a page between ``<!-- recipes -->`` and ``<!-- /recipes -->``."""
    head, _, rest = page.read_text().partition("<!-- recipes -->")
    _, _, tail = rest.partition("<!-- /recipes -->")
    page.write_text(f"{head}<!-- recipes -->\n{text}\n<!-- /recipes -->{tail}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/recipes/runs.jsonl"), help="file of JSON lines")
    parser.add_argument("--regimes", nargs="+", choices=list(REGIMES), default=["digits"])
    parser.add_argument("--augment", nargs="+", choices=("none", *AUGMENTATIONS), default=["none"])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=["c"], help="of corruptions (default: c)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, help="instead of the regimes' own, to try the script")
    parser.add_argument("--cifar", type=Path, help="folder of the CIFAR-10 part")
    parser.add_argument("--pets", type=Path, help="folder of the pets")
    parser.add_argument("--weights", type=Path, help="folder of the pretrained model")
    parser.add_argument("--explore", action="store_true", help="on data apart from the evidence")
    parser.add_argument("--keep", type=Path, help="folder for trained weights")
    parser.add_argument("--turns", type=int, help="train the rows in turns this many times, and print only their times")
    parser.add_argument("--tables", action="store_true", help="tables from what is done; nothing is trained")
    parser.add_argument("--versus", choices=list(ROWS), default="vanilla", help="row that tables compare with")
    parser.add_argument("--write", type=Path, help="page whose <!-- recipes --> part gets the tables")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    runs = Runs(options.runs)
    if not options.tables:
        tasks: dict[str, Task] = {}
        for seed in options.seeds:
            for name in options.regimes:
                regime = REGIMES[name] if options.epochs is None else replace(REGIMES[name], epochs=options.epochs)
                task = tasks.setdefault(name, Task(regime, options)) if name not in tasks else tasks[name]
                for augment in options.augment:
                    if options.turns:
                        print(in_turns(task, options.rows, augment, options.turns))
                        return
                    run(task, name, augment, seed, runs, options)
    text = tables(runs, options)
    print(text)
    if options.write:
        write_between_markers(options.write, text)


if __name__ == "__main__":
    main()
