"""The corruptions of ImageNet-C, CIFAR-C and ImageNet-C-bar, batched, on the device of the images.

Fifteen kinds at five severities, and four more that the authors keep for validation (Hendrycks & Dietterich 2019,
"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", https://arxiv.org/abs/1903.12261),
and ten that resemble none of these and no usual augmentation (ImageNet-C-bar).
All are called as :class:`Corruption` says, ``fog(images, severity, generator)``, and what is drawn for an image depends
only on the generator's seed and on how many images came before it: not on the batch size, and not on the device.

The published constants are kept; :mod:`.inputs` says which apply at which size. Results are not rounded to bytes
(but for JPEG, which is made of rounding), nor saved as JPEG as the images of ImageNet-C were. Frost is generated.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.corruptions.base import Corruption
from entprop_wrap.robustness.corruptions.blur import (
    defocus_blur,
    gaussian_blur,
    glass_blur,
    motion_blur,
    zoom_blur,
)
from entprop_wrap.robustness.corruptions.digital import (
    brightness,
    contrast,
    elastic_transform,
    pixelate,
    saturate,
)
from entprop_wrap.robustness.corruptions.jpeg import jpeg_compression
from entprop_wrap.robustness.corruptions.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from entprop_wrap.robustness.corruptions.occlusions import (
    blue_noise_sample,
    checkerboard_cutout,
    inverse_sparkles,
    sparkles,
)
from entprop_wrap.robustness.corruptions.overlays import (
    brownish_noise,
    cocentric_sine_waves,
    perlin_noise,
    plasma_noise,
    single_frequency_greyscale,
)
from entprop_wrap.robustness.corruptions.refraction import caustic_refraction
from entprop_wrap.robustness.corruptions.spatter import spatter
from entprop_wrap.robustness.corruptions.weather import fog, frost, snow
from entprop_wrap.utils.options import shown

__all__ = [
    "CORRUPTIONS",
    "C_BAR_CORRUPTIONS",
    "EXTRA_CORRUPTIONS",
    "SUITES",
    "Corruption",
    "blue_noise_sample",
    "brightness",
    "brownish_noise",
    "caustic_refraction",
    "checkerboard_cutout",
    "cocentric_sine_waves",
    "contrast",
    "corrupt",
    "defocus_blur",
    "elastic_transform",
    "fog",
    "frost",
    "gaussian_blur",
    "gaussian_noise",
    "glass_blur",
    "impulse_noise",
    "inverse_sparkles",
    "jpeg_compression",
    "motion_blur",
    "perlin_noise",
    "pixelate",
    "plasma_noise",
    "saturate",
    "shot_noise",
    "single_frequency_greyscale",
    "snow",
    "sparkles",
    "spatter",
    "speckle_noise",
    "zoom_blur",
]


#: The fifteen corruptions of ImageNet-C by name, in the order of the benchmark.
CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "gaussian_noise": gaussian_noise,
        "shot_noise": shot_noise,
        "impulse_noise": impulse_noise,
        "defocus_blur": defocus_blur,
        "glass_blur": glass_blur,
        "motion_blur": motion_blur,
        "zoom_blur": zoom_blur,
        "snow": snow,
        "frost": frost,
        "fog": fog,
        "brightness": brightness,
        "contrast": contrast,
        "elastic_transform": elastic_transform,
        "pixelate": pixelate,
        "jpeg_compression": jpeg_compression,
    }
)

#: The four held-out corruptions, which no published score includes.
EXTRA_CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "speckle_noise": speckle_noise,
        "gaussian_blur": gaussian_blur,
        "spatter": spatter,
        "saturate": saturate,
    }
)


#: The ten corruptions of ImageNet-C-bar, chosen by their authors to resemble neither those of ImageNet-C nor the usual
#: augmentations (Mintun, Kirillov & Xie 2021, https://arxiv.org/abs/2102.11273). Images below 96 px take the strengths
#: of CIFAR-10-C-bar, as far as that has the same corruptions (five of its ten are others).
C_BAR_CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "blue_noise_sample": blue_noise_sample,
        "brownish_noise": brownish_noise,
        "caustic_refraction": caustic_refraction,
        "checkerboard_cutout": checkerboard_cutout,
        "cocentric_sine_waves": cocentric_sine_waves,
        "inverse_sparkles": inverse_sparkles,
        "perlin_noise": perlin_noise,
        "plasma_noise": plasma_noise,
        "single_frequency_greyscale": single_frequency_greyscale,
        "sparkles": sparkles,
    }
)

#: Sets of corruptions by name.
SUITES: Mapping[str, Mapping[str, Corruption]] = MappingProxyType(
    {"c": CORRUPTIONS, "extra": EXTRA_CORRUPTIONS, "c-bar": C_BAR_CORRUPTIONS}
)

_KNOWN: Mapping[str, Corruption] = {**CORRUPTIONS, **EXTRA_CORRUPTIONS, **C_BAR_CORRUPTIONS}


def corrupt(images: Tensor, name: str, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Corrupt images by the name of a corruption.

    Args:
        images: ``(N, 3, H, W)``, floating point in [0, 1], at least 32 px.
        name: A key of :data:`CORRUPTIONS`, :data:`EXTRA_CORRUPTIONS` or :data:`C_BAR_CORRUPTIONS`.
        severity: 1 (mild) to 5 (strong).
        generator: CPU generator that seeds the images; ``None`` for torch's default one.

    Returns:
        New images of the same shape, dtype and device, clipped to [0, 1].

    Raises:
        ConfigurationError: The name is unknown, ``severity`` is not an int from 1 to 5, or ``generator`` is not on
            the CPU.
        ImageError: ``images`` is not such a batch, or holds values that are not finite.
        PixelRangeError: Values lie outside [0, 1].
    """
    if not isinstance(name, str) or name not in _KNOWN:
        close = difflib.get_close_matches(str(name), _KNOWN, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known are: {', '.join(_KNOWN)}."
        raise ConfigurationError(f"name must be that of a corruption, found {shown(name)}. {hint}")
    return _KNOWN[name](images, severity, generator)
