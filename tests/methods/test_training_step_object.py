"""``TrainingStep``: model, method and pixel space held once, and the same steps as ``training_step``."""

import copy
import re

import pytest
import torch

import entprop_wrap as entprop
from entprop_wrap.errors import (
    AuxiliaryNameError,
    ConfigurationError,
    NotWrappedError,
    PixelRangeError,
    UnsupportedModelError,
)
from entprop_wrap.methods import AdvProp, Vanilla
from tests.methods.loops import gradients
from tests.reference.models import build

SPACE = entprop.PixelSpace(0.5, 0.25)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return (torch.rand(12, 3, 8, 8, dtype=torch.float64) - 0.5) / 0.25, torch.arange(12) % 3


@pytest.mark.parametrize(
    "method", [entprop.EntProp(0.5), AdvProp(), Vanilla()], ids=lambda method: type(method).__name__
)
def test_it_is_the_step_that_the_function_runs(method, batch):
    held, called = (build("batch_norm", dtype=torch.float64) for _ in range(2))
    step = entprop.TrainingStep(held, method, SPACE, generator=torch.Generator().manual_seed(3))
    if method.auxiliaries:
        entprop.wrap(called)
    for _ in range(2):  # the second accumulates
        found = step(*batch)
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        expected = entprop.training_step(called, *batch, method=method, pixel_space=SPACE, generator=generator)
    assert torch.equal(found.loss, expected.loss)
    theirs = gradients(called)
    assert gradients(held).keys() == theirs.keys()
    assert all(torch.equal(gradient, theirs[name]) for name, gradient in gradients(held).items())


def test_it_wraps_a_plain_model_as_told(batch):
    step = entprop.TrainingStep(build("batch_norm", dtype=torch.float64), pixel_space=SPACE, copies="statistics")
    assert (entprop.summary(step.model).auxiliaries, entprop.summary(step.model).added) == (("aux",), 0)
    assert repr(step).count("(") >= 3, repr(step)
    step(*batch)


def test_a_method_says_what_is_copied_and_a_model_that_holds_other_copies_is_refused(batch):
    told, alike, other = (build("batch_norm", dtype=torch.float64) for _ in range(3))
    entprop.wrap(alike, copies="statistics")
    entprop.wrap(other)
    method, plain = entprop.EntProp(0.7, copies="statistics"), len(list(build("batch_norm").parameters()))
    for model in (told, alike):
        entprop.TrainingStep(model, method, SPACE)(*batch)
        assert len(list(model.parameters())) == plain
    with pytest.raises(
        ConfigurationError, match=r"a model with copies='all'. Write entprop.wrap\(model, copies='statistics'\)"
    ):
        entprop.TrainingStep(other, method)
    with pytest.raises(ConfigurationError, match="a model with copies='all'"):
        entprop.training_step(other, *batch, method=method)
    entprop.TrainingStep(alike, entprop.EntProp(0.7), SPACE)(*batch)  # the default takes any


@pytest.mark.parametrize(
    ("method", "call"),
    [
        (entprop.EntProp(0.7), "entprop.wrap(model)"),
        (entprop.EntProp.augmented(fraction=0.7), "entprop.wrap(model, copies='statistics')"),
        (
            entprop.EntProp(0.7, auxiliary="hard", copies="affine"),
            "entprop.wrap(model, auxiliaries=('hard',), copies='affine')",
        ),
    ],
)
def test_the_message_about_a_model_that_is_not_wrapped_for_the_method_says_the_whole_call(method, call, batch):
    plain, other = (build("batch_norm", dtype=torch.float64) for _ in range(2))
    entprop.wrap(other, auxiliaries=("elsewhere",))
    for model in (plain, other):
        with pytest.raises((NotWrappedError, AuxiliaryNameError), match=re.escape(f"Write {call}")):
            entprop.training_step(model, *batch, method=method)
    model = build("batch_norm", dtype=torch.float64)
    exec(call, {"entprop": entprop, "model": model})
    entprop.training_step(model, *batch, method=method, pixel_space=SPACE)


@pytest.mark.parametrize(
    ("method", "wrapped", "options", "words"),
    [
        (entprop.EntProp(0.7), True, {"copies": "affine"}, "copies would be given to wrap.* is wrapped already"),
        (Vanilla(), False, {"include": "0"}, "not wrapped for Vanilla"),
        (entprop.EntProp.augmented(), False, {"copies": "all"}, "a model with copies='all'"),
        (entprop.EntProp(0.7), False, {"auxiliaries": ("hard",)}, "without 'aux'"),
    ],
)
def test_options_that_would_have_no_effect_or_contradict_the_method_are_refused(method, wrapped, options, words):
    model = build("batch_norm")
    if wrapped:
        entprop.wrap(model)
    names = set(model.state_dict())
    with pytest.raises((ConfigurationError, AuxiliaryNameError), match=words):
        entprop.TrainingStep(model, method, **options)
    assert set(model.state_dict()) == names


def test_statistics_that_evaluation_mode_keeps_equal_are_refused(batch):
    model = entprop.wrap(build("batch_norm", dtype=torch.float64), copies="statistics")
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.eval()
    method = entprop.EntProp(0.7)
    with pytest.raises(ConfigurationError, match=r"evaluation mode record no statistics.*EntProp\(auxiliary=None\)"):
        entprop.training_step(model, *batch, method=method, pixel_space=SPACE)
    norms[0].train()
    entprop.training_step(model, *batch, method=method, pixel_space=SPACE)
    with pytest.raises(ConfigurationError, match="The model is in evaluation mode"):
        entprop.training_step(model.eval(), *batch, method=method, pixel_space=SPACE)


def test_it_leaves_a_plain_model_plain_where_nothing_is_to_be_copied(batch):
    model = build("batch_norm", dtype=torch.float64)
    names = set(model.state_dict())
    entprop.TrainingStep(model, entprop.EntProp(auxiliary=None), SPACE)(*batch)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (("resnet18",), {}, UnsupportedModelError, r"TrainingStep\(\): expected a torch.nn.Module"),
        ((AdvProp,), {}, TypeError, "an instance of a training method"),
        ((None, 0.5), {}, ConfigurationError, "pixel_space must be a PixelSpace"),
        ((None, None), {"loss": "ce"}, TypeError, "loss expects a function"),
        ((AdvProp(auxiliary="adv"),), {}, AuxiliaryNameError, "without 'adv'"),
        ((None, None), {"copy": "all"}, TypeError, "copy"),
    ],
)
def test_what_is_wrong_is_said_when_it_is_made(arguments, options, error, words):
    model = build("batch_norm", dtype=torch.float64)
    if error is AuxiliaryNameError:
        entprop.wrap(model)
    before = copy.deepcopy(model.state_dict())
    given = arguments if arguments == ("resnet18",) else (model, *arguments)
    with pytest.raises(error, match=words):
        entprop.TrainingStep(*given, **options)
    assert model.state_dict().keys() == before.keys()


def test_the_pixel_space_that_it_holds_is_the_one_that_counts(batch):
    step = entprop.TrainingStep(build("batch_norm", dtype=torch.float64))
    with pytest.raises(PixelRangeError):
        step(*batch)
