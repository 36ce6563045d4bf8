"""--set of train.py: the options of methods that have no flag, by the names of their fields."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from typing import Any, get_args, get_type_hints

from entprop_wrap import Method, selection
from entprop_wrap.errors import ConfigurationError

#: What images may be selected by: values of "uncertainty".
SCORES = {
    "entropy": selection.entropy,
    "cross-entropy": selection.cross_entropy,
    "confidence": selection.least_confidence,
    "margin": selection.logit_margin,
    "random": selection.random,
}
WORDS = {"true": True, "false": False, "none": None}
#: Not to be set, by the name of the method: what it stands for. Nor, in any, names of auxiliary domains.
FIXED = {"random_selection": "uncertainty", "pgd_at": "kind", "trades": "kind"}


def apply(assignments: Iterable[str], methods: Mapping[str, Method], flags: Collection[str]) -> dict[str, Method]:
    """Return the methods with fields changed, each in all methods that have it.

    Args:
        assignments: ``field=value``; ``ascent.steps=5`` for a field of a field, ``advprop.weight=0.5`` for one method.
        methods: By name.
        flags: Options that have a flag, which is to be used.

    Raises:
        ConfigurationError: No ``=``, a field that has a flag or that no method has, or a value that a method refuses.
    """
    changes: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for assignment in assignments:
        field, equals, value = (part.strip() for part in assignment.partition("="))
        if not equals:
            raise ConfigurationError(f"--set {assignment}: expected NAME=VALUE, such as targeted=true.")
        owner, _, rest = field.partition(".")
        chosen, field = ([owner], rest) if owner in methods else (list(methods), field)
        if flag := flag_of(field, flags):
            raise ConfigurationError(f"--set {assignment}: write --{flag.replace('_', '-')} for that.")
        takers = [name for name in chosen if field in settable(name, methods[name], flags)]
        if not takers:
            there = [f"{name}: {', '.join(settable(name, methods[name], flags)) or 'nothing'}" for name in chosen]
            raise ConfigurationError(f"--set {assignment}: there is no {field!r} to set in {'; in '.join(there)}.")
        for name in takers:
            changes[name][field] = read(field, value, text=takes_text(methods[name], field))
    return {name: changed(method, changes[name]) for name, method in methods.items()}


def settable(name: str, method: Method, flags: Collection[str]) -> list[str]:
    """Return the fields of the method ``name`` that have no flag and are not what it is about."""
    without = {"auxiliary", FIXED.get(name)}
    return [field for field in plain_fields(method) if field not in without and not flag_of(field, flags)]


def flag_of(field: str, flags: Collection[str]) -> str | None:
    """Return the flag for a field: --attack-steps for attack_steps and attack.steps, --epsilon for attack.epsilon."""
    return next((x for x in (field, field.replace(".", "_"), field.removeprefix("attack.")) if x in flags), None)


def plain_fields(value: Any) -> list[str]:
    """Return the names of all fields that can be written on a command line; of those in a field, ``outer.inner``."""
    found = []
    for field in fields(value):
        inner = getattr(value, field.name)
        if is_dataclass(inner):
            found += [f"{field.name}.{name}" for name in plain_fields(inner)]
        elif inner is None or isinstance(inner, (bool, int, float, str)) or field.name == "uncertainty":
            found.append(field.name)
    return found


def changed(value: Any, changes: Mapping[str, Any]) -> Any:
    """Return a dataclass with all ``changes`` made at once: its own checks see them together."""
    parts: dict[str, dict[str, Any]] = {}
    for name, new in changes.items():
        outer, _, inner = name.partition(".")
        parts.setdefault(outer, {})[inner] = new
    return replace(
        value,
        **{name: part[""] if "" in part else changed(getattr(value, name), part) for name, part in parts.items()},
    )


def takes_text(value: Any, field: str) -> bool:
    """Return whether a field holds text, such as the name of a layer, where numbers are names too."""
    outer, _, inner = field.partition(".")
    if inner:
        return takes_text(getattr(value, outer), inner)
    hint = get_type_hints(type(value))[outer]
    return str in (hint, *get_args(hint))


def read(field: str, value: str, *, text: bool) -> Any:
    """Return what a value means: true, false, none, a number such as 4/255 (no ``text``), a score, or the text.

    Whether it fits is for the method to say.
    """
    if field == "uncertainty":
        if value not in SCORES:
            raise ConfigurationError(f"--set {field}={value}: expected one of {', '.join(SCORES)}.")
        return SCORES[value]
    if value.lower() in WORDS:
        return WORDS[value.lower()]
    for kind in () if text else (int, fraction):
        try:
            return kind(value)
        except (ValueError, ZeroDivisionError):
            continue
    return value


def fraction(text: str) -> float:
    """Read 4/255 as well as 0.0157."""
    return float(Fraction(text))
