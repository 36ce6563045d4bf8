"""Corruptions and severities that RA is the mean over, checked and put in words."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.corruptions import CORRUPTIONS, SUITES, check_corruption
from entprop_wrap.utils.options import check_choice, check_integer, check_sequence

__all__ = ["conditions_of", "in_words", "is_full"]

_SEVERITIES = (1, 2, 3, 4, 5)


def conditions_of(
    corruptions: Sequence[str] | None, severities: Sequence[int], suite: str | None = None
) -> list[tuple[str, int]]:
    """Return every ``(corruption, severity)``, checked: of names from any suite, or of all in ``suite``; None: "c"."""
    if suite is not None and corruptions is not None:
        raise ConfigurationError("corruptions and suite name the same thing twice. Write one of them.")
    of_suite = tuple(SUITES[check_choice("suite", "c" if suite is None else suite, tuple(SUITES))])
    names = check_sequence("corruptions", of_suite if corruptions is None else corruptions, "names", '("fog",)')
    severities = check_sequence("severities", severities, "integers", "(3,)")
    for name in names:
        check_corruption("An entry of corruptions", name)
    for severity in severities:
        check_integer("An entry of severities", severity, 1, 5)
    for key, values in (("corruptions", names), ("severities", severities)):
        if len(set(values)) < len(values):
            raise ConfigurationError(f"{key} has an entry twice, which would count twice in RA: {values!r}.")
    return [(name, severity) for name in names for severity in severities]


def is_full(conditions: Collection[tuple[str, int]]) -> bool:
    """Return whether these are the 15 corruptions of ImageNet-C at 5 severities, over which RA is published."""
    return set(conditions) == set(conditions_of(None, _SEVERITIES))


def in_words(conditions: Collection[tuple[str, int]]) -> str:
    """Return what the conditions are, and that they are not the full protocol where that is so."""
    if is_full(conditions):
        return "15 corruptions x 5 severities"
    if set(conditions) == set(conditions_of(None, _SEVERITIES, "c-bar")):
        return "the 10 corruptions of ImageNet-C-bar x 5 severities"
    names = dict.fromkeys(name for name, _ in conditions)
    severities = ", ".join(map(str, dict.fromkeys(severity for _, severity in conditions)))
    known = sum(name in CORRUPTIONS for name in names)
    extra = len(names) - known
    count = f"{known} of the 15 corruptions" + (f" and {extra} extra" if extra else "")
    listed = "" if known == len(CORRUPTIONS) and not extra else f" ({', '.join(names)})"
    return f"{count}{listed} x severity {severities} - another protocol, not comparable with a full RA"
