"""Numbers and names in print, and the versions that wrote them."""

from __future__ import annotations

import platform
import sys

import torch

from entprop_wrap import __version__
from entprop_wrap.robustness import RobustnessResult

__all__ = ["corruption_name", "decimals_of", "percent", "points", "versions"]

MINUS = "\N{MINUS SIGN}"


def decimals_of(result: RobustnessResult) -> int:
    """Return the decimals that a percentage of this many images deserves: below 10,000 the second one is noise."""
    return 1 if result.clean.images < 10_000 else 2


def percent(value: float, decimals: int) -> str:
    """Return 0.91234 as "91.2"."""
    return f"{100 * value:.{decimals}f}"


def points(value: float, decimals: int) -> str:
    """Return 0.0123 as "+1.2", and a negative number with a minus sign as wide as the plus."""
    text = f"{100 * value:+.{decimals}f}"
    return text[1:] if not float(text) else text.replace("-", MINUS)


def corruption_name(key: str) -> str:
    """Return "gaussian_noise" as "gaussian noise"."""
    return key.replace("_", " ")


def versions() -> dict[str, str]:
    """Return the versions of this package, torch and Python."""
    python = f"{platform.python_version()} on {sys.platform}"
    return {"entprop-wrap": __version__, "torch": str(torch.__version__), "Python": python}
