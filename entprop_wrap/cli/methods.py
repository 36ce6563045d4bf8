"""Every method by name, made from the command line: options are the fields of its dataclass."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

from entprop_wrap.cli.options import DIGITS, number
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.functional.attacks import PGD
from entprop_wrap.functional.mixing import find_mixer
from entprop_wrap.methods import (
    MEADA,
    AdversarialTraining,
    AdvProp,
    EntProp,
    FastAdvProp,
    FineGrainedAdvProp,
    MixProp,
    Vanilla,
)
from entprop_wrap.methods.entropic_retraining import EntropicRetraining
from entprop_wrap.utils.options import is_number


def weak_and_strong(one: AdvProp) -> FineGrainedAdvProp:
    """Return AdvProp with two attacks: a quarter of its epsilon in one step, and its own."""
    assert isinstance(one.attack, PGD)
    epsilon = one.attack.epsilon / 4
    branches = {"weak": PGD(epsilon, steps=1, step_size=epsilon, random_start=False), "strong": one.attack}
    return FineGrainedAdvProp(branches, one.weight, one.targeted, one.attack_statistics)


#: To add a method, add a line, and its name in options.METHODS.
METHODS: dict[str, Callable[[], Any]] = {
    "vanilla": Vanilla,
    "label_smoothing": partial(Vanilla, label_smoothing=0.1),
    "entropy_maximisation": partial(Vanilla, entropy_weight=0.1),
    "entprop": EntProp,
    "entprop_augmented": EntProp.augmented,
    "entprop_finetuning": EntProp.finetuning,
    "random_selection": partial(EntProp, uncertainty="random"),
    "shared_norms": partial(EntProp, auxiliary=None),
    "mixprop": MixProp,
    "advprop": AdvProp,
    "fine_grained_advprop": AdvProp,  # and weak_and_strong()
    "fast_advprop": FastAdvProp,
    "me_ada": partial(MEADA, fraction=0.2),
    "me_ada_growth": Vanilla,  # and run.phases()
    "pgd_at": AdversarialTraining,
    "trades": partial(AdversarialTraining, kind="trades"),
    "entropic_retraining": EntropicRetraining,
}
#: What a name stands for: not to be changed under this name.
FIXED = {
    "vanilla": ("label_smoothing", "entropy_weight"),
    "label_smoothing": ("entropy_weight",),
    "entropy_maximisation": ("label_smoothing",),
    "entprop_augmented": ("mix", "mix.alpha", "mix_on"),
    "entprop_finetuning": ("fraction", "mix", "mix.alpha", "mix_on"),
    "random_selection": ("uncertainty",),
    "me_ada_growth": ("label_smoothing", "entropy_weight"),
    "pgd_at": ("kind",),
    "trades": ("kind",),
}
#: Fields that hold a dataclass, which text can name.
NAMED = ("mix", "view")
WORDS = {"true": True, "false": False, "none": None}


def build(options: Namespace) -> dict[str, Any]:
    """Return the methods to compare, by name; raise where none of them takes an option, or one refuses its value."""
    methods = {name: METHODS[name]() for name in options.methods}
    changes: dict[str, dict[str, Any]] = {name: {} for name in methods}
    if options.dataset == DIGITS:  # 16 grey levels
        for name, method in methods.items():
            if taken := field_for(name, method, "epsilon"):
                changes[name][taken] = 0.1
    for assignment in options.set:
        for name, (taken, value) in _assigned(assignment, methods).items():
            changes[name][taken] = value
    made = {name: changed(method, changes[name]) for name, method in methods.items()}
    return {name: weak_and_strong(one) if name == "fine_grained_advprop" else one for name, one in made.items()}


def _assigned(assignment: str, methods: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the field and the value that ``--set`` gives to each method: of one, or of all that have the field."""
    field, equals, text = (part.strip() for part in assignment.partition("="))
    if not equals:
        raise ConfigurationError(f"--set {assignment}: expected NAME=VALUE, such as targeted=true.")
    owner, _, rest = field.partition(".")
    chosen, field = ([owner], rest) if owner in methods else (list(methods), field)
    takers = {name: taken for name in chosen if (taken := field_for(name, methods[name], field))}
    if not takers:
        known = {name: settable(name, methods[name]) for name in chosen}
        there = "; ".join(f"{name}: {', '.join(names) or 'nothing'}" for name, names in known.items())
        raise ConfigurationError(f"--set {assignment}: there is no {field!r} to set in {there}.")
    return {name: (taken, read(taken, text)) for name, taken in takers.items()}


def settable(name: str, method: Any) -> list[str]:
    """Return the fields of the method ``name`` that can be changed; of those in a field, ``outer.inner``."""
    return [field for field in field_names(method) if field not in ("auxiliary", *FIXED.get(name, ()))]


def field_for(name: str, method: Any, field: str) -> str | None:
    """Return the field of a method that an option means: ``attack.steps`` for attack_steps; None: it has none."""
    known = settable(name, method)
    names = (field, field.replace("attack_", "attack.", 1), f"attack.{field}")
    return next((one for one in names if one in known), None)


def field_names(value: Any) -> list[str]:
    """Return the names of the fields of a dataclass that can be written as text, and of the dataclasses in it."""
    found = []
    for field in fields(value):
        inner = getattr(value, field.name)
        if not is_dataclass(inner) or field.name in NAMED:
            found.append(field.name)
        if is_dataclass(inner):
            found += [f"{field.name}.{name}" for name in field_names(inner)]
    return found


def changed(value: Any, changes: Mapping[str, Any]) -> Any:
    """Return a dataclass with all ``changes`` made at once: its own checks see them together."""
    parts: dict[str, dict[str, Any]] = {}
    for name, new in changes.items():
        outer, _, inner = name.partition(".")
        parts.setdefault(outer, {})[inner] = new
    if isinstance(value, PGD) and is_number(changes.get("epsilon")):  # steps keep their share of epsilon
        value = value.at(parts.pop("epsilon")[""])
    made = {}
    for name, part in parts.items():
        inner = part.pop("", getattr(value, name))
        if part and not is_dataclass(inner):
            raise ConfigurationError(f"--set {name}.{next(iter(part))}: {name} is {inner!r}, which has no options.")
        made[name] = changed(inner, part) if part else inner
    return replace(value, **made)


def read(field: str, text: str) -> Any:
    """Return what a value means: true, false, none, a number such as 4/255, a mixer, or the text.

    Whether it fits is for the method to say.
    """
    if field == "mix":  # of which mix.alpha may be set, too
        return find_mixer(text)
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    if field in ("layers", "ascent.layer"):  # names, which may look like numbers
        return text
    try:
        value = number(text)
    except ArgumentTypeError:
        return text
    return int(value) if value.is_integer() else value
