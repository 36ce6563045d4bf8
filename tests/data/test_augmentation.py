"""Augmentations by name, and around a dataset of normalised images."""

import pickle

import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from entprop_wrap import PixelSpace
from entprop_wrap.data.augmentation import AUGMENTATIONS, AugmentedImages, augmentation
from entprop_wrap.errors import ConfigurationError

SPACE = PixelSpace((0.5, 0.4, 0.3), (0.25, 0.2, 0.3))


def _dataset():
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
    return TensorDataset(pixels * SPACE.scale(pixels) + SPACE.bounds(pixels)[0], torch.arange(6))


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_changes_images_and_keeps_their_form(name):
    change = pickle.loads(pickle.dumps(augmentation(name)))
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    found = [change(image) for _ in range(8)]
    assert {(one.shape, one.dtype) for one in found} == {(image.shape, torch.uint8)}
    assert any(not torch.equal(one, image) for one in found)
    torch.manual_seed(0)
    assert all(torch.equal(change(image), one) for one in found)
    if name != "gaussian":
        assert change(Image.new("RGB", (32, 32))).size == (32, 32)


def test_noise_is_on_half_of_the_images():
    change, grey = augmentation("gaussian"), torch.full((3, 16, 16), 128, dtype=torch.uint8)
    torch.manual_seed(0)
    noisy = [change(grey).double() for _ in range(400)]
    touched = [one for one in noisy if one.std() > 0]
    assert 160 < len(touched) < 240
    assert float(torch.stack(touched).std()) == pytest.approx(25.5, rel=0.02)


def test_a_dataset_is_augmented_in_its_pixel_space():
    data = _dataset()
    augmented = AugmentedImages(data, "trivialaugment", SPACE)
    assert len(augmented) == 6
    torch.manual_seed(1)
    images = [augmented[index] for index in range(6)]
    torch.manual_seed(1)
    for (found, label), (image, expected) in zip(images, data, strict=True):
        pixels = (image - SPACE.bounds(image[None])[0][0]) / SPACE.scale(image[None])[0]
        bytes_ = augmentation("trivialaugment")((255 * pixels).round().to(torch.uint8))
        back = (found - SPACE.bounds(image[None])[0][0]) / SPACE.scale(image[None])[0] * 255
        torch.testing.assert_close(back, bytes_.float(), rtol=0, atol=1e-3)
        assert label == expected


def test_an_unknown_name():
    with pytest.raises(ConfigurationError, match=r"trivialaugment, .*found 'trivial'"):
        augmentation("trivial")
