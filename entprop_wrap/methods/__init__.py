"""Training methods: one file, one method, one frozen dataclass with one ``step``."""

from entprop_wrap.methods.adversarial_training import AdversarialTraining
from entprop_wrap.methods.advprop import AdvProp
from entprop_wrap.methods.base import Method
from entprop_wrap.methods.entprop import EntProp
from entprop_wrap.methods.fast_advprop import FastAdvProp
from entprop_wrap.methods.fine_grained_advprop import FineGrainedAdvProp
from entprop_wrap.methods.growth import grow
from entprop_wrap.methods.me_ada import MEADA, EntropyAscent
from entprop_wrap.methods.mixprop import MixProp
from entprop_wrap.methods.step import Step
from entprop_wrap.methods.step_output import StepOutput
from entprop_wrap.methods.vanilla import Vanilla

__all__ = [
    "MEADA",
    "AdvProp",
    "AdversarialTraining",
    "EntProp",
    "EntropyAscent",
    "FastAdvProp",
    "FineGrainedAdvProp",
    "Method",
    "MixProp",
    "Step",
    "StepOutput",
    "Vanilla",
    "grow",
]
