"""Methods for train.py: every method by name, made from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

from entprop_wrap import CutMix, EntProp, Method, MixUp, Vanilla, selection
from entprop_wrap.attacks import PGD
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.methods import MEADA, AdversarialTraining, AdvProp, FastAdvProp, FineGrainedAdvProp, MixProp
from entprop_wrap.methods.experimental import EntropicRetraining
from entprop_wrap.trainer import MaximumEntropyGrowth

from . import fields
from .fields import fraction

#: How to build each method from the options of train.py. To add one, add a line.
METHODS: dict[str, Callable[..., Method]] = {
    "vanilla": lambda options: Vanilla(),
    "label_smoothing": lambda options: Vanilla(label_smoothing=given(options.label_smoothing, 0.1)),
    "entropy_maximisation": lambda options: Vanilla(entropy_weight=given(options.entropy_weight, 0.1)),
    "entprop": lambda options: entprop(options),
    "entprop_finetuning": lambda options: finetuning(options),
    "random_selection": lambda options: entprop(options, uncertainty=selection.random, threshold=None),
    "shared_norms": lambda options: entprop(options, auxiliary=None),
    "mixprop": lambda options: MixProp(mix=mixer(options)),
    "advprop": lambda options: AdvProp(attack(options, AdvProp().attack)),
    "fine_grained_advprop": lambda options: fine_grained(options),
    "fast_advprop": lambda options: fast_advprop(options),
    "me_ada": lambda options: MEADA(fraction=options.fraction),
    "me_ada_growth": lambda options: Vanilla(),  # and growth(), below
    "pgd_at": lambda options: adversarial_training(options, "pgd"),
    "trades": lambda options: adversarial_training(options, "trades"),
    "entropic_retraining": lambda options: EntropicRetraining(),
}
#: Go on with trained weights, which --weights names.
TRAINED = ("entropic_retraining",)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add everything that methods are made from."""
    paper = EntProp()
    group = parser.add_argument_group("method")
    group.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        metavar="METHOD",
        default=["vanilla", "entprop"],
        help=f"what to train and compare: {', '.join(METHODS)} (default: vanilla entprop). An option below that "
        "none of them takes is refused: fraction and mixing of entprop_finetuning are its preset's, and "
        "random_selection has no threshold",
    )
    group.add_argument(
        "--fraction",
        type=float,
        default=paper.fraction,
        help="k, the share of the batch that goes through the auxiliary norms (default: 0.2)",
    )
    group.add_argument(
        "--threshold",
        type=float,
        help="select only samples of higher entropy, in nats, and the share k at the most (default: by rank alone)",
    )
    group.add_argument(
        "--attack-steps",
        type=int,
        help="n, gradient steps on the pixels (default: 1, which is free, in EntProp; 5 in AdvProp; 10 in adversarial "
        "training)",
    )
    group.add_argument(
        "--epsilon",
        type=fraction,
        help="largest change of a pixel, such as 4/255 (default: the method's; digits: 0.1, for 16 grey levels)",
    )
    group.add_argument("--step-size", type=fraction, help="change per step (default: derived from epsilon)")
    group.add_argument(
        "--mix",
        choices=["mixup", "cutmix", "none"],
        default="mixup",
        help="how to raise entropy before selection (default: mixup)",
    )
    group.add_argument("--mix-alpha", type=float, default=1.0, help="Beta(alpha, alpha) of the mixing (default: 1)")
    group.add_argument(
        "--mix-on",
        choices=["batch", "auxiliary"],
        default=paper.mix_on,
        help=f"mix the whole batch, or only the auxiliary images (default: {paper.mix_on})",
    )
    group.add_argument(
        "--weighting",
        choices=["per_image", "sum"],
        default=paper.weighting,
        help=f"weight of the auxiliary loss (default: {paper.weighting})",
    )

    group.add_argument(
        "--label-smoothing",
        type=float,
        help="in label_smoothing, pgd_at and trades (default: 0.1 in the first)",
    )
    group.add_argument(
        "--entropy-weight",
        type=float,
        help="in entropy_maximisation, pgd_at and trades (default: 0.1 in the first)",
    )
    group.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="other options, by their names in Python, in all methods that have them: targeted=true "
        f"attack_statistics=batch auxiliary_target=source ascent.steps=5 uncertainty={'|'.join(fields.SCORES)}; "
        "advprop.weight=0.5 in one method. A name that nothing has is answered with those there are",
    )
    group.add_argument(
        "--equal-cost",
        action="store_true",
        help="train fast_advprop for epochs / (1 + k), its published budget: as many passes as vanilla training",
    )


