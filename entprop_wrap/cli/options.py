"""The options of the command line, each a field, and what can be checked of them before anything heavy is imported."""

# ruff: noqa: RUF009 - option() returns a field
from __future__ import annotations

import argparse
import contextlib
import difflib
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

DIGITS = "digits"
SMALL = "small_cnn"
METHODS = (
    *("vanilla", "label_smoothing", "entropy_maximisation", "entprop", "entprop_augmented", "entprop_finetuning"),
    *("random_selection", "shared_norms", "mixprop", "advprop", "fine_grained_advprop", "fast_advprop", "me_ada"),
    *("me_ada_growth", "pgd_at", "trades", "entropic_retraining"),
)
#: Methods that continue from trained weights, which --weights names.
TRAINED = ("entropic_retraining",)


def fraction(text: str) -> float:
    """Read 4/255 as well as 0.0157."""
    try:
        return float(Fraction(text.replace(" ", "")))
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"expected a number such as 4/255 or 0.016, found {text!r}") from None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?", or nothing where no known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def option(help: str, default: Any = None, **metadata: Any) -> Any:
    """Return a field. ``least`` and ``most`` bound it, ``choices`` lists its values, ``read`` reads it from text."""
    made = {"default_factory": lambda: list(default)} if isinstance(default, tuple) else {"default": default}
    return field(**made, metadata={"help": help, **metadata})


@dataclass
class DataOptions:
    """Data."""

    dataset: str = option("digits; a folder of class folders or of parquet files; or a Hub id", DIGITS)
    augment: Literal["none", "trivialaugment", "randaugment", "augmix", "gaussian"] = option(
        "augmentation of training images, in front of every method", "none"
    )
    image_column: str | None = option("column of the images, where it is not found by itself")
    label_column: str | None = option("column of the labels, such as one of metadata.csv")
    train_split: str | None = option("split to train on (default: train)")
    eval_split: str | None = option("split to test on (default: validation, else test, else a fifth of train)")
    max_train: int | None = option("maximum number of training images, stratified (digits: 300)", least=1)
    max_eval: int | None = option("maximum number of test images, stratified", least=1)
    in_memory: bool = option("decode the images once and keep them in memory", False)
    workers: int = option("data loader processes", 0, least=0)


@dataclass
class ModelOptions:
    """Model."""

    model: str = option("small_cnn, a torchvision or timm name, a Hub id or a local folder", SMALL)
    pretrained: bool = option("start from pretrained weights", False)
    weights: Path | None = option("start each run from trained weights: a safetensors file, or a run's folder model/")
    image_size: int | None = option("pixels (default: what the model was made for)", least=8)


@dataclass
class MethodOptions:
    """Method. None: the method's own default."""

    methods: list[str] = option("what to train and compare", ("vanilla", "entprop"), choices=METHODS)
    fraction: float | None = option("k, the share of the batch for the auxiliary norms (default: 0.2)")
    threshold: float | None = option("select only samples of higher entropy, in nats, and at most the share k")
    attack_steps: int | None = option(
        "n, gradient steps on the pixels (default: entprop 1, which is free; advprop 5)", least=0
    )
    epsilon: float | None = option("largest change of a pixel, such as 4/255 (digits: 0.1, for 16 grey levels)")
    step_size: float | None = option("change per step (default: derived from epsilon)")
    mix: Literal["mixup", "cutmix", "none"] | None = option("how to raise entropy before selection (default: mixup)")
    mix_alpha: float | None = option("Beta(alpha, alpha) of the mixing (default: 1)")
    mix_on: Literal["batch", "auxiliary"] | None = option("mix the batch, or the auxiliary images (default: batch)")
    weighting: Literal["per_image", "sum"] | None = option("weight of the auxiliary loss (default: per_image)")
    label_smoothing: float | None = option("in label_smoothing (default: 0.1), pgd_at and trades")
    entropy_weight: float | None = option("in entropy_maximisation (default: 0.1), pgd_at and trades")
    set: list[str] = option(
        "other options by their names in Python, in all methods that have them: targeted=true ascent.steps=5 "
        "uncertainty=margin; advprop.weight=0.5 in one. An unknown name is answered with those there are",
        (),
        metavar="NAME=VALUE",
    )
    equal_cost: bool = option("train fast_advprop for epochs / (1 + k): as many passes as vanilla training", False)


@dataclass
class TrainingOptions:
    """Training."""

    epochs: int = option("(default: 10; digits: 60)", least=1)
    batch_size: int = option("images per process and step", 64, least=2)
    eval_batch_size: int = option("images per batch of the evaluation", 256, least=1)
    optimizer: Literal["adamw", "adam", "sgd"] = option("(default: adamw; digits: sgd)")
    learning_rate: float = option("(default: 3e-4; digits: 0.1)")
    weight_decay: float = option("not applied to norms and biases (default: 0.01; digits: 5e-4)")
    schedule: Literal["cosine", "linear", "step", "constant"] = option("of the learning rate", "cosine")
    warmup: float = option("share of the steps to warm up for", 0.1)
    max_grad_norm: float | None = option("clip gradients to this norm (default: off)")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = option("(default: accelerate's)")
    channels_last: bool = option("faster convolutions on most hardware", False)


