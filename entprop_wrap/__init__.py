"""EntProp for any PyTorch image classifier: train for accuracy and robustness, get your own model back."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entprop_wrap.data import PixelSpace
    from entprop_wrap.functional import MixUp
    from entprop_wrap.methods import EntProp
    from entprop_wrap.trainer import Trainer, TrainerConfig
    from entprop_wrap.training import TrainingStep, training_step
    from entprop_wrap.wrapping import (
        auxiliary,
        auxiliary_state_dict,
        load_auxiliary_state_dict,
        main_state_dict,
        parameter_groups,
        summary,
        unwrap,
        wrap,
    )

__version__ = "0.1.0.dev0"

__all__ = [
    "EntProp",
    "MixUp",
    "PixelSpace",
    "Trainer",
    "TrainerConfig",
    "TrainingStep",
    "auxiliary",
    "auxiliary_state_dict",
    "load_auxiliary_state_dict",
    "main_state_dict",
    "parameter_groups",
    "summary",
    "training_step",
    "unwrap",
    "wrap",
]

#: Rooms are entered when a name of theirs is asked for: a loop of one's own needs no Accelerate, --help not even torch.
_ROOMS = {
    "data": "PixelSpace",
    "functional": "MixUp",
    "methods": "EntProp",
    "trainer": "Trainer TrainerConfig",
    "training": "TrainingStep training_step",
    "wrapping": (
        "auxiliary auxiliary_state_dict load_auxiliary_state_dict main_state_dict parameter_groups summary unwrap wrap"
    ),
}


def __getattr__(name: str) -> Any:
    for room, names in _ROOMS.items():
        if name in names.split():
            value = globals()[name] = getattr(importlib.import_module(f"entprop_wrap.{room}"), name)
            return value
    if name in ("errors", *_ROOMS):
        return importlib.import_module(f"entprop_wrap.{name}")
    raise AttributeError(f"module 'entprop_wrap' has no attribute {name!r}{_home_of(name)}")


def _home_of(name: str) -> str:
    """Return where else a public name lives, in words."""
    for room in (
        "methods",
        "finetuning",
        "functional",
        "wrapping",
        "robustness",
        "diagnostics",
        "reporting",
        "trainer",
    ):
        if name in importlib.import_module(f"entprop_wrap.{room}").__all__:
            return f": write from entprop_wrap.{room} import {name}"
    return ""


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
