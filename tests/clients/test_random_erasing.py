"""Random erasing as timm, DeiT and Swin do it: boxes of N(0, 1) after normalising, outside the range of pixels."""

import pytest
import torch

import entprop_wrap as entprop
from entprop_wrap.errors import PixelRangeError
from entprop_wrap.functional.attacks import PGD, ascend, uniform_start
from entprop_wrap.methods import MEADA, AdversarialTraining, AdvProp, EntropyAscent, FastAdvProp, MixProp, Vanilla
from tests.helpers.trainer_toys import BatchNormNet, make

pytestmark = pytest.mark.filterwarnings("ignore:Only [0-9]+ images a step")

SPACE = entprop.PixelSpace((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LABELS = torch.arange(16) % 4


def batch(seed, *, erased=4, space=SPACE, size=32):
    """Images in ``space``, with boxes of noise in the first of them."""
    generator = torch.Generator().manual_seed(seed)
    lower, upper = space.bounds(torch.zeros(1))
    images = torch.lerp(lower, upper, torch.rand(16, 3, size, size, generator=generator))
    images[:erased, :, 4:20, 6:24] = torch.randn(erased, 3, 16, 18, generator=generator)
    images[:erased, :, 5, 7], images[:erased, :, 5, 8] = 4.5, -4.5
    return images


def step(model, images, method, space=SPACE):
    return entprop.training_step(model, images, LABELS, method=method, pixel_space=space)


METHODS = {
    "vanilla": Vanilla(),
    "entprop": entprop.EntProp(fraction=1, mix=None),
    "entprop_steps": entprop.EntProp(fraction=1, attack_steps=3, mix=None),
    "advprop": AdvProp(),
    "fast_advprop": FastAdvProp(fraction=0.5),
    "mixprop": MixProp(),
    "meada": MEADA(EntropyAscent(steps=1)),
    "pgd": AdversarialTraining(PGD(steps=2)),
    "l2": AdversarialTraining(PGD(epsilon=0.5, steps=2, step_size=None, norm="l2")),
}


@pytest.mark.parametrize("name", METHODS)
def test_erased_images_are_taken_on_every_batch(name):
    model = entprop.wrap(make(BatchNormNet)).train()
    for seed in range(2):
        images = batch(seed)
        assert images.max() > 3.4  # outside, by more than interpolation overshoots
        assert step(model, images, METHODS[name]).loss.isfinite()


def test_erased_images_that_were_not_normalised_are_taken():
    space = entprop.PixelSpace()
    model = entprop.wrap(make(BatchNormNet)).train()
    for seed, erased in enumerate((4, 16)):  # once the space is known, in any number of images
        step(model, batch(seed, erased=erased, space=space), METHODS["entprop"], space)


@pytest.mark.parametrize("erased", [0, 4])
def test_another_space_is_still_found_out(erased):
    model = entprop.wrap(make(BatchNormNet)).train()
    with pytest.raises(PixelRangeError, match="--remode const"):
        step(model, batch(0, erased=erased), METHODS["entprop"], entprop.PixelSpace())
    step(model, batch(0, erased=erased), METHODS["entprop"])
    with pytest.raises(PixelRangeError, match="divide by 255"):
        step(model, 255 * torch.rand(16, 3, 32, 32), METHODS["entprop"])
    white = torch.ones(16, 3, 32, 32)  # scaled to [-1, 1], some strokes of black
    white[:, :, 5:7] = -1
    with pytest.raises(PixelRangeError, match="pixel_space"):
        step(entprop.wrap(make(BatchNormNet)).train(), white, METHODS["entprop"], entprop.PixelSpace())


@pytest.mark.parametrize("attack", ["entprop", "entprop_steps", "advprop"])
def test_no_pixel_moves_further_than_epsilon(attack):
    model, images, method = entprop.wrap(make(BatchNormNet)).train(), batch(0), METHODS[attack]
    out = step(model, images, method)
    epsilon = method.attack[0] if isinstance(method, entprop.EntProp) else method.attack.epsilon
    origin = images if out.selected is None else images[out.selected]
    reach = (out.aux_images - origin).abs() / SPACE.scale(images)
    assert reach.max() <= epsilon * 1.001
    lower, upper = SPACE.bounds(images)
    assert (out.aux_images >= torch.minimum(lower, origin)).all()
    assert (out.aux_images <= torch.maximum(upper, origin)).all()


def test_attacks_at_pixels_outside_the_range():
    images = torch.tensor([-0.2, 0.0, 0.999, 1.0, 1.3, 4.0]).view(1, 1, 2, 3)
    space, epsilon = entprop.PixelSpace(), 4 / 255
    for direction in (-1.0, 1.0):
        moved = ascend(images, images, direction * torch.ones_like(images), epsilon=epsilon, step_size=1, space=space)
        assert (moved - images).abs().max() <= epsilon * 1.001
    torch.testing.assert_close(moved.flatten()[:4], torch.tensor([-0.2 + epsilon, epsilon, 1.0, 1.0]))
    start = uniform_start(images, epsilon, space, torch.Generator().manual_seed(0))
    assert (start - images).abs().max() <= epsilon * 1.001
    l2 = PGD(epsilon=0.1, steps=3, step_size=None, norm="l2").run(
        images, torch.ones_like, space, torch.Generator().manual_seed(0)
    )
    assert (l2 - images).norm() <= 0.1 * 1.001
