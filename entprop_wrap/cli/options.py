"""The options of the command line, and what can be checked of them before anything heavy is imported."""

from __future__ import annotations

import argparse
import contextlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

DIGITS = "digits"
SMALL = "small_cnn"
METHODS = (
    *("vanilla", "label_smoothing", "entropy_maximisation", "entprop", "entprop_augmented", "entprop_finetuning"),
    *("random_selection", "shared_norms", "mixprop", "advprop", "fine_grained_advprop", "fast_advprop", "me_ada"),
    *("me_ada_growth", "pgd_at", "trades", "entropic_retraining"),
)
#: Defaults that depend on the data: digits are trained from scratch, everything else fine-tuned.
BY_DATA = {
    "epochs": (60, 10),
    "optimizer": ("sgd", "adamw"),
    "learning_rate": (0.1, 3e-4),
    "weight_decay": (5e-4, 0.01),
    "robustness_images": (500, None),
}


def parse(description: str, arguments: Sequence[str] | None = None) -> Namespace:
    """Read the command line, and check what can be checked without data and model."""
    parser = _parser(description)
    options = parser.parse_args(arguments)
    for name, (digits, others) in BY_DATA.items():
        if getattr(options, name) is None:
            setattr(options, name, digits if options.dataset == DIGITS else others)
    if problem := _problem(options):
        parser.error(problem + ".")
    return options


def run_folder(options: Namespace, method: str, seed: int) -> Path:
    """Return where a run writes."""
    return Path(options.output, f"{method}-seed{seed}")


def number(text: str) -> float:
    """Read 4/255 as well as 0.0157."""
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ArithmeticError):
        raise argparse.ArgumentTypeError(f"expected a number such as 4/255 or 0.016, found {text!r}") from None


def _parser(description: str) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=description, formatter_class=form)
    count = _integer(least=1)

    add = parser.add_argument_group("data").add_argument
    add("--dataset", default=DIGITS, help="digits (default); a folder of class folders or parquet files; or a Hub id")
    augmentations = ("none", "trivialaugment", "randaugment", "augmix", "gaussian")
    add("--augment", choices=augmentations, default="none", help="of training images, in front of every method")
    add("--image-column", help="column of the images, where it is not found by itself")
    add("--label-column", help="column of the labels, such as one of metadata.csv")
    add("--train-split", help="split to train on (default: train)")
    add("--eval-split", help="split to test on (default: validation, else test, else a fifth of train)")
    add("--max-train", type=count, help="maximum number of training images, stratified (digits: 300)")
    add("--max-eval", type=count, help="maximum number of test images, stratified")
    add("--in-memory", action="store_true", help="decode the images once and keep them in memory")
    add("--workers", type=_integer(least=0), default=0, help="data loader processes (default: %(default)s)")

    add = parser.add_argument_group("model").add_argument
    add("--model", default=SMALL, help="%(default)s (default), a torchvision or timm name, a Hub id or a local folder")
    add("--pretrained", action="store_true", help="start from pretrained weights")
    add(
        "--weights",
        type=lambda text: Path(text).resolve(),
        help="start each run from trained weights: a safetensors file, or a run's folder model/",
    )
    add("--linear-probe", action="store_true", help="fit the head of pretrained weights before all weights are trained")
    add(
        "--interpolate",
        type=number,
        metavar="SHARE",
        help="go back towards the weights that training began with: this share of the way is kept, such as 0.5",
    )
    add("--image-size", type=_integer(least=8), help="pixels (default: what the model was made for)")

    add = parser.add_argument_group("method").add_argument
    names = f"what to train and compare (default: vanilla entprop): {', '.join(METHODS)}"
    add("--methods", nargs="+", choices=METHODS, default=["vanilla", "entprop"], metavar="METHOD", help=names)
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="options of the methods by their names in Python, in all that have them: fraction=0.3 attack_steps=5 "
        "epsilon=4/255 mix=none uncertainty=logit_margin; advprop.weight=0.5 in one. An unknown name is answered with "
        "those there are",
    )
    add("--equal-cost", action="store_true", help="fast_advprop for epochs / (1 + k): as many passes as vanilla")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count, help="(default: 10; digits: 60)")
    add("--batch-size", type=_integer(least=2), default=64, help="per process and step (default: %(default)s)")
    add("--eval-batch-size", type=count, default=256, help="of the evaluation (default: %(default)s)")
    add("--optimizer", choices=("adamw", "adam", "sgd"), help="(default: adamw; digits: sgd)")
    add("--learning-rate", type=number, help="(default: 3e-4; digits: 0.1)")
    add("--weight-decay", type=number, help="not applied to norms and biases (default: 0.01; digits: 5e-4)")
    schedules = ("cosine", "linear", "step", "constant")
    add("--schedule", choices=schedules, default="cosine", help="of the learning rate (default: %(default)s)")
    add("--warmup", type=number, default=0.1, help="share of the steps to warm up for (default: %(default)s)")
    add("--max-grad-norm", type=number, help="clip gradients to this norm (default: off)")
    add("--mixed-precision", choices=("no", "bf16", "fp16"), help="(default: accelerate's)")
    add("--channels-last", action="store_true", help="faster convolutions on most hardware")

    add = parser.add_argument_group("runs and results").add_argument
    add("--seed", type=_integer(least=0), default=0, help="first seed (default: %(default)s)")
    add("--seeds", type=count, default=1, help="number of seeds (default: %(default)s)")
    severities = [1, 2, 3, 4, 5]
    add("--severities", type=int, choices=severities, nargs="+", default=severities, help="of the corruptions")
    add("--robustness-images", type=count, help="test on a seeded part of the test images (digits: 500)")
    add("--attack", type=number, metavar="EPSILON", help="also measure accuracy under PGD-20, such as 8/255")
    add("--output", type=Path, default=Path("outputs/train"), help="folder for everything (default: %(default)s)")
    add("--resume", action="store_true", help="continue from the last checkpoints in the output folder")
    return parser


