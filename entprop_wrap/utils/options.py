"""Checks of single options: each returns the value as Python's own, or raises one error.

The error says what was expected, what was found, what to write. NumPy's scalars and arrays of no dimension serve
wherever Python's numbers, text and flags do.
"""

from __future__ import annotations

import inspect
import numbers
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from entprop_wrap.errors import ConfigurationError

#: The largest integer of a tensor.
_MOST = 2**63 - 1


def as_python(value: Any) -> Any:
    """Return a scalar of NumPy as Python's own, other real numbers and huge integers as a float, the rest as it is."""
    value = _item(value)
    usual = isinstance(value, float) or (isinstance(value, int) and abs(value) <= _MOST)
    return float(value) if is_number(value) and not usual else value


def store_as_python(options: Any) -> None:
    """Store what a dataclass, frozen or not, was given :func:`as_python`; for the top of ``__post_init__``."""
    for field in fields(options):
        object.__setattr__(options, field.name, as_python(getattr(options, field.name)))


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite real number, of Python or NumPy; True, False and text are not."""
    value = _item(value)
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and bool(abs(value) <= sys.float_info.max)


def check_number(name: str, value: Any, good: Callable[[float], bool], range_: str) -> float:
    """Return a finite number that is ``good``, which ``range_`` says in words."""
    if not is_number(value) or not good(as_python(value)):
        _refuse(name, f"a number {range_}", value)
    found: float = as_python(value)
    return found


def check_integer(name: str, value: Any, least: int, most: int = _MOST) -> int:
    """Return an integer, of Python or NumPy, from ``least`` to ``most``; True and False are not."""
    found = _item(value)
    whole = isinstance(found, numbers.Integral) and not isinstance(found, bool)
    if not whole or not least <= found <= most:
        limit = f" and at most {most}" if whole and found > most else ""
        _refuse(name, f"an integer of at least {least}{limit}", value)
    return int(found)


def check_seed(value: Any) -> int:
    """Return a seed: an integer from 0 to 2**63 - 1."""
    return check_integer("seed", value, 0)


def check_flag(name: str, value: Any) -> bool:
    """Return True or False."""
    if not isinstance(flag := as_python(value), bool):
        _refuse(name, "True or False", value)
    return flag


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Return one of several words."""
    if not isinstance(value := as_python(value), str) or value not in allowed:
        *most, last = map(repr, allowed)
        _refuse(name, f"{', '.join(most)} or {last}", value)
    return value


def check_name(name: str, value: Any, otherwise: str = "") -> str:
    """Return the name of an auxiliary domain; ``otherwise`` says what else could stand there."""
    if not isinstance(value := as_python(value), str) or not value:
        _refuse(name, f"the name of an auxiliary domain such as 'aux'{otherwise}", value)
    return value


def check_text(name: str, value: Any) -> str:
    """Return text that can be shown: not blank, and of characters that a file can hold."""
    if not isinstance(value := as_python(value), str) or not value.strip() or re.search("[\ud800-\udfff]", value):
        _refuse(name, "text", value)
    return str(value)


def check_mapping(name: str, value: Any, what: str, example: str) -> dict[str, Any]:
    """Return a copy of a dict with names as keys; None is an empty one. ``what`` it holds is not looked at."""
    value = {} if value is None else value
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key for key in value):
        found = shown(value) if isinstance(value, Mapping) else type(value).__name__
        raise ConfigurationError(f"{name} must be a dict of {what} by name, found {found}. Write {example}.")
    return dict(value)


def check_sequence(name: str, value: Any, what: str, example: str) -> tuple[Any, ...]:
    """Return a list, tuple, range or vector as a tuple, not empty, with Python's numbers."""
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 1 and not getattr(value, "is_meta", False):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)) or not value:
        _refuse(name, f"a sequence of {what}, not empty", value, f" Write {example}.")
    return tuple(map(as_python, value))


def check_function(name: str, value: Any, what: str, example: str) -> None:
    """Raise unless ``value`` can be called, which a class of something else should not be."""
    if not callable(value) or isinstance(value, type):
        _refuse(name, f"a function {what}", value, f" Write {example}.")


def check_generator(value: Any) -> None:
    """Raise unless ``value`` is a generator of random numbers on the CPU, or None."""
    if value is not None and (not isinstance(value, torch.Generator) or value.device.type != "cpu"):
        found = f"one on {value.device}" if isinstance(value, torch.Generator) else shown(value)
        raise ConfigurationError(
            f"generator expects a CPU generator, found {found}. Write generator=torch.Generator().manual_seed(...)."
        )


def asked(function: Callable[..., Any], names: Collection[str], given: int) -> frozenset[str]:
    """Return which of ``names`` are parameters of ``function`` beyond the first, ``given`` ones."""
    called: Any = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = list(inspect.signature(called).parameters.values())[given:]
    except (TypeError, ValueError):  # of a callable that is written in C
        return frozenset()
    return frozenset(p.name for p in parameters if p.name in names and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))


def shown(value: Any) -> str:
    """Return ``value`` as messages show it, in at most 100 characters."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim:
        return f"{type(value).__name__} of shape {tuple(value.shape)} and type {value.dtype}"
    try:
        text = repr(value)
    except ValueError:  # of an integer with thousands of digits
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def _item(value: Any) -> Any:
    return value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value


def _refuse(name: str, expected: str, value: Any, hint: str = "") -> NoReturn:
    raise ConfigurationError(f"{name} must be {expected}, found {shown(value)}.{hint}")
