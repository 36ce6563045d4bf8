"""Stand-ins for a model while someone else's training step or loss runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from entprop_wrap.utils.modules import plain_model

__all__ = ["StandIn", "replaced"]

_MISSING = object()


class StandIn(nn.Module):
    """Has the attributes of ``model``, a ``forward`` of its own, and the number of its ``calls``."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.__dict__["stands_for"] = model
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["stands_for"], name)

    def _get_name(self) -> str:
        return type(plain_model(self.__dict__["stands_for"])).__name__


@contextmanager
def replaced(values: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    """Give a dictionary, such as ``vars(object)``, another value inside the with-block; the order of keys stays."""
    before = values.get(key, _MISSING)
    values[key] = value
    try:
        yield
    finally:
        values[key] = before
        if before is _MISSING:
            del values[key]
