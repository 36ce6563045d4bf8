"""What was measured and how: the end of a report, without which its numbers say little."""

from __future__ import annotations

import datetime
import platform
import sys
from collections.abc import Mapping
from importlib import metadata

import torch

from entprop_wrap.robustness.reporting.markup import Markup, join, tag
from entprop_wrap.robustness.reporting.subjects import Studied

__all__ = ["protocol", "provenance", "versions"]


def protocol(studied: Studied) -> Markup:
    """Return the definitions of the scores, and what they are the mean over."""
    first, number = studied.first, studied.comparison.seeds
    items = [
        join(
            [
                tag("b", "SA"),
                " is accuracy on images as they are; ",
                tag("b", "RA"),
                " the plain mean of the accuracies under all corruptions and severities; ",
                tag("b", "Hscore"),
                " their harmonic mean (EntProp, Enomoto, UAI 2024, section 4.1). RA is not the mean corruption error.",
            ]
        ),
        join([tag("b", "Measured on"), f" {first.protocol}."]),
    ]
    if not first.is_full:
        items.append(Markup("Published RA is over 15 corruptions x 5 severities: do not compare with it."))
    if first.adversarial or first.shifts:
        items.append(Markup("Attacks and other data sets enter neither RA nor Hscore."))
    items.append(
        Markup(
            "Mean class accuracy is over the classes that occur, on images as they are. Calibration error is the "
            "expected calibration error in 15 equal bins of confidence (Guo et al., ICML 2017); the corrupted one is "
            "the mean over all corruptions and severities."
        )
    )
    if number > 1:
        said = (
            f"Mean and {100 * studied.confidence:g} % t-interval over {number} results for each model. Differences are "
            "paired: results at the same place belong together. Intervals are not corrected for the number of "
            "comparisons."
        )
    else:
        said = "One result for each model: nothing is known of the spread over seeds, and a difference may be chance."
    return tag("ul", *(tag("li", item) for item in [*items, said]))


def provenance(command: str | None, facts: Mapping[str, str] | None) -> Markup:
    """Return a list of what the caller says, the time, and the versions that wrote the page."""
    now = datetime.datetime.now(datetime.timezone.utc)
    rows = {**(facts or {}), "Written": f"{now:%Y-%m-%d %H:%M} UTC", **versions()}
    parts = [join([tag("dt", key), tag("dd", str(value))]) for key, value in rows.items()]
    if command:
        parts.insert(0, join([tag("dt", "Command"), tag("dd", tag("code", command))]))
    return tag("dl", *parts)


def versions() -> dict[str, str]:
    """Return the versions of this package, torch and Python."""
    try:
        own = metadata.version("entprop-wrap")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        own = "not installed"
    return {
        "entprop-wrap": own,
        "torch": str(torch.__version__),
        "Python": f"{platform.python_version()} on {sys.platform}",
    }
