"""The base class of training methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.utils.options import check_name, store_as_python


class Method(ABC):
    """A training method: a frozen dataclass of options with one :meth:`step`.

    A field ``auxiliary`` names the one auxiliary domain that a method needs; a method of several overrides
    :attr:`auxiliaries`.

    Attributes:
        copies: Which tensors each domain has of its own where the method wraps a plain model, see
            :func:`entprop_wrap.wrap`. A model that is wrapped already must have been wrapped alike; "all" takes any.
    """

    copies: str = "all"

    def __post_init__(self) -> None:
        """Turn NumPy's scalars among the options into Python's, and check ``auxiliary``; options of your own follow."""
        store_as_python(self)
        if hasattr(self, "auxiliary"):
            check_name("auxiliary", self.auxiliary)

    @property
    def auxiliaries(self) -> tuple[str, ...]:
        """Names of the auxiliary domains that the step runs in; empty if it needs none."""
        name = getattr(self, "auxiliary", None)
        return () if name is None else (name,)

    @abstractmethod
    def step(self, step: Step) -> StepOutput:
        """Run the passes of one step and leave gradients; do not touch the optimizer."""


def check_method(method: object) -> Method:
    """Return ``method``, or raise a :class:`TypeError` that says what it should be."""
    if isinstance(method, type) or not hasattr(method, "step") or not hasattr(method, "auxiliaries"):
        found = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
        raise TypeError(f"method expects an instance of a training method, found {found}: write method=EntProp(), say.")
    return cast(Method, method)
