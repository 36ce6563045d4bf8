"""Augmentations by name, as people put them in front of any method: torchvision's, and Gaussian noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from entprop_wrap.errors import ConfigurationError

__all__ = ["AUGMENTATIONS", "augmentation"]

#: What :func:`augmentation` knows.
AUGMENTATIONS = ("none", "trivialaugment", "randaugment", "augmix", "gaussian")


def augmentation(name: str, *, sigma: float = 0.1) -> Callable[[Any], Any] | None:
    """Return a random change of one image, to be put after cropping and before conversion to floats.

        transform = v2.Compose([v2.RandomCrop(32, 4), augmentation("trivialaugment"), v2.ToDtype(torch.float32, True)])

    Args:
        name: "none"; torchvision's "trivialaugment" (wide; Müller & Hutter, ICCV 2021), "randaugment" (Cubuk et al.,
            2020) or "augmix" (Hendrycks et al., ICLR 2020; without its consistency loss), each with its defaults; or
            "gaussian", noise on half of the images.
        sigma: Standard deviation of the noise, as a fraction of the pixel range.

    Returns:
        A picklable callable on uint8 tensors ``(3, H, W)``, and, but for the noise, on PIL images; None for "none". It
        draws from torch's global generator.

    Raises:
        ConfigurationError: The name is unknown.
    """
    from torchvision.transforms import v2

    known: dict[str, Callable[[], Any]] = {
        "none": lambda: None,
        "trivialaugment": v2.TrivialAugmentWide,
        "randaugment": v2.RandAugment,
        "augmix": v2.AugMix,
        "gaussian": lambda: v2.RandomApply([v2.GaussianNoise(sigma=sigma)], p=0.5),
    }
    if name not in known:
        raise ConfigurationError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}, found {name!r}.")
    found: Callable[[Any], Any] | None = known[name]()
    return found
