"""Patterns laid over the image: waves, rings, plasma, and Perlin and brownish noise.

Five of the ten corruptions of ImageNet-C-bar (Mintun, Kirillov & Xie 2021, "On Interaction Between Augmentations and
Corruptions in Natural Corruption Robustness", https://arxiv.org/abs/2102.11273), as their released code defines them.
Lengths are relative to the short side. Only brownish noise was published with strengths for 32 px, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import corruption
from entprop_wrap.robustness.corruptions.filters import lines
from entprop_wrap.robustness.corruptions.random import Draws

__all__ = [
    "brownish_noise",
    "cocentric_sine_waves",
    "perlin_noise",
    "plasma_noise",
    "single_frequency_greyscale",
    "spectral_noise",
]

# Most foldings of plasma, octaves of Perlin noise above the first, its cells along 224 px, and the length of its table.
_FOLDS = 6
_OCTAVES = (2, 4, 8, 16)
_CELLS = 7.0
_TABLE = 256


@corruption((1.0, 1.5, 2.0, 4.5, 5.0))
def single_frequency_greyscale(pixels: Tensor, draws: Draws, strength: float) -> Tensor:
    """Add a grey plane wave of random direction, frequency and phase."""
    first = draws.uniform((1, 1), -math.pi, math.pi)
    second = draws.uniform((1, 1), -1.0, 1.0) * first.abs()
    swap, phase = draws.below(2, (1, 1)) == 1, draws.uniform((1, 1), 0.0, 2.0 * math.pi)
    along_x, along_y = torch.where(swap, second, first), torch.where(swap, first, second)
    y, x = lines(pixels)
    wave = (x * along_x + y * along_y + phase).sin_().unsqueeze(1)
    return torch.add(pixels, wave, alpha=19.6 / 255 * strength)


@corruption((3.0, 5.0, 8.0, 9.0, 10.0))
def cocentric_sine_waves(pixels: Tensor, draws: Draws, strength: float) -> Tensor:
    """Add rings around a random centre, each rising from dark to bright, with wavy edges."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    left, top = draws.uniform((1, 1), 0.0, width), draws.uniform((1, 1), 0.0, height)
    frequency = draws.uniform((1, 1), 0.0, 10.0)
    amplitude, ring = draws.uniform((1, 1), 0.0, side / 10), draws.uniform((1, 1), 0.0, side / 10)
    y, x = lines(pixels)
    x, y = x - left, y - top
    distance = (x.square() + y.square()).sqrt_() + (torch.atan2(x, y) * frequency).sin_() * amplitude
    rings = (distance.remainder(ring) / ring).sub_(0.5).unsqueeze(1)
    return torch.add(pixels, rings, alpha=12.8 / 255 * strength)


@corruption((4.75, 7.0, 8.5, 9.25, 10.0))
def plasma_noise(pixels: Tensor, draws: Draws, strength: float) -> Tensor:
    """Lay coloured plasma over the image: waves of a plane that was folded several times by waves."""
    intensity = 6.4 / 255 * strength
    time, folds = draws.uniform((1, 1), 0.0, 6.0 * math.pi), draws.below(3, (1, 1)) + 4
    growth = 2.25 - draws.uniform((1, 1), 0.5, 1.0)
    scale = draws.uniform((1, 1), 0.075, 0.2) * min(pixels.shape[-2:])
    y, x = lines(pixels)
    x, y = (x / scale).expand(-1, len(y), -1), (y / scale).expand(-1, -1, len(x))
    for fold in range(_FOLDS):
        shift = time / 1.15**fold
        across = (y * 1.93**fold + shift).cos_() / growth**fold
        along = (x * 1.93**fold + shift).sin_() / growth**fold
        across, along = across - 0.3 * along, along + 0.3 * across
        x, y = torch.where(fold < folds, x + across, x), torch.where(fold < folds, y + along, y)
    noise = torch.stack([(x - time).sin_(), ((x + y + time.sin()) * 0.5).sin_(), (y + time).sin_()], dim=1)
    return pixels * (1.0 - intensity) + noise * intensity


