"""Every method of the package, at small cost: what each way to train is shown to train."""

from dataclasses import is_dataclass

from entprop_wrap import EntProp, MixUp, methods
from entprop_wrap.functional.attacks import PGD
from entprop_wrap.methods import (
    MEADA,
    AdversarialTraining,
    AdvProp,
    EntropyAscent,
    FastAdvProp,
    FineGrainedAdvProp,
    MixProp,
    Vanilla,
    entropic_retraining,
)
from entprop_wrap.methods.entropic_retraining import EntropicRetraining

METHODS = (
    Vanilla(label_smoothing=0.1, entropy_weight=0.1),
    EntProp(fraction=0.5, attack_steps=2, mix_on="auxiliary"),
    EntProp(fraction=0.5, mix=None, auxiliary=None),
    AdvProp(),
    FastAdvProp(fraction=0.5),
    MixProp(mix=MixUp(1.0)),
    AdversarialTraining(),
    AdversarialTraining(kind="trades"),
    FineGrainedAdvProp({"weak": PGD(1 / 255, steps=1), "strong": PGD(4 / 255, steps=2)}),
    MEADA(ascent=EntropyAscent(steps=2)),
    EntropicRetraining(),
)


def named(method):
    return f"{type(method).__name__}-{getattr(method, 'kind', '')}"


def classes_of(module):
    """Return the methods among the public names of a module."""
    found = (getattr(module, name) for name in module.__all__)
    return {x for x in found if isinstance(x, type) and is_dataclass(x) and hasattr(x, "step")}


def check_none_is_missing():
    missing = (classes_of(methods) | classes_of(entropic_retraining)) - set(map(type, METHODS))
    assert not missing, f"add {missing} to METHODS"
