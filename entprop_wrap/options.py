"""Checks of single options: each raises one error that says what was expected, what was found, what to write."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

from entprop_wrap.errors import ConfigurationError

__all__ = ["check_flag", "check_integer", "check_name", "check_number", "is_integer", "is_number"]


def is_number(value: Any) -> bool:
    """Say whether ``value`` is a finite real number, of Python or NumPy; True, False and text are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def is_integer(value: Any) -> bool:
    """Say whether ``value`` is an integer, of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_number(name: str, value: Any, good: Callable[[float], bool], range_: str) -> None:
    """Raise :class:`ConfigurationError` unless ``value`` is a finite number and ``good``, which ``range_`` says."""
    if not is_number(value) or not good(value):
        raise ConfigurationError(f"{name} must be a number {range_}, found {value!r}.{_hint(name, value)}")


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise :class:`ConfigurationError` unless ``value`` is an integer of at least ``least``."""
    if not is_integer(value) or value < least:
        raise ConfigurationError(f"{name} must be an integer of at least {least}, found {value!r}.{_hint(name, value)}")


def check_flag(name: str, value: Any) -> None:
    """Raise :class:`ConfigurationError` unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be True or False, found {value!r}.")


def check_name(name: str, value: Any, otherwise: str = "") -> None:
    """Raise :class:`ConfigurationError` unless ``value`` can name an auxiliary domain; ``otherwise`` says what else."""
    if not isinstance(value, str) or not value:
        raise ConfigurationError(
            f"{name} must be the name of an auxiliary domain such as 'aux'{otherwise}; found {value!r}."
        )


def _hint(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f" Write {name}={int(value)} if that is meant."
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return ""
        return f" Write {name}={value.strip()}, without quotes."
    return ""
