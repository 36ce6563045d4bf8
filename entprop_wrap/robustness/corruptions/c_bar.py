"""The ten corruptions of ImageNet-C-bar: patterns over the image, parts of it hidden, and moving water.

Mintun, Kirillov & Xie 2021, "On Interaction Between Augmentations and Corruptions in Natural Corruption Robustness",
https://arxiv.org/abs/2102.11273, as their released code defines them. Lengths are relative to the short side. Five
were published with strengths for 32 px, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import corruption
from entprop_wrap.robustness.corruptions.filters import gaussian_blur_2d, lines
from entprop_wrap.robustness.corruptions.random import Draws

# Most foldings of plasma, octaves of Perlin noise above the first, its cells along 224 px, and the length of its table.
_FOLDS = 6
_OCTAVES = (2, 4, 8, 16)
_CELLS = 7.0
_TABLE = 256
# For checkerboards and stars.
_GREY = 128 / 255
_SPARKS = 5
_FEWEST_RAYS, _MOST_RAYS = 50, 199
# As the released code has them: 2 pi, where waves begin, and the index of refraction.
_TURN, _START = 6.28318530718, 250.0
_INDEX = 4.0
# Light is not bent where it falls straight through: above this cosine.
_STRAIGHT = 1.0 - 1e-3


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
    noise = _spectral_noise(draws, pixels, lambda distance: 1.0 / (distance.square() + 1.0), 3)
    return torch.add(pixels, noise, alpha=6.4 / 255 * strength)


@corruption((0.8, 1.6, 2.4, 4.0, 5.6), (0.7, 1.4, 2.1, 3.5, 4.2))
def blue_noise_sample(pixels: Tensor, draws: Draws, strength: float) -> Tensor:
    """Set to black the pixels where noise, whose amplitude grows with its frequency, is below a threshold."""
    noise = _spectral_noise(draws, pixels, lambda distance: distance, 1)
    return pixels * (noise > 0.3 * strength - 2.5)


@corruption((2.0, 3.0, 4.0, 5.0, 6.0), (1.0, 2.0, 3.0, 4.0, 5.0))
def checkerboard_cutout(pixels: Tensor, draws: Draws, tenths: float) -> Tensor:
    """Turn some of the fields of one colour of a rotated checkerboard grey."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    angle, scale = draws.uniform((1, 1), 0.0, 2.0 * math.pi), draws.uniform((1, 1), 0.1, 0.25) * side
    most = math.ceil(math.hypot(height, width) / (0.1 * side))
    grey = draws.uniform((2 * most + 1, 2 * most + 1)) < 0.1 * tenths
    y, x = lines(pixels)
    down = (angle.cos() * y + angle.sin() * x) / scale
    right = (angle.cos() * x - angle.sin() * y) / scale
    same = down.floor().remainder(2) == right.floor().remainder(2)
    # As released, fields are counted by truncation: the two at the corner that everything is rotated about are alike.
    field = (down.long() + most) * (2 * most + 1) + right.long() + most
    hidden = same & grey.flatten(1).gather(1, field.flatten(1)).view_as(same)
    return pixels.masked_fill(hidden.unsqueeze(1), _GREY)


@corruption((1.0, 2.0, 3.0, 5.0, 6.0), (0.7, 3.5, 5.6, 6.3, 7.0))
def sparkles(pixels: Tensor, draws: Draws, percent: float) -> Tensor:
    """Lay five white stars with many rays over the image."""
    height, width = pixels.shape[-2:]
    centres = draws.uniform((_SPARKS, 2)) * pixels.new_tensor([height, width])
    rays = draws.below(_MOST_RAYS + 1 - _FEWEST_RAYS, (_SPARKS,)) + _FEWEST_RAYS
    radius = 0.01 * percent * min(height, width)
    lengths = (radius + 0.25 * radius * draws.normal((_SPARKS, _MOST_RAYS))).clamp_(min=1.0)
    for spark in range(_SPARKS):
        light = _star(pixels, centres[:, spark], rays[:, spark], lengths[:, spark], 1.0)
        pixels = torch.lerp(pixels, pixels.new_ones(()), light)
    return pixels


@corruption((1.0, 2.0, 4.0, 9.0, 10.0), (1.0, 1.5, 2.5, 4.5, 5.0))
def inverse_sparkles(pixels: Tensor, draws: Draws, strength: float) -> Tensor:
    """Cover the image with white, but for a star near its middle."""
    height, width = pixels.shape[-2:]
    centre = draws.uniform((2,), 0.25, 0.75) * pixels.new_tensor([height, width])
    rays = draws.below(_MOST_RAYS + 1 - _FEWEST_RAYS, ()) + _FEWEST_RAYS
    radius = 0.25 * min(height, width)
    lengths = radius + 0.25 * radius * draws.normal((_MOST_RAYS,))
    return torch.lerp(pixels.new_ones(()), pixels, _star(pixels, centre, rays, lengths, 0.13 * strength))