@corruption((4.6, 5.2, 5.8, 7.6, 8.8))
def perlin_noise(pixels: Tensor, draws: Draws, strength: float) -> Tensor:
    """Blend the image with grey turbulence: five octaves of Perlin noise, folded at zero.

    Source of the noise: K. Perlin, "An Image Synthesizer" (1985), with a table of gradients, as released.
    """
    gradients = draws.uniform((_TABLE, 2), -1.0, 1.0)
    gradients = gradients / gradients.norm(dim=2, keepdim=True)
    table = draws.uniform((_TABLE,)).argsort(dim=1)
    y, x = (line.flatten() * (_CELLS / min(pixels.shape[-2:])) for line in lines(pixels))
    turbulence = _perlin(gradients, table, y, x).abs()
    for octave in _OCTAVES:
        turbulence += _perlin(gradients, table, y * octave, x * octave).abs() / octave
    noise = (0.5 * turbulence + 0.5).clamp_(max=1.0).unsqueeze(1)
    return torch.lerp(pixels, noise, 0.05 * strength)


@corruption((1.0, 2.0, 3.0, 4.0, 5.0), (2.5, 4.0, 5.5, 6.5, 7.0))
def brownish_noise(pixels: Tensor, draws: Draws, strength: float) -> Tensor:
    """Add noise whose amplitude falls with the square of its frequency, in each channel."""
    noise = spectral_noise(draws, pixels, lambda distance: 1.0 / (distance.square() + 1.0), 3)
    return torch.add(pixels, noise, alpha=6.4 / 255 * strength)


def spectral_noise(draws: Draws, pixels: Tensor, power: Callable[[Tensor], Tensor], planes: int) -> Tensor:
    """Return noise ``(N, planes, H, W)`` of deviation 1: random phases at each frequency.

    ``power`` gives the amplitude by the distance to the zero frequency, in cycles per short side.
    """
    height, width = pixels.shape[-2:]
    y, x = lines(pixels)
    side = min(height, width)
    distance = (((x - width / 2) * (side / width)).square() + ((y - height / 2) * (side / height)).square()).sqrt()
    half = draws.uniform((planes, height, width // 2), 0.0, 2.0 * math.pi)
    parts = [half, half.flip((-2, -1))]
    if width % 2:  # the middle column is its own mirror image
        middle = draws.uniform((planes, height // 2, 1), 0.0, 2.0 * math.pi)
        zero = [middle.new_zeros(*middle.shape[:2], 1, 1)] if height % 2 else []
        parts.insert(1, torch.cat([middle, *zero, middle.flip(-2)], dim=-2))
    phases = torch.cat(parts, dim=-1)
    waves = torch.polar(power(distance).expand_as(phases).contiguous(), phases)
    noise: Tensor = torch.fft.ifft2(waves.roll((height // 2, width // 2), (-2, -1))).real
    return noise / noise.std(dim=(-2, -1), keepdim=True, correction=0)


def _perlin(gradients: Tensor, table: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Return Perlin noise ``(N, H, W)`` at the places ``y`` ``(H,)`` and ``x`` ``(W,)``, in cells, at least 0."""
    row, column = y.long(), x.long()
    down, right = (y - row).unsqueeze(1), x - column

    def corner(below: int, beside: int) -> Tensor:
        rows, columns = (row + below) % _TABLE, (column + beside) % _TABLE
        entry = table.gather(1, (table[:, rows].unsqueeze(2) + columns).flatten(1) % _TABLE)
        slopes = gradients.gather(1, entry.unsqueeze(2).expand(-1, -1, 2)).view(-1, len(y), len(x), 2)
        return (down - below) * slopes[..., 0] + (right - beside) * slopes[..., 1]

    fade_down, fade_right = (t.square() * (3.0 - 2.0 * t) for t in (down, right))
    left_side = torch.lerp(corner(0, 0), corner(1, 0), fade_down)
    right_side = torch.lerp(corner(0, 1), corner(1, 1), fade_down)
    return 1.5 * torch.lerp(left_side, right_side, fade_right)