def _integer(least: int) -> Callable[[str], int]:
    """Return what reads an integer of at least ``least``."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if (value := int(text)) >= least:
                return value
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, found {text!r}")

    return read


def _problem(options: Namespace) -> str | None:
    """Return the first thing that is wrong with options that are each in range, or None."""
    if options.equal_cost and "fast_advprop" not in options.methods:
        return "--equal-cost is for fast_advprop: name it in --methods, or leave --equal-cost out"
    if options.weights is None and "entropic_retraining" in options.methods:
        return "entropic_retraining continues from a trained model: add --weights outputs/train/vanilla-seed0/model"
    if options.pretrained and options.model == SMALL:
        return f"--pretrained: {SMALL} has no pretrained weights. Name a model, such as --model resnet18"
    if options.linear_probe and not options.pretrained and options.weights is None:
        return "--linear-probe fits a head on pretrained features: add --pretrained, or --weights FILE"
    if options.interpolate is not None and not (options.linear_probe or options.weights):
        return "--interpolate goes back towards a head that has to be fitted first: add --linear-probe"
    if options.interpolate is not None and not 0 < options.interpolate < 1:
        return f"--interpolate: expected a share between 0 and 1, such as 0.5, found {options.interpolate:g}"
    if options.dataset == DIGITS:
        given = ("eval_split", "image_column", "in_memory", "label_column", "max_eval", "train_split")
        if unused := ["--" + name.replace("_", "-") for name in given if getattr(options, name)]:
            return f"{', '.join(unused)}: not for digits. Name a --dataset, or leave it out"
    seeds = range(options.seed, options.seed + options.seeds)
    folders = [run_folder(options, method, seed) for seed in seeds for method in options.methods]
    if not options.resume and (done := [path for path in folders if (path / "metrics.jsonl").exists()]):
        return f"{done[0]} holds a run. Continue it with --resume, or choose another --output"
    return None
