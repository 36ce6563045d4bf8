"""Augmentations by name, as people put them in front of any method: torchvision's, and Gaussian noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import ConfigurationError

#: What :func:`augmentation` knows.
AUGMENTATIONS = ("trivialaugment", "randaugment", "augmix", "gaussian")


def augmentation(name: str) -> Callable[[Any], Any]:
    """Return a random change of one image, to be put after cropping and before conversion to floats.

        transform = v2.Compose([v2.RandomCrop(32, 4), augmentation("trivialaugment"), v2.ToDtype(torch.float32, True)])

    Args:
        name: torchvision's "trivialaugment" (wide; Müller & Hutter, ICCV 2021), "randaugment" (Cubuk et al., 2020) or
            "augmix" (Hendrycks et al., ICLR 2020; without its consistency loss), each with its defaults; or "gaussian",
            noise on half of the images, with a standard deviation of 0.1 of the pixel range.

    Returns:
        A picklable callable on uint8 tensors ``(3, H, W)``, and, but for the noise, on PIL images. It draws from
        torch's global generator.

    Raises:
        ConfigurationError: The name is unknown.
    """
    from torchvision.transforms import v2

    # Through floats, because older versions of torchvision know no other noise.
    noise = [v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise(sigma=0.1), v2.ToDtype(torch.uint8, scale=True)]
    known: dict[str, Callable[[], Callable[[Any], Any]]] = {
        "trivialaugment": v2.TrivialAugmentWide,
        "randaugment": v2.RandAugment,
        "augmix": v2.AugMix,
        "gaussian": lambda: v2.RandomApply(noise, p=0.5),
    }
    if name not in known:
        raise ConfigurationError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, found {name!r}.")
    return known[name]()


class AugmentedImages(Dataset[tuple[Tensor, Any]]):
    """A dataset of ``(image (3, H, W), label)`` in ``space`` with an :func:`augmentation` after all else, as bytes."""

    def __init__(self, images: Any, name: str, space: PixelSpace) -> None:
        self.images, self.space, self.augment = images, space, augmentation(name)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.images[index]
        pixels = self.space.to_pixels(image[None])[0].mul(255).round().to(torch.uint8)
        return self.space.to_images(self.augment(pixels)[None].to(image.dtype) / 255)[0], label
