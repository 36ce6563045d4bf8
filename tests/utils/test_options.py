"""Wrong options raise where they are written, and say what was expected, what was found and what to write."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import entprop_wrap as entprop
from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.diagnostics import Monitor
from entprop_wrap.errors import ConfigurationError, ImageError, LabelError
from entprop_wrap.functional import CutMix
from entprop_wrap.functional.attacks import PGD
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
from entprop_wrap.methods.entropic_retraining import EntropicRetraining
from entprop_wrap.robustness import corrupt
from entprop_wrap.utils.options import as_python, check_seed
from tests.helpers.trainer_toys import BatchNormNet, Images, make

NUMBERS = {
    EntProp: ("fraction",),
    AdvProp: ("weight",),
    MixProp: ("weight",),
    MEADA: ("fraction", "weight"),
    FastAdvProp: ("fraction", "beta"),
    AdversarialTraining: ("beta", "clean_weight", "entropy_weight", "label_smoothing"),
    Vanilla: ("entropy_weight", "label_smoothing"),
    EntropicRetraining: ("activation_weight", "output_weight"),
    EntropyAscent: ("eta", "gamma", "step_size"),
    entprop.MixUp: ("alpha",),
    CutMix: ("alpha",),
}
INTEGERS = {
    EntProp: ("attack_steps",),
    PGD: ("steps",),
    EntropyAscent: ("steps",),
    Monitor: ("every",),
}
FLAGS = {AdvProp: ("targeted",), FineGrainedAdvProp: ("targeted",), FastAdvProp: ("shuffle",), PGD: ("random_start",)}
NAMED = (EntProp, AdvProp, MixProp, MEADA, FastAdvProp)


def pairs(table):
    return [pytest.param(kind, name, id=f"{kind.__name__}-{name}") for kind, names in table.items() for name in names]


def required(kind):
    return ({"main": PGD()},) if kind is FineGrainedAdvProp else ()


@pytest.mark.parametrize(("kind", "name"), pairs(NUMBERS))
def test_numbers(kind, name):
    for value in (True, float("nan"), float("inf"), [0.2], torch.ones(2), "0.2"):
        with pytest.raises(ConfigurationError, match=rf"^{name} must be a number .*found "):
            kind(**{name: value})


@pytest.mark.parametrize(("kind", "name"), pairs(INTEGERS))
def test_integers(kind, name):
    for value in ("2", True, 1.0, -1):
        with pytest.raises(ConfigurationError, match=rf"^{name} must be an integer of at least [01], found "):
            kind(**{name: value})


def test_flags_and_names():
    for kind, names in FLAGS.items():
        for name in names:
            with pytest.raises(ConfigurationError, match=f"{name} must be True or False, found 'no'"):
                kind(*required(kind), **{name: "no"})
    for kind in NAMED:
        for name in (3, "", ("aux",)):
            with pytest.raises(ConfigurationError, match=r"^auxiliary must be the name of an auxiliary domain such as"):
                kind(auxiliary=name)
    assert EntProp(auxiliary=None).auxiliaries == ()  # it alone can share the main norms
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


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(2), 2),
        (np.array(2), 2),
        (np.float32(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (Fraction(1, 2), 0.5),
        (np.bool_(True), True),
        (np.str_("aux"), "aux"),
        (10**30, 1e30),  # which no tensor could hold
    ],
)
def test_scalars_become_those_of_python(value, expected):
    found = as_python(value)
    assert (type(found), found) == (type(expected), expected)


@pytest.mark.parametrize("value", [None, "55", [0.5], (1, 2), 10**400, Fraction(10**400), torch.tensor(0.5), object()])
def test_anything_else_stays_as_it_is(value):
    assert as_python(value) is value


def test_options_are_stored_as_those_of_python():
    method = EntProp(np.float32(0.5), attack_steps=np.int64(2), epsilon=np.array(0.1), weighting=np.str_("sum"))
    stored = (method.fraction, method.attack_steps, method.epsilon, method.weighting)
    assert [type(value) for value in stored] == [float, int, float, str]
    model = entprop.wrap(make(BatchNormNet))
    entprop.training_step(model.train(), torch.rand(8, 3, 8, 8), torch.arange(8) % 4, method=method)
    assert EntProp(epsilon=np.float32(1 / 255)).attack[0] == pytest.approx(1 / 255)
    branches = FineGrainedAdvProp({"main": PGD(steps=np.int8(1))}, weight={"main": np.float32(2)})
    assert type(branches.weight["main"]) is float
    assert type(PGD(steps=np.int8(1)).steps) is int


@pytest.mark.parametrize(
    "value", ["55", b"5", (), "", None, True, {}, (0.5, None), {"a": 1}, float("nan"), [[0.5]], object]
)
def test_pixel_spaces_are_of_numbers(value):
    for name in ("mean", "std"):
        with pytest.raises(ConfigurationError, match=f"^{name} must be a (number|sequence of numbers)"):
            PixelSpace(**{name: value})


@pytest.mark.parametrize(
    "value", [[0.5, 0.25], np.array([0.5, 0.25]), torch.tensor([0.5, 0.25]), (np.float32(0.5), 0.25)]
)
def test_pixel_spaces_of_arrays(value):
    space = PixelSpace(value, value)
    assert space.mean == space.std == (0.5, 0.25)
    assert {type(number) for number in space.mean} == {float}


@pytest.mark.parametrize(
    "value", [10**5000, torch.ones(300, 300), np.ones(999), "x" * 999, [0] * 999, EntProp], ids=range(6)
)
def test_messages_stay_short(value):
    with pytest.raises(ConfigurationError, match="fraction must be a number in") as raised:
        EntProp(fraction=value)
    assert len(str(raised.value)) < 250


@pytest.mark.parametrize("value", [-1, 2**63, 1.0, True, "0", None])
def test_seeds(value):
    with pytest.raises(ConfigurationError, match="seed must be an integer of at least 0"):
        check_seed(value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "ce"}, TypeError, "loss expects a function"),
        ({"loss": nn.CrossEntropyLoss}, TypeError, r"write torch\.nn\.functional\.cross_entropy"),
        ({"backward": 1.0}, ConfigurationError, "backward must be a function of a loss, found 1.0"),
        ({"pixel_space": (0.5, 0.5)}, ConfigurationError, r"Write PixelSpace\(mean, std\)"),
        ({"generator": 3}, ConfigurationError, "generator expects a CPU generator, found 3"),
    ],
)
def test_arguments_of_a_step(options, error, message):
    model = entprop.wrap(make(BatchNormNet))
    with pytest.raises(error, match=message):
        entprop.training_step(model, torch.rand(8, 3, 8, 8), torch.arange(8) % 4, **options)


@pytest.mark.parametrize("change", [lambda t: t.to("meta"), lambda t: t.to_sparse()], ids=["meta", "sparse"])
def test_batches_without_values(change):
    model, images, labels = entprop.wrap(make(BatchNormNet)), torch.rand(8, 3, 32, 32), torch.arange(8) % 4
    with pytest.raises(ImageError, match="Expected images as a dense tensor with data"):
        entprop.training_step(model, change(images), labels)
    with pytest.raises(LabelError, match="Expected labels as a dense tensor with data"):
        entprop.training_step(model, images, change(labels))
    with pytest.raises(ImageError, match="Expected images as a dense tensor with data"):
        corrupt(change(images), "fog", 1)


@pytest.mark.parametrize("value", [torch.rand(4, 3), 0, [], nn.Linear])
def test_what_is_not_an_uncertainty(value):
    with pytest.raises(
        ConfigurationError, match=r"uncertainty must be a function \(logits, labels\) -> scores, or one"
    ):
        EntProp(uncertainty=value)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": {"epochs": 1}}, TypeError, r"config expects a TrainerConfig, found \{'epochs': 1\}"),
        ({"loss": "ce"}, TypeError, "loss expects a function"),
        ({"pixel_space": (0.5, 0.5)}, ConfigurationError, r"Write PixelSpace\(mean, std\)"),
    ],
)
def test_arguments_of_the_trainer(options, error, message):
    model = make(BatchNormNet)
    with pytest.raises(error, match=message):
        entprop.Trainer(model, Images(), **options)
    assert not any("entprop" in name for name, _ in model.named_parameters()), "the model was changed"
