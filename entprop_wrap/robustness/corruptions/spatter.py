"""Spatter: drops of water, then of mud, on the lens (the extra corruption of Hendrycks & Dietterich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import corruption
from entprop_wrap.robustness.corruptions.filters import add_shifted, gaussian_blur_2d
from entprop_wrap.robustness.corruptions.random import Draws

__all__ = ["spatter"]

# Colours in bytes, (red, green, blue).
_WATER = (175.0, 238.0, 238.0)
_MUD = (63.0, 42.0, 20.0)

_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
_LAMP = ((-2.0, -1.0, 0.0), (-1.0, 1.0, 1.0), (0.0, 1.0, 2.0))

# In pixels: further than this from an edge, a drop is flat.
_FLAT = 20
# On the slope of the liquid in bytes: the thresholds of the edge detector.
_WEAK, _STRONG = 50.0, 150.0
# An edge may fade over this many pixels and still count. Drops have steep rims, so it rarely does.
_FADE = 8


@corruption(
    (
        (0.65, 0.3, 4.0, 0.69, 0.6, False),
        (0.65, 0.3, 3.0, 0.68, 0.6, False),
        (0.65, 0.3, 2.0, 0.68, 0.5, False),
        (0.65, 0.3, 1.0, 0.65, 1.5, True),
        (0.67, 0.4, 1.0, 0.65, 1.5, True),
    ),
    (
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1.0, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    ),
)
def spatter(
    pixels: Tensor, draws: Draws, mean: float, deviation: float, sigma: float, least: float, strength: float, mud: bool
) -> Tensor:
    """Cover parts of the image with drops: shaded pale water up to severity 3, brown mud at 4 and 5.

    The liquid is smooth noise, and sticks where it is above ``least``. ``strength`` is the brightness of water, or the
    smoothness of the edge of mud, in pixels. Water is shaded by the distance to the edges of the drops, found by
    Canny's detector as in the released code; distances are exact where that code uses a 5 x 5 approximation.
    """
    noise = draws.normal((1, *pixels.shape[-2:])) * deviation + mean
    liquid = gaussian_blur_2d(noise, sigma)
    if mud:
        cover = gaussian_blur_2d((liquid > least).to(pixels.dtype), strength)
        cover = torch.where(cover < 0.8, 0.0, cover)
        return torch.lerp(pixels, pixels.new_tensor(_MUD).view(1, 3, 1, 1) / 255.0, cover)
    liquid = torch.where(liquid < least, 0.0, liquid).mul_(255.0).floor_().clamp_(max=255.0)
    light = liquid * _shading(liquid)
    brightest = light.amax(dim=(2, 3), keepdim=True)
    light = light * (strength / brightest.masked_fill(brightest <= 0.0, 1.0))  # no drop at all: nothing to add
    return pixels + light * (pixels.new_tensor(_WATER).view(1, 3, 1, 1) / 255.0)


def _shading(liquid: Tensor) -> Tensor:
    """Return the relief of the drops from the upper left, ``(N, 1, H, W)`` in bytes, for a liquid in bytes."""
    distance = _distance(_edges(liquid)).to(liquid.dtype)
    levels = _equalise(torch.floor(_mean_3x3(distance)))
    relief = _stencil(F.pad(levels, (1, 1, 1, 1), mode="reflect"), _LAMP).clamp_(0.0, 255.0)
    return torch.round(_mean_3x3(relief))


def _edges(liquid: Tensor) -> Tensor:
    """Return Canny's edges (1986), with Sobel slopes and their sum of absolute values; ``(N, 1, H, W)`` bool."""
    padded = F.pad(liquid, (1, 1, 1, 1), mode="replicate")
    across, down = _stencil(padded, _SOBEL), _stencil(padded.mT, _SOBEL).mT
    steepness = across.abs() + down.abs()
    around = F.pad(steepness, (1, 1, 1, 1))
    height, width = liquid.shape[-2:]

    def ridge(row: int, column: int) -> Tensor:
        before = around[..., 1 - row : 1 - row + height, 1 - column : 1 - column + width]
        after = around[..., 1 + row : 1 + row + height, 1 + column : 1 + column + width]
        # Of two equal neighbours one is kept. Diagonals need to beat both, as in common implementations.
        return (steepness > before) & ((steepness > after) if row and column else (steepness >= after))

    flat = down.abs() < 0.41421356 * across.abs()  # below 22.5 degrees
    steep = down.abs() > 2.41421356 * across.abs()
    falling = across * down >= 0.0
    diagonal = torch.where(falling, ridge(1, 1), ridge(1, -1))
    thin = torch.where(flat, ridge(0, 1), torch.where(steep, ridge(1, 0), diagonal))
    weak, edges = thin & (steepness > _WEAK), thin & (steepness > _STRONG)
    for _ in range(_FADE):
        near = F.pad(edges, (1, 1, 1, 1))
        near = near[..., :-2, :] | near[..., 1:-1, :] | near[..., 2:, :]
        edges = weak & (near[..., :-2] | near[..., 1:-1] | near[..., 2:])
    return edges


def _distance(edges: Tensor) -> Tensor:
    """Return the Euclidean distance of each pixel to the nearest edge, no more than ``_FLAT``, ``(N, 1, H, W)``."""
    height, width = edges.shape[-2:]
    # Squares of distances, in short integers for speed.
    far = torch.where(edges, 0, _FLAT**2).to(torch.int16)
    for dim, size in ((2, height), (3, width)):
        sides = (_FLAT, _FLAT, 0, 0) if dim == 3 else (0, 0, _FLAT, _FLAT)
        padded = F.pad(far, sides, value=_FLAT**2)
        far = far.clone()
        for step in range(-_FLAT + 1, _FLAT):
            torch.minimum(far, padded.narrow(dim, _FLAT + step, size) + step**2, out=far)
    return far.to(torch.float32).sqrt_()


def _equalise(levels: Tensor) -> Tensor:
    """Spread whole numbers from 0 to ``_FLAT`` over the bytes so that each byte is as frequent, per image."""
    index = levels.long().flatten(1)
    counts = torch.zeros(len(levels), _FLAT + 1, device=levels.device, dtype=levels.dtype)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=levels.dtype))
    total = counts.cumsum(dim=1)
    lowest = counts.gather(1, (counts > 0).to(torch.int8).argmax(dim=1, keepdim=True))
    rest = (total[:, -1:] - lowest).clamp_(min=1.0)
    return torch.round((total - lowest) * (255.0 / rest)).gather(1, index).view_as(levels)


def _mean_3x3(values: Tensor) -> Tensor:
    return _stencil(F.pad(values, (1, 1, 1, 1), mode="reflect"), ((1.0,) * 3,) * 3).div_(9.0)


def _stencil(padded: Tensor, weights: tuple[tuple[float, float, float], ...]) -> Tensor:
    """Correlate ``(N, 1, H + 2, W + 2)`` with 3 x 3 weights, to ``(N, 1, H, W)``."""
    height, width = padded.shape[-2] - 2, padded.shape[-1] - 2
    taps = [(row, column, weight) for row, line in enumerate(weights) for column, weight in enumerate(line) if weight]
    return add_shifted(padded, taps, height, width)
