"""Noise: Gaussian, shot and impulse (Hendrycks & Dietterich 2019, section 4.1 and appendix B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import corruption
from entprop_wrap.robustness.corruptions.random import Draws

# Below this rate counts are found by summing the distribution, above it by expanding its quantiles.
_FEW = 4.0
# Such a count exceeds this less often than draws can tell, 1e-7.
_MOST = 18
# Turns every difference between two floats from 1e-30 upwards into 1 or more.
_STEEP = 1e30


@corruption((0.08, 0.12, 0.18, 0.26, 0.38), (0.04, 0.06, 0.08, 0.09, 0.10))
def gaussian_noise(pixels: Tensor, draws: Draws, sigma: float) -> Tensor:
    """Add independent normal noise to every value, as in low light."""
    return draws.normal(pixels.shape[1:]).mul_(sigma).add_(pixels)


@corruption((60.0, 25.0, 12.0, 5.0, 3.0), (500.0, 250.0, 100.0, 75.0, 50.0))
def shot_noise(pixels: Tensor, draws: Draws, photons: float) -> Tensor:
    """Replace every value by a Poisson count of photons, as in electronic sensors.

    Counts are exact in distribution where fewer than 4 photons are expected. Elsewhere they come from the quantile
    expansion, and at most one draw in 600 is off by one photon. The constants are the photons of a white pixel.
    """
    return _poisson(pixels * photons, draws.uniform(pixels.shape[1:]), photons).div_(photons)


@corruption((0.03, 0.06, 0.09, 0.17, 0.27), (0.01, 0.02, 0.03, 0.05, 0.07))
def impulse_noise(pixels: Tensor, draws: Draws, share: float) -> Tensor:
    """Set some values to 0 and as many to 1: salt and pepper in each channel, as from bit errors."""
    chance = draws.uniform(pixels.shape[1:])
    # Products and maxima, because selecting by a mask costs a CPU ten times as much.
    kept, salt = (chance >= share / 2).to(pixels.dtype), (chance > 1.0 - share / 2).to(pixels.dtype)
    return torch.maximum(kept.mul_(pixels), salt)


def _poisson(rate: Tensor, probability: Tensor, highest: float) -> Tensor:
    """Return the counts at which the Poisson distribution of each ``rate`` up to ``highest`` reaches a probability."""
    if highest <= _FEW:
        return _sum_up(rate, probability)
    rate, chance = rate.flatten(), probability.flatten()
    counts = _expand(rate.clamp(min=_FEW), chance)
    few = (rate < _FEW).nonzero().squeeze(1)
    counts[few] = _sum_up(rate.take(few), chance.take(few))
    return counts.view_as(probability)


def _sum_up(rate: Tensor, probability: Tensor) -> Tensor:
    """Return Poisson quantiles for small rates: how many partial sums stay below the probability."""
    target = probability * rate.exp()
    power, partial = torch.ones_like(rate), torch.ones_like(rate)
    counts, below = torch.zeros_like(rate), torch.empty_like(rate)
    for count in range(_MOST):
        if count:
            partial.add_(power.mul_(rate), alpha=1.0 / math.factorial(count))
        # 1 where the sum is below and 0 elsewhere; a comparison costs a CPU twice as much.
        counts.add_(torch.sub(target, partial, out=below).mul_(_STEEP).clamp_(0.0, 1.0))
    return counts


def _expand(rate: Tensor, probability: Tensor) -> Tensor:
    """Return Poisson quantiles for rates from ``_FEW`` upwards, to the order ``1 / rate``.

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
