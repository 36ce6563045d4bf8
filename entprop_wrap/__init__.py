"""EntProp for any PyTorch image classifier: train for accuracy and robustness, get your own model back."""

from entprop_wrap.methods import EntProp, Vanilla
from entprop_wrap.mixing import CutMix, MixUp
from entprop_wrap.optimizers import check_optimizer, parameter_groups
from entprop_wrap.perturbation import PixelSpace
from entprop_wrap.selection import entropy
from entprop_wrap.state_dicts import auxiliary_state_dict, load_auxiliary_state_dict, main_state_dict
from entprop_wrap.step import Method, Step, StepOutput
from entprop_wrap.trainer import Trainer, TrainerConfig
from entprop_wrap.training import training_step
from entprop_wrap.wrapping import Summary, auxiliary, summary, unwrap, wrap

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
