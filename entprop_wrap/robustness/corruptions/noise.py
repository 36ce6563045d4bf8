"""Noise: Gaussian, shot, impulse, and speckle (Hendrycks & Dietterich 2019, section 4.1 and appendix B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entprop_wrap.robustness.corruptions.draws import Draws
from entprop_wrap.robustness.corruptions.inputs import Levels, begin, finish, in_slices

__all__ = ["gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"]

# Standard deviation, in units of the pixel range.
_GAUSSIAN = Levels((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10))
# Photons that a white pixel collects.
_SHOT = Levels((60.0, 25.0, 12.0, 5.0, 3.0), (500.0, 250.0, 100.0, 75.0, 50.0))
# Share of the values that are replaced.
_IMPULSE = Levels((0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07))
# Standard deviation, in units of the pixel itself.
_SPECKLE = Levels((0.15, 0.2, 0.35, 0.45, 0.6), (0.06, 0.1, 0.12, 0.16, 0.2))

# Below this rate counts are found by summing the distribution, above it by expanding its quantiles.
_FEW = 4.0
# P(count > 18 | rate 4) is 1e-7, which is the resolution of the draws.
_MOST_OF_FEW = 18


@in_slices
def gaussian_noise(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Add independent normal noise to every value, as in low light.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1], at least 32 px.
        severity: 1 (mild) to 5 (strong).
        generator: CPU generator that seeds the images; ``None`` for torch's default one.

    Returns:
        New images of the same shape, dtype and device, clipped to [0, 1].

    Raises:
        ConfigurationError, ImageError, PixelRangeError: See :func:`~.inputs.begin`.
    """
    pixels, sigma = begin(images, severity, _GAUSSIAN)
    noise = Draws(pixels, generator).normal(pixels.shape[1:])
    return finish(noise.mul_(sigma).add_(pixels), images)


@in_slices
def shot_noise(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Replace every value by a Poisson count of photons, as in electronic sensors.

    Counts are exact in distribution where fewer than 4 photons are expected. Elsewhere they come from the quantile
    expansion, and at most one draw in 600 is off by one photon.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1], at least 32 px.
        severity: 1 (mild) to 5 (strong).
        generator: CPU generator that seeds the images; ``None`` for torch's default one.

    Returns:
        New images of the same shape, dtype and device, clipped to [0, 1].

    Raises:
        ConfigurationError, ImageError, PixelRangeError: See :func:`~.inputs.begin`.
    """
    pixels, photons = begin(images, severity, _SHOT)
    probability = Draws(pixels, generator).uniform(pixels.shape[1:])
    return finish(_poisson(pixels * photons, probability, photons).div_(photons), images)


@in_slices
def impulse_noise(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Set some values to 0 and as many to 1: salt and pepper in each channel, as from bit errors.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1], at least 32 px.
        severity: 1 (mild) to 5 (strong).
        generator: CPU generator that seeds the images; ``None`` for torch's default one.

    Returns:
        New images of the same shape, dtype and device, clipped to [0, 1].

    Raises:
        ConfigurationError, ImageError, PixelRangeError: See :func:`~.inputs.begin`.
    """
    pixels, amount = begin(images, severity, _IMPULSE)
    chance = Draws(pixels, generator).uniform(pixels.shape[1:])
    peppered = pixels.masked_fill(chance < amount / 2, 0.0)
    return finish(peppered.masked_fill_(chance > 1.0 - amount / 2, 1.0), images)


@in_slices
def speckle_noise(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Add normal noise in proportion to each value: the brighter, the noisier.

    Args:
        images: ``(N, 3, H, W)`` in [0, 1], at least 32 px.
        severity: 1 (mild) to 5 (strong).
        generator: CPU generator that seeds the images; ``None`` for torch's default one.

    Returns:
        New images of the same shape, dtype and device, clipped to [0, 1].

    Raises:
        ConfigurationError, ImageError, PixelRangeError: See :func:`~.inputs.begin`.
    """
    pixels, sigma = begin(images, severity, _SPECKLE)
    noise = Draws(pixels, generator).normal(pixels.shape[1:])
    return finish(noise.mul_(sigma).add_(1.0).mul_(pixels), images)


def _poisson(rate: Tensor, probability: Tensor, highest: float) -> Tensor:
    """Counts at which the Poisson distribution of each ``rate`` up to ``highest`` reaches each ``probability``."""
    if highest < _FEW:
        return _sum_up(rate, probability)
    counts = _expand(rate.clamp(min=_FEW), probability).flatten()
    few = (rate < _FEW).flatten().nonzero().squeeze(1)
    counts[few] = _sum_up(rate.take(few), probability.take(few))
    return counts.view_as(rate)


def _sum_up(rate: Tensor, probability: Tensor) -> Tensor:
    """Poisson quantiles for rates below ``_FEW``: how many partial sums stay below the probability."""
    target = probability * rate.exp()
    power, partial = torch.ones_like(rate), torch.ones_like(rate)
    below = torch.empty_like(rate)
    counts = torch.gt(target, partial).to(rate.dtype)
    for count in range(1, _MOST_OF_FEW + 1):
        partial.add_(power.mul_(rate), alpha=1.0 / math.factorial(count))
        counts.add_(torch.gt(target, partial, out=below))
    return counts


def _expand(rate: Tensor, probability: Tensor) -> Tensor:
    """Poisson quantiles for rates from ``_FEW`` upwards, to the order ``1 / rate``.

    Source: M. Giles, "Algorithm 955: Approximation of the Inverse Poisson Cumulative Distribution Function" (2016),
    section 2.2.
    """
    root = rate.sqrt()
    z = torch.erfinv(2.0 * probability - 1.0).mul_(math.sqrt(2.0))
    square = z * z
    counts = (root * z).add_(rate).add_(square, alpha=1 / 6).add_(1 / 3)
    counts -= (square / 72).add_(1 / 36).mul_(z).div_(root)
    counts += (square / 270).add_(7 / 810).mul_(square).sub_(8 / 405).div_(rate)
    return counts.floor_().clamp_(min=0.0)
