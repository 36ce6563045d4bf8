"""Wrong options raise where they are written, and say what was expected, what was found and what to write."""

import numpy as np
import pytest
import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.attacks import PGD
from entprop_wrap.diagnostics import Monitor
from entprop_wrap.errors import ConfigurationError, PixelRangeError
from entprop_wrap.methods import (
    MEADA,
    AdversarialTraining,
    AdvProp,
    EntProp,
    EntropyAscent,
    FastAdvProp,
    FineGrainedAdvProp,
    MixProp,
    Vanilla,
)
from entprop_wrap.methods.experimental import EntropicRetraining
from entprop_wrap.robustness.attacks import PGD as MeasuringPGD
from entprop_wrap.trainer.growth import MaximumEntropyGrowth
from tests.trainer.toys import BatchNormNet, Images, make

NUMBERS = {
    EntProp: ("fraction", "threshold"),
    AdvProp: ("weight",),
    MixProp: ("weight",),
    MEADA: ("fraction", "weight"),
    FastAdvProp: ("fraction", "beta"),
    AdversarialTraining: ("beta", "clean_weight", "entropy_weight", "label_smoothing"),
    Vanilla: ("entropy_weight", "label_smoothing"),
    EntropicRetraining: ("activation_weight", "output_weight"),
    EntropyAscent: ("eta", "gamma", "step_size"),
    entprop.MixUp: ("alpha",),
    entprop.CutMix: ("alpha",),
}
INTEGERS = {
    EntProp: ("attack_steps",),
    PGD: ("steps",),
    MeasuringPGD: ("restarts",),
    EntropyAscent: ("steps",),
    MaximumEntropyGrowth: ("phases", "every"),
    Monitor: ("every", "patience"),
}
FLAGS = {AdvProp: ("targeted",), FineGrainedAdvProp: ("targeted",), FastAdvProp: ("shuffle",), PGD: ("random_start",)}
NAMED = (EntProp, AdvProp, MixProp, MEADA, FastAdvProp)


def pairs(table):
    return [pytest.param(kind, name, id=f"{kind.__name__}-{name}") for kind, names in table.items() for name in names]


def required(kind):
    return ({"main": PGD()},) if kind is FineGrainedAdvProp else ()


@pytest.mark.parametrize(("kind", "name"), pairs(NUMBERS))
@pytest.mark.parametrize("value", ["0.2", True, float("nan"), float("inf"), [0.2], torch.ones(2)])
def test_numbers(kind, name, value):
    with pytest.raises(ConfigurationError, match=rf"^{name} must be a number .*found ") as raised:
        kind(**{name: value})
    if value == "0.2":
        assert f"Write {name}=0.2, without quotes." in str(raised.value)


@pytest.mark.parametrize(("kind", "name"), pairs(INTEGERS))
@pytest.mark.parametrize("value", ["2", True, 1.0, -1])
def test_integers(kind, name, value):
    with pytest.raises(ConfigurationError, match=rf"^{name} must be an integer of at least [01], found "):
        kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), pairs(FLAGS))
def test_flags(kind, name):
    with pytest.raises(ConfigurationError, match=f"{name} must be True or False, found 'no'"):
        kind(*required(kind), **{name: "no"})


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("name", [3, "", ("aux",)])
def test_auxiliary_names(kind, name):
    with pytest.raises(ConfigurationError, match=r"^auxiliary must be the name of an auxiliary domain such as 'aux'"):
        kind(auxiliary=name)


def test_only_entprop_can_share_the_main_norms():
    assert EntProp(auxiliary=None).auxiliaries == ()
    with pytest.raises(ConfigurationError, match="auxiliary must be the name"):
        AdvProp(auxiliary=None)


def test_options_of_several_branches():
    with pytest.raises(ConfigurationError, match="A key of branches must be the name"):
        FineGrainedAdvProp({1: PGD()})
    for weight in ("1", {"main": "1"}, {"main": True}):
        with pytest.raises(ConfigurationError, match="weight must be a number above 0"):
            FineGrainedAdvProp({"main": PGD()}, weight=weight)
    with pytest.raises(ConfigurationError, match="expected one for each"):
        FineGrainedAdvProp({"main": PGD()}, weight={"main": 1.0, 2: 1.0})


@pytest.mark.parametrize("value", ["1/255", True, 4, float("nan")])
def test_magnitudes(value):
    with pytest.raises(PixelRangeError, match="epsilon is a fraction of the full pixel range"):
        EntProp(epsilon=value)


def test_numbers_of_numpy_serve():
    method = EntProp(fraction=np.float32(0.5), attack_steps=np.int64(2), epsilon=np.float32(1 / 255))
    assert method.attack[0] == pytest.approx(1 / 255)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "ce"}, TypeError, "loss expects a function"),
        ({"loss": nn.CrossEntropyLoss}, TypeError, r"write torch\.nn\.functional\.cross_entropy"),
        ({"backward": 1.0}, TypeError, "backward expects a function"),
        ({"pixel_space": (0.5, 0.5)}, TypeError, r"write PixelSpace\(mean, std\)"),
        ({"generator": 3}, ConfigurationError, "generator expects a CPU generator, found 3"),
    ],
)
def test_arguments_of_a_step(options, error, message):
    model = entprop.wrap(make(BatchNormNet))
    with pytest.raises(error, match=message):
        entprop.training_step(model, torch.rand(8, 3, 8, 8), torch.arange(8) % 4, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"epochs": 1}}, r"config expects a TrainerConfig, found \{'epochs': 1\}"),
        ({"loss": "ce"}, "loss expects a function"),
        ({"pixel_space": (0.5, 0.5)}, r"write PixelSpace\(mean, std\)"),
    ],
)
def test_arguments_of_the_trainer(options, message):
    model = make(BatchNormNet)
    with pytest.raises(TypeError, match=message):
        entprop.Trainer(model, Images(), **options)
    assert not any("entprop" in name for name, _ in model.named_parameters()), "the model was changed"
