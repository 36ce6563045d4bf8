"""Parts of the image hidden: by holes of blue noise, a checkerboard, sparkles, and all but one sparkle.

Four of the ten corruptions of ImageNet-C-bar, see :mod:`.overlays` for their source.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import Levels, begin, finish, in_slices
from entprop_wrap.robustness.corruptions.filters import lines
from entprop_wrap.robustness.corruptions.overlays import spectral_noise
from entprop_wrap.robustness.corruptions.random import Draws

__all__ = ["blue_noise_sample", "checkerboard_cutout", "inverse_sparkles", "sparkles"]

# Standard deviations of the noise, above a threshold of -2.5.
_BLUE = Levels.of(0.3, (0.8, 1.6, 2.4, 4.0, 5.6), (0.7, 1.4, 2.1, 3.5, 4.2))
# Share of the fields of one colour that are grey.
_CHECKERBOARD = Levels.of(0.1, (2.0, 3.0, 4.0, 5.0, 6.0), (1.0, 2.0, 3.0, 4.0, 5.0))
# Radius, as a fraction of the short side.
_SPARKLES = Levels.of(0.01, (1.0, 2.0, 3.0, 5.0, 6.0), (0.7, 3.5, 5.6, 6.3, 7.0))
# Exponent of the fall with distance.
_INVERSE = Levels.of(0.13, (1.0, 2.0, 4.0, 9.0, 10.0), (1.0, 1.5, 2.5, 4.5, 5.0))

_GREY = 128 / 255
_SPARKS = 5
_FEWEST_RAYS, _MOST_RAYS = 50, 199


@in_slices()
def blue_noise_sample(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Set to black the pixels where noise, whose amplitude grows with its frequency, is below a threshold."""
    pixels, threshold = begin(images, severity, _BLUE)
    noise = spectral_noise(Draws(pixels, generator), pixels, lambda distance: distance, 1)
    return finish(pixels * (noise > threshold - 2.5), images)


@in_slices()
def checkerboard_cutout(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Turn some of the fields of one colour of a rotated checkerboard grey."""
    pixels, share = begin(images, severity, _CHECKERBOARD)
    height, width = pixels.shape[-2:]
    draws, side = Draws(pixels, generator), min(height, width)
    angle, scale = draws.uniform((1, 1), 0.0, 2.0 * math.pi), draws.uniform((1, 1), 0.1, 0.25) * side
    most = math.ceil(math.hypot(height, width) / (0.1 * side))
    grey = draws.uniform((2 * most + 1, 2 * most + 1)) < share
    y, x = lines(pixels)
    down = (angle.cos() * y + angle.sin() * x) / scale
    right = (angle.cos() * x - angle.sin() * y) / scale
    same = down.floor().remainder(2) == right.floor().remainder(2)
    # As released, fields are counted by truncation: the two at the corner that everything is rotated about are alike.
    field = (down.long() + most) * (2 * most + 1) + right.long() + most
    hidden = same & grey.flatten(1).gather(1, field.flatten(1)).view_as(same)
    return finish(pixels.masked_fill(hidden.unsqueeze(1), _GREY), images)


@in_slices()
def sparkles(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Lay five white stars with many rays over the image."""
    pixels, radius = begin(images, severity, _SPARKLES)
    height, width = pixels.shape[-2:]
    draws = Draws(pixels, generator)
    centres = draws.uniform((_SPARKS, 2)) * pixels.new_tensor([height, width])
    rays = draws.below(_MOST_RAYS + 1 - _FEWEST_RAYS, (_SPARKS,)) + _FEWEST_RAYS
    radius = radius * min(height, width)
    lengths = (radius + 0.25 * radius * draws.normal((_SPARKS, _MOST_RAYS))).clamp_(min=1.0)
    for spark in range(_SPARKS):
        light = _star(pixels, centres[:, spark], rays[:, spark], lengths[:, spark], 1.0)
        pixels = torch.lerp(pixels, pixels.new_ones(()), light)
    return finish(pixels, images)


@in_slices()
def inverse_sparkles(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Cover the image with white, but for a star near its middle."""
    pixels, exponent = begin(images, severity, _INVERSE)
    height, width = pixels.shape[-2:]
    draws = Draws(pixels, generator)
    centre = draws.uniform((2,), 0.25, 0.75) * pixels.new_tensor([height, width])
    rays = draws.below(_MOST_RAYS + 1 - _FEWEST_RAYS, ()) + _FEWEST_RAYS
    radius = 0.25 * min(height, width)
    lengths = radius + 0.25 * radius * draws.normal((_MOST_RAYS,))
    return finish(torch.lerp(pixels.new_ones(()), pixels, _star(pixels, centre, rays, lengths, exponent)), images)


def _star(pixels: Tensor, centre: Tensor, rays: Tensor, lengths: Tensor, exponent: float) -> Tensor:
    """Return how much ``(N, 1, H, W)`` a star covers, from 0 to 1.

    Args:
        pixels: The images ``(N, 3, H, W)``.
        centre: Its y and x ``(N, 2)``.
        rays: How many it has ``(N,)``.
        lengths: How long they are ``(N, 199)``, in pixels.
        exponent: Of the fall with distance.
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