def build(options) -> dict[str, Method]:
    """Return the methods to compare, by name.

    Raises:
        ConfigurationError: The command line gives an option (``options.given``, ``options.set``) that none of them
            takes.
    """
    read = Reads(options)
    methods = {name: METHODS[name](read) for name in options.methods}
    if unread := [name for name in options.given if name not in read.names]:
        raise ConfigurationError(
            f"{', '.join('--' + name.replace('_', '-') for name in unread)}: taken by none of the methods "
            f"{', '.join(methods)}. Leave it out, or name a method in --methods that takes it."
        )
    return fields.apply(options.set, methods, flags())


class Reads:
    """The options, and in ``names`` which of them were asked for: what a method takes."""

    def __init__(self, options) -> None:
        self.options, self.names = options, set()

    def __getattr__(self, name: str):
        self.names.add(name)
        return getattr(self.options, name)


def explicit(parser: argparse.ArgumentParser) -> list[str]:
    """Return which options of methods the command line gives, also where the value is the default."""
    names = flags()
    found = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(names)))  # instead of defaults
    return sorted(name for name in names if getattr(found, name) is not None)


def flags() -> set[str]:
    """Return the options of single methods that have a flag."""
    own = argparse.ArgumentParser(add_help=False)
    add_options(own)
    return vars(own.parse_args([])).keys() - {"methods", "equal_cost", "set"}


def epochs(method: Method, options) -> int:
    """Return for how many epochs to train: fewer where a method has a published budget and it is asked for."""
    if options.equal_cost and isinstance(method, FastAdvProp):
        return method.equal_cost_epochs(options.epochs)
    return options.epochs


def growth(name: str, options) -> MaximumEntropyGrowth | None:
    """Return how the training data grows, as published for CIFAR: twice, after each tenth of the epochs."""
    if name != "me_ada_growth":
        return None
    return MaximumEntropyGrowth.cifar(every=max(1, options.epochs // 10))


def entprop(options, **changes) -> EntProp:
    """Return EntProp or a variation of it."""
    names = {"fraction", "epsilon", "step_size", "threshold", "mix_on", "weighting"} - changes.keys()
    return EntProp(
        attack_steps=given(options.attack_steps, EntProp().attack_steps),
        mix=mixer(options),
        **{name: getattr(options, name) for name in names},
        **changes,
    )


def finetuning(options) -> EntProp:
    """Return the preset for fine-tuning: how many images, and how they are mixed, is what it is about."""
    chosen = {name: getattr(options, name) for name in ("attack_steps", "epsilon", "step_size")}
    return EntProp.finetuning(**{name: value for name, value in chosen.items() if value is not None})


def fast_advprop(options) -> FastAdvProp:
    """Return Fast AdvProp, whose one step is as long as epsilon."""
    return FastAdvProp(fraction=options.fraction, epsilon=given(options.epsilon, FastAdvProp().epsilon))


def fine_grained(options) -> FineGrainedAdvProp:
    """Return AdvProp with a weak and a strong attack: a quarter of epsilon in one step, and all of it."""
    strong = attack(options, AdvProp().attack)
    weak = PGD(strong.epsilon / 4, steps=1, step_size=strong.epsilon / 4, random_start=False)
    return FineGrainedAdvProp({"weak": weak, "strong": strong})


def adversarial_training(options, kind: str) -> AdversarialTraining:
    """Return PGD-AT or TRADES, with the two terms that raise entropy where they are asked for."""
    return AdversarialTraining(
        attack=attack(options, AdversarialTraining().attack),
        kind=kind,
        entropy_weight=given(options.entropy_weight, 0.0),
        label_smoothing=given(options.label_smoothing, 0.0),
    )


def attack(options, default: PGD) -> PGD:
    """Return a method's own attack, changed as far as the command line says; its steps keep their share of epsilon."""
    made = default if options.epsilon is None else default.at(options.epsilon)
    changes = {"steps": options.attack_steps, "step_size": options.step_size}
    return replace(made, **{name: value for name, value in changes.items() if value is not None})


def mixer(options) -> MixUp | CutMix | None:
    """Return what mixes images."""
    return None if options.mix == "none" else {"mixup": MixUp, "cutmix": CutMix}[options.mix](options.mix_alpha)


def given(value, default):
    """Return what the command line says, or else the default."""
    return default if value is None else value
