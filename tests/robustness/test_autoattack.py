"""AutoAttack: at least as strong as PGD, within its ball, and leaving everything around it as it was."""

import importlib.util
import logging
import sys

import pytest
import torch
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from entprop_wrap.errors import ConfigurationError, LabelError, ModelOutputError, PixelRangeError
from entprop_wrap.robustness import PGD, AutoAttack, accuracy_against_epsilon, evaluate_robustness
from tests.helpers.small_classifier import CLASSES, SPACE, classifier, dataset, loader

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("pyautoattack") is None, reason="pyautoattack is not installed: the extra attacks"
)


@pytest.fixture(autouse=True)
def _quiet_and_quick(monkeypatch):
    """Give the attacks fewer steps and queries, which makes them weaker, if anything."""
    # On batches this small, Square finding one image more is "a decrease by 17 %", which the package warns of.
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    if importlib.util.find_spec("pyautoattack") is None:
        return
    import pyautoattack

    choose = pyautoattack.AutoAttack._set_version

    def fewer(attack, version="standard"):
        choose(attack, version)
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = 25
        attack.square.n_queries = 100

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", fewer)


def problem(count=8):
    """Return a model and images that it gets right."""
    model, images = classifier(), dataset(count).tensors[0]
    with torch.no_grad():
        return model, images, model(images).argmax(1)


def right(model, images, labels):
    with torch.no_grad():
        return model(images).argmax(1) == labels


def generator():
    return torch.Generator().manual_seed(3)


@needs_package
def test_accuracy_is_not_above_that_under_pgd():
    model, images, labels = problem(6)
    epsilon = 1.3 / 255
    ours = right(model, AutoAttack(epsilon)(model, images, labels, SPACE, generator()), labels)
    theirs = right(model, PGD(epsilon, steps=20)(model, images, labels, SPACE, generator()), labels)
    assert 0 < ours.sum() <= theirs.sum() < len(images)


@needs_package
def test_images_stay_in_the_ball_and_valid():
    model, images, labels = problem()
    found = AutoAttack(8 / 255)(model, images, labels, SPACE, generator())
    assert not right(model, found, labels).any()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (SPACE.mean, SPACE.std))
    change = (found - images) * std
    size = change.abs().amax((1, 2, 3))
    assert size.max() <= 8 / 255 * (1 + 1e-4)
    assert size.min() > 0
    pixels = found * std + mean
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6


@needs_package
def test_what_the_model_gets_wrong_stays_as_it_is():
    model, images, labels = problem()
    labels[0] = (labels[0] + 1) % CLASSES
    found = AutoAttack(8 / 255)(model, images, labels, SPACE, generator())
    torch.testing.assert_close(found[0], images[0], rtol=0, atol=1e-6)


@needs_package
def test_it_is_seeded_and_leaves_random_numbers_gradients_and_tracers_alone():
    model, images, labels = problem()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()

    def tracer(*arguments):
        return None

    earlier = sys.gettrace()
    sys.settrace(tracer)
    try:
        first = AutoAttack(8 / 255)(model, images, labels, SPACE, generator())
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(earlier)
    torch.rand(3)
    again = AutoAttack(8 / 255)(model, images, labels, SPACE, generator())
    other = AutoAttack(8 / 255)(model, images, labels, SPACE, torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.random.set_rng_state(state)
    expected = torch.rand(3)
    torch.random.set_rng_state(state)
    AutoAttack(8 / 255)(model, images, labels, SPACE, generator())
    assert torch.equal(torch.rand(3), expected)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@needs_package
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_types_that_return_other_things(dtype):
    class Hub(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = classifier().to(dtype)

        def forward(self, pixel_values):
            return ImageClassifierOutput(logits=self.inner(pixel_values))

    _, images, labels = problem(4)
    model = Hub().eval()
    found = AutoAttack(16 / 255)(model, images, labels, SPACE, generator())
    assert found.dtype == images.dtype
    with torch.no_grad():
        assert (model(found.to(dtype)).logits.argmax(1) != labels).all()


@needs_package
def test_evaluations_and_curves_take_it():
    model = classifier()
    result = evaluate_robustness(
        model,
        loader(6),
        pixel_space=SPACE,
        corruptions=["fog"],
        severities=[1],
        attacks={"AutoAttack 16/255": AutoAttack(16 / 255)},
        progress=False,
    )
    assert result.adversarial["AutoAttack 16/255"].accuracy == 0
    curve = accuracy_against_epsilon(
        model, loader(6), [0, 16 / 255], attack=AutoAttack(), pixel_space=SPACE, progress=False
    )
    assert curve == {0: result.sa, 16 / 255: 0}


@needs_package
def test_bad_input_is_refused():
    model, images, labels = problem(2)
    with pytest.raises(PixelRangeError, match="4/255"):
        AutoAttack(4)
    broken = classifier()
    with torch.no_grad():
        broken[-1].bias[0] = torch.nan
    with pytest.raises(ModelOutputError, match="2 of 2 images are NaN"):
        AutoAttack()(broken, images, labels, SPACE)
    with pytest.raises(LabelError, match="5 logits"):
        AutoAttack()(model, images, labels + 5, SPACE)
    three = nn.Sequential(*classifier()[:-1], nn.Linear(72, 3)).eval()
    with pytest.raises(ConfigurationError, match="at least 4 classes"):
        AutoAttack()(three, images, labels.clamp(max=2), SPACE)


def test_the_error_names_the_extra_where_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"entprop-wrap\[attacks\]"):
        AutoAttack()