@dataclass
class ResultOptions:
    """Runs and results."""

    seed: int = option("first seed", 0, least=0)
    seeds: int = option("number of seeds", 1, least=1)
    severities: list[int] = option("of the corruptions", (1, 2, 3, 4, 5), least=1, most=5)
    robustness_images: int | None = option("test on a seeded part of the test images (digits: 500)", least=1)
    attack: float | None = option("also measure accuracy under PGD-20 within EPSILON, such as 8/255", metavar="EPSILON")
    monitor: bool = option("warn of training that fails quietly (entprop_wrap.diagnostics.Monitor)", False)
    output: Path = option("folder for everything", Path("outputs/train"))
    resume: bool = option("continue from the last checkpoints in the output folder", False)


GROUPS = (DataOptions, ModelOptions, MethodOptions, TrainingOptions, ResultOptions)


@dataclass
class Options(ResultOptions, TrainingOptions, MethodOptions, ModelOptions, DataOptions):
    """All options. Some defaults depend on the data: digits are trained from scratch, everything else fine-tuned."""

    def __post_init__(self) -> None:
        digits = self.dataset == DIGITS
        defaults = {
            "epochs": 60 if digits else 10,
            "optimizer": "sgd" if digits else "adamw",
            "learning_rate": 0.1 if digits else 3e-4,
            "weight_decay": 5e-4 if digits else 0.01,
            "robustness_images": 500 if digits else None,
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def run_folder(self, method: str, seed: int) -> Path:
        """Return where a run writes."""
        return self.output / f"{method}-seed{seed}"

    def problem(self) -> str | None:
        """Return the first thing that is wrong with options that are each in range, or None."""
        if self.equal_cost and "fast_advprop" not in self.methods:
            return "--equal-cost is for fast_advprop: name it in --methods, or leave --equal-cost out"
        if self.weights is None and (found := [name for name in TRAINED if name in self.methods]):
            return (
                f"{found[0]} continues from a trained model: train one, and name its weights, such as --weights "
                "outputs/train/vanilla-seed0/model"
            )
        if self.pretrained and self.model == SMALL:
            return f"--pretrained: {SMALL} has no pretrained weights. Name a model, such as --model resnet18"
        if self.mix == "none" and self.mix_alpha is not None:
            return "--mix-alpha: there is no mixing with --mix none. Leave one of them out"
        if self.dataset == DIGITS:
            given = {"train_split", "eval_split", "image_column", "label_column", "max_eval", "in_memory"}
            if unused := [flag(name) for name in sorted(given) if getattr(self, name)]:
                return f"{', '.join(unused)}: not for digits. Name a --dataset, or leave it out"
        return self._problem_of_output()

    def _problem_of_output(self) -> str | None:
        place = next(path for path in (self.output, *self.output.absolute().parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            return f"--output {self.output}: cannot write to {place} ({error.strerror}). Choose another folder"
        seeds = range(self.seed, self.seed + self.seeds)
        folders = [self.run_folder(method, seed) for seed in seeds for method in self.methods]
        if not self.resume and (done := [path for path in folders if (path / "metrics.jsonl").exists()]):
            return f"{done[0]} holds a run. Continue it with --resume, or choose another --output"
        return None


class Parser(argparse.ArgumentParser):
    """Errors are a line of usage and a line that says what to write."""

    def error(self, message: str) -> NoReturn:
        """Exit with a message."""
        self.exit(2, f"usage: {self.prog} [options]   (--help lists them)\nerror: {message}\n")


def parse(description: str, arguments: Sequence[str] | None = None) -> Options:
    """Read the command line, and check what can be checked without data and model."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(usage="%(prog)s [options]", description=description, formatter_class=form)
    for group in GROUPS:
        _add(parser, group)
    found, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag(one.name) for one in fields(Options)]
        parser.error(f"unknown option {unknown[0]}.{did_you_mean(unknown[0].partition('=')[0], flags)}")
    options = Options(**vars(found))
    if problem := options.problem():
        parser.error(problem + ".")
    return options


def flag(name: str) -> str:
    """Return the option for a field."""
    return "--" + name.replace("_", "-")


def _add(parser: argparse.ArgumentParser, group: type) -> None:
    """Add a flag for each field of a group of options."""
    place = parser.add_argument_group(str(group.__doc__).partition(".")[0].lower())
    hints = get_type_hints(group)
    for one in fields(group):
        hint, about = hints[one.name], one.metadata
        if hint is bool:
            place.add_argument(flag(one.name), action="store_true", help=about["help"])
            continue
        kind = next(part for part in (get_args(hint) or (hint,)) if part is not type(None))
        literal = hint if get_origin(hint) is Literal else kind
        choices = get_args(literal) if get_origin(literal) is Literal else about.get("choices")
        default: Any = one.default_factory() if callable(one.default_factory) else one.default
        many = get_origin(hint) is list
        shown = " ".join(map(str, default)) if many else default
        read: Callable[[str], Any] = {int: _integer(about), float: fraction}.get(kind, kind)
        extra: dict[str, Any] = {"nargs": "+", "action": "extend" if one.name == "set" else "store"} if many else {}
        place.add_argument(
            flag(one.name),
            type=str if choices else read,
            choices=choices,
            default=default,
            help=about["help"]
            + (f": {', '.join(choices)}" if choices else "")
            + ("" if shown in (None, "") else f" (default: {shown})"),
            metavar=about.get("metavar", one.name.upper()),
            **extra,
        )


def _integer(about: Mapping[str, Any]) -> Callable[[str], int]:
    """Return what reads an integer within the bounds of an option."""
    least, most = about.get("least", 0), about.get("most", math.inf)

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= (value := int(text)) <= most:
                return value
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"expected an integer {bounds}, found {text!r}")

    return read
