"""The corruptions of ImageNet-C, CIFAR-C and ImageNet-C-bar, batched, on the device of the images.

Fifteen kinds at five severities (Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations", https://arxiv.org/abs/1903.12261), and ten that resemble none of these and no usual
augmentation (ImageNet-C-bar). All are called as ``fog(images, severity, generator)``. What is drawn for an image
depends on the generator's seed and on the number of images before it, not on the batch size or the device.

The published constants are kept; images below 96 px take those of CIFAR-C. Results are not rounded to bytes (but for
JPEG), nor saved as JPEG as the images of ImageNet-C were. Frost is generated.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from entprop_wrap.errors import ConfigurationError
from entprop_wrap.robustness.corruptions import blur, c_bar, digital, noise, weather
from entprop_wrap.robustness.corruptions.base import Corruption, corruption
from entprop_wrap.utils.options import check_choice, check_integer, check_sequence, shown

__all__ = ["CORRUPTIONS", "SUITES", "Corruption", "corrupt", "corruption"]


def _named(*corruptions: Corruption) -> Mapping[str, Corruption]:
    return MappingProxyType({one.__name__: one for one in corruptions})


#: The fifteen corruptions of ImageNet-C by name, in the order of the benchmark.
CORRUPTIONS = _named(
    *(noise.gaussian_noise, noise.shot_noise, noise.impulse_noise),
    *(blur.defocus_blur, blur.glass_blur, blur.motion_blur, blur.zoom_blur, weather.snow, weather.frost, weather.fog),
    *(digital.brightness, digital.contrast, digital.elastic_transform, digital.pixelate),
    digital.jpeg_compression,
)

#: Sets of corruptions by name: "c", and "c-bar", the ten of ImageNet-C-bar (Mintun, Kirillov & Xie 2021,
#: https://arxiv.org/abs/2102.11273). Images below 96 px take the strengths of CIFAR-10-C-bar, as far as that has the
#: same corruptions (five of its ten are others).
SUITES: Mapping[str, Mapping[str, Corruption]] = MappingProxyType(
    {
        "c": CORRUPTIONS,
        "c-bar": _named(
            *(c_bar.blue_noise_sample, c_bar.brownish_noise, c_bar.caustic_refraction, c_bar.checkerboard_cutout),
            *(c_bar.cocentric_sine_waves, c_bar.inverse_sparkles, c_bar.perlin_noise, c_bar.plasma_noise),
            *(c_bar.single_frequency_greyscale, c_bar.sparkles),
        ),
    }
)

_KNOWN: dict[str, Corruption] = {**CORRUPTIONS, **SUITES["c-bar"]}


def corrupt(images: Tensor, name: str, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Corrupt images by the name of a corruption, a key of one of the :data:`SUITES`.

    The other arguments, the result and errors are those of :class:`Corruption`.

    Raises:
        ConfigurationError: The name is unknown.
    """
    return _find("name", name)(images, severity, generator)


def conditions_of(
    corruptions: Sequence[str | Corruption] | None, severities: Sequence[int], suite: str | None = None
) -> dict[tuple[str, int], Corruption]:
    """Return corruptions by ``(name, severity)``, checked: those given, or all in ``suite``; None: "c"."""
    if suite is not None and corruptions is not None:
        raise ConfigurationError("corruptions and suite name the same thing twice. Write one of them.")
    of_suite = tuple(SUITES[check_choice("suite", "c" if suite is None else suite, tuple(SUITES))])
    given = check_sequence("corruptions", of_suite if corruptions is None else corruptions, "names", '("fog",)')
    severities = check_sequence("severities", severities, "integers", "(3,)")
    found = [_find("An entry of corruptions", one) for one in given]
    for severity in severities:
        check_integer("An entry of severities", severity, 1, 5)
    names = [one.__name__ for one in found]
    for key, values in (("corruptions", names), ("severities", severities)):
        if len(set(values)) < len(values):
            raise ConfigurationError(f"{key} has an entry twice, which would count twice in RA: {values!r}.")
    return {(name, severity): one for name, one in zip(names, found, strict=True) for severity in severities}


def _find(option: str, value: Any) -> Corruption:
    """Return a known corruption by its name, or the user's own; ``option`` is what messages call it."""
    if isinstance(value, Corruption):
        if _KNOWN.get(value.__name__, value) is not value:
            raise ConfigurationError(f"{option} has the name of another, {value.__name__!r}. Rename its function.")
        return value
    if isinstance(value, str) and value in _KNOWN:
        return _KNOWN[value]
    close = difflib.get_close_matches(str(value), _KNOWN, n=1)
    hint = f"Did you mean {close[0]!r}?" if close else f"Known are: {', '.join(_KNOWN)}."
    raise ConfigurationError(f"{option} must be that of a corruption, found {shown(value)}. {hint}")
