"""Training methods: one file, one method, one frozen dataclass with one ``step``."""

from entprop_wrap.methods.entprop import EntProp
from entprop_wrap.methods.vanilla import Vanilla

__all__ = ["EntProp", "Vanilla"]
