"""How numbers are written: accuracies in percent, differences in percentage points, intervals behind them."""

from __future__ import annotations

from entprop_wrap.robustness.comparison import Estimate
from entprop_wrap.robustness.reporting.markup import Markup, join, tag

__all__ = ["estimate", "name_of", "percent", "points"]

_MINUS = "\N{MINUS SIGN}"


def percent(value: float) -> str:
    """Return 0.91234 as "91.23"."""
    return f"{100 * value:.2f}"


def points(value: float) -> str:
    """Return 0.0123 as "+1.23", and a negative number with a minus sign as wide as the plus."""
    text = f"{100 * value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", _MINUS)


def estimate(value: Estimate, *, difference: bool = False) -> Markup:
    """Return mean and, where there are several seeds, the half width of the interval."""
    mean = (points if difference else percent)(value.mean)
    if value.half_width is None:
        return join([mean])
    return join([mean, " ", tag("span", f"± {percent(value.half_width)}", class_="spread")])


def name_of(corruption: str) -> str:
    """Return "gaussian_noise" as "gaussian noise"."""
    return corruption.replace("_", " ")
