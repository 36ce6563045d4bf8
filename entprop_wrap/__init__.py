"""EntProp for any PyTorch image classifier: train for accuracy and robustness, get your own model back."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entprop_wrap.functional.mixing import CutMix, MixUp
    from entprop_wrap.functional.uncertainty import entropy
    from entprop_wrap.methods import EntProp, Vanilla
    from entprop_wrap.methods.base import Method, Step, StepOutput
    from entprop_wrap.perturbation import PixelSpace
    from entprop_wrap.trainer import Trainer, TrainerConfig
    from entprop_wrap.training import training_step
    from entprop_wrap.wrapping.model import Summary, auxiliary, summary, unwrap, wrap
    from entprop_wrap.wrapping.optimizer import check_optimizer, parameter_groups
    from entprop_wrap.wrapping.state_dict import auxiliary_state_dict, load_auxiliary_state_dict, main_state_dict

__all__ = [
    "CutMix",
    "EntProp",
    "Method",
    "MixUp",
    "PixelSpace",
    "Step",
    "StepOutput",
    "Summary",
    "Trainer",
    "TrainerConfig",
    "Vanilla",
    "auxiliary",
    "auxiliary_state_dict",
    "check_optimizer",
    "entropy",
    "load_auxiliary_state_dict",
    "main_state_dict",
    "parameter_groups",
    "summary",
    "training_step",
    "unwrap",
    "wrap",
]

#: Modules are imported when a name of theirs is asked for: a command line that only prints help needs no torch.
_MODULES = {
    "methods": "EntProp Vanilla",
    "functional.mixing": "CutMix MixUp",
    "wrapping.optimizer": "check_optimizer parameter_groups",
    "perturbation": "PixelSpace",
    "functional.uncertainty": "entropy",
    "wrapping.state_dict": "auxiliary_state_dict load_auxiliary_state_dict main_state_dict",
    "methods.base": "Method Step StepOutput",
    "trainer": "Trainer TrainerConfig",
    "training": "training_step",
    "wrapping.model": "Summary auxiliary summary unwrap wrap",
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names.split():
            value = globals()[name] = getattr(importlib.import_module(f"entprop_wrap.{module}"), name)
            return value
    if name in ("errors", *_MODULES):
        return importlib.import_module(f"entprop_wrap.{name}")
    raise AttributeError(f"module 'entprop_wrap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
