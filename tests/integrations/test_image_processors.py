"""The pixel space is what the image processor of every classifier does to black and to white, in all of its forms."""

import numpy as np
import pytest
import torch
import transformers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from entprop_wrap import PixelSpace, training_step
from entprop_wrap.errors import ConfigurationError
from entprop_wrap.methods import Vanilla
from tests.helpers.hub_models import KINDS

#: No pixels that can be moved: class name -> what the error says.
REFUSED = {"ImageGPTImageProcessor": "no gradient"}


def _names():
    found = set()
    for kind in set(KINDS.values()):
        forms = IMAGE_PROCESSOR_MAPPING_NAMES.get(kind) or ()
        found |= {name for name in (forms.values() if isinstance(forms, dict) else forms) if name}
    return sorted(found - {"TimmWrapperImageProcessor"})  # in test_timm.py


NAMES = [name for name in _names() if name.removesuffix("Fast").removesuffix("Pil") not in REFUSED]
OPTIONS = [
    {},
    {"do_normalize": False},
    {"do_rescale": False},
    {"rescale_factor": 1 / 127.5},
    {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.4, 0.5]},
    {"rescale_offset": False},
    {"include_top": False},
    {"do_flip_channel_order": False},
]


def build(name, **options):
    small = {"size": {"height": 32, "width": 32}} if "Donut" in name or "Siglip" in name else {}
    return getattr(transformers, name)(**small, **options)


def seen(processor, value):
    """What ``processor`` makes of an image of one colour: a number per channel."""
    image = np.full((40, 40, 3), value, dtype=np.uint8)
    pixels = torch.as_tensor(np.asarray(processor(image, return_tensors="pt")["pixel_values"])).double()
    if pixels.ndim == 3:  # patches (N, L, 3 * size * size), padded with zeros
        return pixels[0, 0].view(-1, 3).mean(0)
    return pixels[0, :, pixels.shape[2] // 2, pixels.shape[3] // 2]  # some pad the border with black


@pytest.mark.parametrize("name", NAMES)
def test_the_space_is_what_the_processor_does(name):
    for options in OPTIONS:
        processor = build(name)
        if not all(hasattr(processor, key) for key in options):
            continue
        processor = build(name, **options)
        space = PixelSpace.from_processor(processor)
        for value, bound in zip((0, 255), space.bounds(torch.zeros(1, dtype=torch.float64)), strict=True):
            found, expected = seen(processor, value), bound.flatten().expand(3)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4), (options, value, found, expected)


@pytest.mark.parametrize("name", [name for name in _names() if name not in NAMES])
def test_colour_indices_are_refused(name):
    with pytest.raises(ConfigurationError, match="no gradient"):
        PixelSpace.from_processor(getattr(transformers, name)(clusters=np.zeros((4, 3))))


class Described:
    """An image processor that says what the test wants it to say."""

    do_rescale, rescale_factor = True, 1 / 255

    def __init__(self, **options):
        vars(self).update(options)


def test_what_a_processor_does_not_say_is_not_guessed():
    for options in ({}, {"image_mean": None, "image_std": None}, {"image_mean": [0.5] * 3, "image_std": None}):
        with pytest.raises(ConfigurationError, match="image_mean="):
            PixelSpace.from_processor(Described(do_normalize=True, **options))
    for name in ("Wav2Vec2FeatureExtractor", "WhisperFeatureExtractor"):
        with pytest.raises(ConfigurationError, match="is not an image processor"):
            PixelSpace.from_processor(getattr(transformers, name)())
    with pytest.raises(ConfigurationError, match="255"):
        PixelSpace.from_processor(Described(do_normalize=True, image_mean=[127.5] * 3, image_std=[127.5] * 3))
    one = Described(do_normalize=True, image_mean=0.5, image_std=0.25)
    assert PixelSpace.from_processor(one) == PixelSpace(0.5, 0.25)
    flipped = Described(
        do_normalize=True, image_mean=[0.1, 0.2, 0.3], image_std=[1, 1, 0.5], do_flip_channel_order=True
    )
    assert PixelSpace.from_processor(flipped) == PixelSpace((0.3, 0.2, 0.1), (0.5, 1, 1))


def test_pixels_that_were_scaled_before_a_processor_that_does_not_rescale():
    space = PixelSpace.from_processor(transformers.ViTImageProcessor(do_rescale=False))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    with pytest.warns(UserWarning, match="do_rescale=False"):
        training_step(net, torch.rand(4, 3, 4, 4) * 2 - 1, torch.arange(4) % 3, method=Vanilla(), pixel_space=space)
