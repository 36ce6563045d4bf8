"""The corruptions of ImageNet-C, CIFAR-C and ImageNet-C-bar, batched, on the device of the images.

Fifteen kinds at five severities, and four more that the authors keep for validation (Hendrycks & Dietterich 2019,
"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", https://arxiv.org/abs/1903.12261),
and ten that resemble none of these and no usual augmentation (ImageNet-C-bar).
All are called as ``fog(images, severity, generator)``, and what is drawn for an image depends only on the generator's
seed and on how many images came before it: not on the batch size, and not on the device.

The published constants are kept; images below 96 px take those of CIFAR-C. Results are not rounded to bytes (but for
JPEG), nor saved as JPEG as the images of ImageNet-C were. Frost is generated.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.corruptions import blur, digital, noise, occlusions, overlays, weather
from entprop_wrap.robustness.corruptions.base import Corruption
from entprop_wrap.robustness.corruptions.refraction import caustic_refraction
from entprop_wrap.robustness.corruptions.spatter import spatter
from entprop_wrap.utils.options import shown

__all__ = ["CORRUPTIONS", "C_BAR_CORRUPTIONS", "EXTRA_CORRUPTIONS", "SUITES", "Corruption", "corrupt"]


def _named(*corruptions: Corruption) -> Mapping[str, Corruption]:
    return MappingProxyType({corruption.__name__: corruption for corruption in corruptions})


#: The fifteen corruptions of ImageNet-C by name, in the order of the benchmark.
CORRUPTIONS: Mapping[str, Corruption] = _named(
    *(noise.gaussian_noise, noise.shot_noise, noise.impulse_noise),
    *(blur.defocus_blur, blur.glass_blur, blur.motion_blur, blur.zoom_blur, weather.snow, weather.frost, weather.fog),
    *(digital.brightness, digital.contrast, digital.elastic_transform, digital.pixelate),
    digital.jpeg_compression,
)

#: The four held-out corruptions, which no published score includes.
EXTRA_CORRUPTIONS: Mapping[str, Corruption] = _named(noise.speckle_noise, blur.gaussian_blur, spatter, digital.saturate)

#: The ten corruptions of ImageNet-C-bar, chosen by their authors to resemble neither those of ImageNet-C nor the usual
#: augmentations (Mintun, Kirillov & Xie 2021, https://arxiv.org/abs/2102.11273). Images below 96 px take the strengths
#: of CIFAR-10-C-bar, as far as that has the same corruptions (five of its ten are others).
C_BAR_CORRUPTIONS: Mapping[str, Corruption] = _named(
    *(occlusions.blue_noise_sample, overlays.brownish_noise, caustic_refraction, occlusions.checkerboard_cutout),
    *(overlays.cocentric_sine_waves, occlusions.inverse_sparkles, overlays.perlin_noise, overlays.plasma_noise),
    *(overlays.single_frequency_greyscale, occlusions.sparkles),
)

#: Sets of corruptions by name.
SUITES: Mapping[str, Mapping[str, Corruption]] = MappingProxyType(
    {"c": CORRUPTIONS, "extra": EXTRA_CORRUPTIONS, "c-bar": C_BAR_CORRUPTIONS}
)

_KNOWN: Mapping[str, Corruption] = {**CORRUPTIONS, **EXTRA_CORRUPTIONS, **C_BAR_CORRUPTIONS}


def check_corruption(name: str, value: Any) -> Corruption:
    """Return the corruption called ``value``; ``name`` is what messages call the option."""
    if isinstance(value, str) and value in _KNOWN:
        return _KNOWN[value]
    close = difflib.get_close_matches(str(value), _KNOWN, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known are: {', '.join(_KNOWN)}."
    raise ConfigurationError(f"{name} must be that of a corruption, found {shown(value)}. {hint}")


def corrupt(images: Tensor, name: str, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Corrupt images by the name of a corruption.

    Args:
        images: ``(N, 3, H, W)``, floating point in [0, 1], at least 32 px.
        name: A key of :data:`CORRUPTIONS`, :data:`EXTRA_CORRUPTIONS` or :data:`C_BAR_CORRUPTIONS`.
        severity: 1 (mild) to 5 (strong).
        generator: CPU generator of one seed for each image; None: torch's default.

    Returns:
        New images of the same shape, dtype and device, clipped to [0, 1].

    Raises:
        ConfigurationError: The name is unknown, ``severity`` is not an integer from 1 to 5, or ``generator`` is not on
            the CPU.
        ImageError: ``images`` is not such a batch, or holds values that are not finite.
        PixelRangeError: Values lie outside [0, 1].
        ImportError: Pillow is not installed, for "jpeg_compression".
    """
    return check_corruption("name", name)(images, severity, generator)
