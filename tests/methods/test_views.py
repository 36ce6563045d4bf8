"""``EntProp(view=...)``: the selected images are augmented, in the place of gradient steps."""

import pickle

import pytest
import torch

import entprop_wrap as entprop
from entprop_wrap import EntProp, PixelSpace
from entprop_wrap.errors import ConfigurationError, ImageError
from entprop_wrap.methods.views import EachImage
from tests.methods.parity import Pair, relative_error
from tests.reference.models import random_batch

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")


def darker(pixels):
    return 0.5 * pixels


def step(model, batch, space=None, seed=5, **options):
    method = EntProp(mix=None, attack_steps=0, fraction=0.4, **options)
    generator = torch.Generator().manual_seed(seed)
    return entprop.training_step(model, *batch, method=method, pixel_space=space, generator=generator)


@pytest.mark.parametrize("weighting", ["per_image", "sum"])
def test_gradients_are_those_of_the_batch_and_of_the_changed_images(weighting):
    pair, (images, labels) = Pair("batch_norm"), random_batch(7)
    out = step(pair.model, (images, labels), view=darker, weighting=weighting)
    assert torch.equal(out.aux_images, 0.5 * images[out.selected])
    weight = 3 / 7 if weighting == "per_image" else 1.0

    twin = Pair("batch_norm").model
    loss = torch.nn.functional.cross_entropy
    loss(twin(images), labels).backward()
    with entprop.auxiliary(twin, "aux"):
        (weight * loss(twin(0.5 * images[out.selected]), labels[out.selected])).backward()
    for (name, found), (_, expected) in zip(pair.model.named_parameters(), twin.named_parameters(), strict=True):
        assert relative_error(found.grad, expected.grad) < 1e-12, name
    for (name, found), (_, expected) in zip(pair.model.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.allclose(found.double(), expected.double(), atol=1e-12), name


def test_the_most_uncertain_images_change_in_pixel_space():
    pair, (images, labels) = Pair("batch_norm"), random_batch(7)
    space = PixelSpace((0.5,) * 3, (0.25,) * 3)
    out = step(pair.model, ((images - 0.5) / 0.25, labels), space, view=darker)
    assert torch.allclose(out.aux_images, (0.5 * images[out.selected] - 0.5) / 0.25, atol=1e-12)
    assert set(out.selected.tolist()) == set(out.entropy.topk(3).indices.tolist())


@pytest.mark.parametrize("name", ["trivialaugment", "randaugment", "augmix", "gaussian"])
def test_a_view_by_name_follows_the_generator_alone(name):
    batch = random_batch(7)
    state = torch.get_rng_state()
    found = [step(Pair("batch_norm").model, batch, seed=seed, view=name).aux_images for seed in (5, 5, 6)]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].min() >= 0
    assert found[0].max() <= 1


def test_a_lagged_view_comes_back_in_the_next_step():
    model, batch = Pair("batch_norm").model, random_batch(7)
    first = step(model, batch, view=darker, lagged=True)
    second = step(model, batch, view=darker, lagged=True)
    assert torch.equal(second.aux_images, 0.5 * batch[0][first.selected])


def test_a_view_keeps_the_memory_format():
    images, labels = random_batch(7)
    batch = images.contiguous(memory_format=torch.channels_last), labels
    out = step(Pair("batch_norm").model, batch, view="trivialaugment")
    assert out.aux_images.is_contiguous(memory_format=torch.channels_last)


def test_methods_with_views_are_pickled_compared_and_built_from_names():
    method = EntProp(view="augmix", attack_steps=0)
    assert pickle.loads(pickle.dumps(method)) == method != EntProp(view="gaussian", attack_steps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"view": "trivialaugment"}, "attack_steps=0"),
        ({"view": "none", "attack_steps": 0}, "view must be"),
        ({"view": "Trivial", "attack_steps": 0}, "trivialaugment"),
        ({"view": 3, "attack_steps": 0}, "view must be"),
        ({"view": torch.nn.Identity, "attack_steps": 0}, "function"),
    ],
)
def test_what_is_not_a_view_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        EntProp(**options)


@pytest.mark.parametrize("view", [lambda pixels: pixels[:1], lambda pixels: None, lambda pixels: pixels.byte()])
def test_a_view_that_returns_something_else_is_refused_and_leaves_no_gradients(view):
    model = Pair("batch_norm").model
    with pytest.raises(ImageError, match="of view="):
        step(model, random_batch(7), view=view)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["trivialaugment", "randaugment", "augmix"])
def test_a_view_of_colours_says_what_to_write_for_other_channels(name):
    with pytest.raises(ImageError, match=r"1 or 3 channels; found 4. Write view='gaussian'"):
        EachImage(name)(torch.rand(2, 4, 8, 8))
    assert EachImage("gaussian")(torch.rand(2, 4, 8, 8)).shape == (2, 4, 8, 8)
