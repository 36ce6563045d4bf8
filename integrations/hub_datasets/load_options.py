"""What a user may ask of `load_images`, checked once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from entprop_wrap.errors import ConfigurationError

__all__ = ["LoadOptions", "OnBroken", "check_on_broken"]

OnBroken = Literal["skip", "raise"]


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of `load_images`, where each is described.

    Raises:
        ConfigurationError: A value is out of its range.
    """

    train_split: str | None = None
    eval_split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    classes: Sequence[str | int] | None = None
    train_transform: Callable[[Any], Any] | None = None
    eval_transform: Callable[[Any], Any] | None = None
    eval_fraction: float = 0.2
    max_train: int | None = None
    max_eval: int | None = None
    on_broken: OnBroken = "skip"
    shuffle_buffer: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        check_on_broken(self.on_broken)
        if not 0 < self.eval_fraction < 1:
            raise ConfigurationError(
                f"Expected eval_fraction between 0 and 1, found {self.eval_fraction}: for a number of images write "
                "max_eval=..."
            )
        for name, lowest in (("max_train", 1), ("max_eval", 1), ("shuffle_buffer", 0), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < lowest):
                raise ConfigurationError(f"Expected {name} as an integer of at least {lowest}, found {value!r}.")
        for name in ("train_transform", "eval_transform"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigurationError(
                    f"Expected {name} as a callable from a PIL image to a tensor, found {type(value).__name__}: write "
                    f"for example {name}={name}(224), or {name}(image_format(processor))."
                )


def check_on_broken(on_broken: str) -> None:
    """Raise `ConfigurationError` unless ``on_broken`` is ``"skip"`` or ``"raise"``."""
    if on_broken not in ("skip", "raise"):
        raise ConfigurationError(f"Expected on_broken='skip' or 'raise', found {on_broken!r}.")
