"""Numbers and names in print, and the versions that wrote them."""

from __future__ import annotations

import platform
import sys

import torch

from entprop_wrap import __version__

MINUS = "\N{MINUS SIGN}"


def percent(value: float, decimals: int) -> str:
    """Return 0.91234 as "91.2"."""
    return f"{100 * value:.{decimals}f}"


def points(value: float, decimals: int) -> str:
    """Return 0.0123 as "+1.2", and a negative number with a minus sign as wide as the plus."""
    text = f"{100 * value:+.{decimals}f}"
    return text[1:] if not float(text) else text.replace("-", MINUS)


def versions() -> dict[str, str]:
    """Return the versions of this package, torch and Python."""
    python = f"{platform.python_version()} on {sys.platform}"
    return {"entprop-wrap": __version__, "torch": str(torch.__version__), "Python": python}