@corruption((2.35, 3.2, 4.9, 6.6, 9.15))
def caustic_refraction(pixels: Tensor, draws: Draws, strength: float) -> Tensor:
    """Bend the image at the slopes of a web of light, as on the ground of a pool, and shade it by them.

    Places are not rounded to a thousandth of a pixel, as they are in the released code.
    """
    side = min(pixels.shape[-2:])
    time, size = draws.uniform((1, 1), 0.5, 2.0), draws.uniform((1, 1), 0.75, 1.25) * side
    y, x = lines(pixels)
    web = gaussian_blur_2d(_caustics(y / size, x / size, time).unsqueeze(1), 1.0, truncate=4.0, border="reflect")
    framed = F.pad(web, (1, 1, 1, 1)).squeeze(1)  # dark outside
    down = framed[:, 2:, 1:-1] - framed[:, :-2, 1:-1]
    right = framed[:, 1:-1, 2:] - framed[:, 1:-1, :-2]
    # The normal of the surface is (down, right, 1); what comes from above leaves in its plane, at a smaller angle.
    slope = down.square() + right.square()
    normal = 1.0 / (slope + 1.0).sqrt()
    incoming = normal.clamp(max=1.0).acos()
    bent = (incoming - (incoming.sin() / _INDEX).asin()).sin() / slope.sqrt().clamp(min=1e-12)
    bent = torch.where(normal >= _STRAIGHT, 0.0, bent) * (0.05 * strength * side)
    moved = _read(pixels, y + bent * down, x + bent * right)
    return moved + ((down - right) * (0.2 * strength)).unsqueeze(1)


def _spectral_noise(draws: Draws, pixels: Tensor, power: Callable[[Tensor], Tensor], planes: int) -> Tensor:
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


def _star(pixels: Tensor, centre: Tensor, rays: Tensor, lengths: Tensor, exponent: float) -> Tensor:
    """Return how much a star covers, ``(N, 1, H, W)`` from 0 to 1.

    It has a ``centre`` ``(N, 2)``, y and x, and ``rays`` ``(N,)`` of some ``lengths`` ``(N, 199)``, in pixels, and
    falls with the distance to the power of -2 ``exponent``.
    """
    y, x = lines(pixels)
    y, x = y - centre[:, 0].view(-1, 1, 1), x - centre[:, 1].view(-1, 1, 1)
    rays = rays.view(-1, 1, 1).long()
    turn = (torch.atan2(x, y) + math.pi) / (2.0 * math.pi) * rays
    ray = turn.long()
    between = turn - ray
    first, second = (lengths.gather(1, (one % rays).flatten(1)).view_as(turn) for one in (ray, ray + 1))
    length = torch.lerp(first, second, between)
    fall = (length.square() / (x.square() + y.square() + 1e-4)) ** exponent
    return ((1.0 - (between - 0.5).square()) * fall).clamp_(0.0, 1.0).unsqueeze(1)


def _caustics(y: Tensor, x: Tensor, time: Tensor) -> Tensor:
    """Return a web of light ``(N, H, W)`` from 0 to 1, at places in units of its period."""
    phase_y = (y.frac() * _TURN).expand(-1, -1, x.shape[-1])
    phase_x = (x.frac() * _TURN).expand(-1, y.shape[-2], -1)
    start_y, start_x = phase_y - _START, phase_x - _START
    # The same angles nearer to zero, where float32 is finer.
    angle_y, angle_x = phase_y + (80.0 * math.pi - _START), phase_x + (80.0 * math.pi - _START)
    at_y, at_x, light = angle_y, angle_x, torch.ones_like(angle_y)
    for wave in range(1, 6):
        t = time * (1.0 - 3.5 / wave)
        at_y, at_x = (
            angle_y + (t - at_y).cos() + (t + at_x).sin(),
            angle_x + (t - at_x).sin() + (t + at_y).cos(),
        )
        light = light + 200.0 / torch.hypot(start_y / (at_y + t).sin(), start_x / (at_x + t).cos())
    return (1.17 - (light / 5.0) ** 1.4).abs().pow(8.0).clamp(0.0, 1.0)


def _read(pixels: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Read images at places ``(N, H, W)`` in pixels, linearly between pixels; outside they are black."""
    height, width = pixels.shape[-2:]
    grid = torch.stack([x * (2.0 / (width - 1)) - 1.0, y * (2.0 / (height - 1)) - 1.0], dim=-1)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
