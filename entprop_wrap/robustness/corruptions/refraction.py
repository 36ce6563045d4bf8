"""The image as seen through moving water: ``caustic_refraction`` of ImageNet-C-bar, see :mod:`.overlays`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import corruption
from entprop_wrap.robustness.corruptions.filters import gaussian_blur_2d, lines
from entprop_wrap.robustness.corruptions.random import Draws

__all__ = ["caustic_refraction"]

# Of the released code: pi in its number of digits, and where its waves begin.
_TURN, _START = 6.28318530718, 250.0
_INDEX = 4.0
# Light that falls straight through is not bent: the cosine from which on it does.
_STRAIGHT = 1.0 - 1e-3


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
