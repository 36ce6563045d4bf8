"""Parts of the image hidden: by holes of blue noise, a checkerboard, sparkles, and all but one sparkle.

Four of the ten corruptions of ImageNet-C-bar, see :mod:`.overlays` for their source.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import corruption
from entprop_wrap.robustness.corruptions.filters import lines
from entprop_wrap.robustness.corruptions.overlays import spectral_noise
from entprop_wrap.robustness.corruptions.random import Draws

__all__ = ["blue_noise_sample", "checkerboard_cutout", "inverse_sparkles", "sparkles"]

_GREY = 128 / 255
_SPARKS = 5
_FEWEST_RAYS, _MOST_RAYS = 50, 199


@corruption((0.8, 1.6, 2.4, 4.0, 5.6), (0.7, 1.4, 2.1, 3.5, 4.2))
def blue_noise_sample(pixels: Tensor, draws: Draws, strength: float) -> Tensor:
    """Set to black the pixels where noise, whose amplitude grows with its frequency, is below a threshold."""
    noise = spectral_noise(draws, pixels, lambda distance: distance, 1)
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
