"""Pixel spaces agree with the libraries they are read from; a step stays within epsilon and valid pixels."""

import math

import pytest
import timm
import torch

from entprop_wrap import EntProp, PixelSpace
from entprop_wrap.errors import ConfigurationError, PixelRangeError
from entprop_wrap.functional.attacks import ascend


def test_what_is_no_processor_has_no_space():
    with pytest.raises(ConfigurationError, match="not an image processor"):
        PixelSpace.from_processor(object())


def test_space_of_a_timm_model():
    model = timm.create_model("test_vit")
    space = PixelSpace.from_timm(model)
    assert (space.mean, space.std) == (tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"]))
    assert PixelSpace.from_timm(timm.data.resolve_model_data_config(model)) == space
    assert PixelSpace.from_timm(timm.get_pretrained_cfg("test_vit")) == space
    with pytest.raises(ConfigurationError, match="PixelSpace"):
        PixelSpace.from_timm(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.5, 0.0), "above 0"),
        (((0.5,) * 3, (0.5, -0.5, 0.5)), "std must be a number above 0"),
        ((math.nan, 1.0), "mean must be"),
        ((0.5, math.nan), "std must be a number above 0, found nan"),
        (((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), "divide both by 255"),
        (((0.5, 0.5, 0.5), (0.5, 0.5)), "3 channels and std 2"),
    ],
)
def test_spaces_that_cannot_be(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        PixelSpace(*arguments)


@pytest.mark.parametrize(
    "space", [PixelSpace(), PixelSpace(0.5, 0.5), PixelSpace((0.48, 0.45, 0.4), (0.23, 0.22, 0.2))]
)
def test_many_steps_stay_within_epsilon_and_pixels(space):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(5, 3, 8, 8, generator=generator, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in (space.mean, space.std))
    origin = images = (pixels - mean) / std
    for _ in range(7):
        gradient = torch.randn(origin.shape, generator=generator, dtype=torch.float64) + 0.5
        images = ascend(images, origin, gradient, epsilon=4 / 255, step_size=1 / 255, space=space)
    moved = images * std + mean
    assert float((moved - pixels).abs().max()) <= 4 / 255 + 1e-12
    assert float(moved.min()) >= 0
    assert float(moved.max()) <= 1
    assert float((moved - pixels).abs().max()) > 3.5 / 255


def test_a_gradient_of_nan_or_infinity_leaves_finite_images():
    gradient = torch.tensor([math.nan, math.inf, -math.inf, 0.0]).view(1, 1, 2, 2)
    images = torch.full((1, 1, 2, 2), 0.5)
    moved = ascend(images, images, gradient, epsilon=0.1, step_size=0.1, space=PixelSpace())
    assert moved.flatten().tolist() == pytest.approx([0.5, 0.6, 0.4, 0.5])


@pytest.mark.parametrize(
    ("steps", "epsilon", "attack"), [(1, None, (1, 1)), (5, None, (6, 1)), (1, 25.5, (25.5, 25.5))]
)
def test_magnitudes_of_the_paper_in_pixels(steps, epsilon, attack):
    method = EntProp(attack_steps=steps, epsilon=None if epsilon is None else epsilon / 255)
    assert [255 * value for value in method.attack] == pytest.approx(attack)


@pytest.mark.parametrize("value", [4, 1, 0, -0.1, "4/255", 255.0, math.nan, True])
def test_magnitudes_that_are_no_fraction_are_refused(value):
    with pytest.raises(
        PixelRangeError, match="fraction of the full pixel range" + (".*Write epsilon=4/255") * (value == 4)
    ):
        EntProp(epsilon=value)
