"""What RA is the mean over: corruptions and severities, checked and put in words."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.corruptions import CORRUPTIONS, SUITES

__all__ = ["conditions_of", "in_words", "is_full"]

_SEVERITIES = (1, 2, 3, 4, 5)


def conditions_of(
    corruptions: Sequence[str] | None, severities: Sequence[int], suite: str | None = None
) -> list[tuple[str, int]]:
    """Return every ``(corruption, severity)``.

    Args:
        corruptions: Names from any suite; None: those of ``suite``.
        severities: From 1 to 5.
        suite: Key of ``SUITES``; None: "c", the 15 of ImageNet-C.

    Raises:
        ConfigurationError: An unknown name, a severity out of range, no entry, or one twice; both names and a suite.
    """
    if suite is not None and (not isinstance(suite, str) or suite not in SUITES):
        raise ConfigurationError(f"suite must be one of {', '.join(map(repr, SUITES))}, found {suite!r}.")
    if suite is not None and corruptions is not None:
        raise ConfigurationError("corruptions and suite name the same thing twice. Write one of them.")
    names = tuple(SUITES[suite or "c"]) if corruptions is None else corruptions
    for key, values, example in (("corruptions", names, '("fog",)'), ("severities", severities, "(3,)")):
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigurationError(f"{key} must be a sequence and not empty; found {values!r}. Write {example}.")
    known = {name for suite in SUITES.values() for name in suite}
    for name in names:
        if not isinstance(name, str) or name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known are: {', '.join(sorted(known))}."
            raise ConfigurationError(f"corruptions has an unknown entry {name!r}. {hint}")
    for severity in severities:
        if isinstance(severity, bool) or not isinstance(severity, int) or severity not in _SEVERITIES:
            raise ConfigurationError(f"severities must be ints from 1 (mild) to 5 (strong), found {severity!r}.")
    for key, values in (("corruptions", names), ("severities", severities)):
        if len(set(values)) < len(values):
            raise ConfigurationError(f"{key} has an entry twice, which would count twice in RA: {tuple(values)!r}.")
    return [(name, severity) for name in names for severity in severities]


def is_full(conditions: Collection[tuple[str, int]]) -> bool:
    """Return whether these are the 15 corruptions of ImageNet-C at 5 severities, over which RA is published."""
    return set(conditions) == {(name, severity) for name in CORRUPTIONS for severity in _SEVERITIES}


def in_words(conditions: Collection[tuple[str, int]]) -> str:
    """Return what the conditions are, and that they are not the full protocol where that is so."""
    if is_full(conditions):
        return "15 corruptions x 5 severities"
    if set(conditions) == {(name, severity) for name in SUITES["c-bar"] for severity in _SEVERITIES}:
        return "the 10 corruptions of ImageNet-C-bar x 5 severities"
    names = dict.fromkeys(name for name, _ in conditions)
    severities = ", ".join(map(str, dict.fromkeys(severity for _, severity in conditions)))
    known = sum(name in CORRUPTIONS for name in names)
    extra = len(names) - known
    count = f"{known} of the 15 corruptions" + (f" and {extra} extra" if extra else "")
    listed = "" if known == len(CORRUPTIONS) and not extra else f" ({', '.join(names)})"
    return f"{count}{listed} x severity {severities} - another protocol, not comparable with a full RA"
