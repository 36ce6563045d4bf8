"""Blur: defocus, frosted glass, motion and zoom (Hendrycks & Dietterich 2019, section 4.1, appendix B)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import corruption
from entprop_wrap.robustness.corruptions.filters import add_shifted, correlate, gaussian_blur_2d, zoom_centre
from entprop_wrap.robustness.corruptions.random import Draws

# Up to this many taps, adding shifted images costs less than a product of spectra.
_FEW_TAPS = 32


@corruption(
    ((3.0, 0.1), (4.0, 0.5), (6.0, 0.5), (8.0, 0.5), (10.0, 0.5)),
    ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
)
def defocus_blur(pixels: Tensor, draws: Draws, radius: float, softness: float) -> Tensor:
    """Average over a disk with a softened edge, as a lens out of focus does. Nothing is drawn."""
    kernel = _disk(radius, softness)
    if int(kernel.count_nonzero()) > _FEW_TAPS:
        return correlate(pixels, kernel.to(pixels).unsqueeze(0), "reflect")
    padded = F.pad(pixels, (len(kernel) // 2,) * 4, mode="reflect")
    taps = [(row, column, float(kernel[row, column])) for row, column in kernel.nonzero().tolist()]
    return add_shifted(padded, taps, *pixels.shape[-2:])


@corruption(
    ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
)
def glass_blur(pixels: Tensor, draws: Draws, sigma: float, reach: int, rounds: int) -> Tensor:
    """Blur, let pixels be overwritten by near neighbours, and blur again, as behind frosted glass.

    The released code means to swap pixels one after the other, but its swap assigns through views, so each pixel is
    overwritten by its neighbour and the neighbour stays. The datasets were made that way, and so is this. Rounding down
    to bytes between the steps is left out. By PSNR, neither published table is in order.
    """
    height, width = pixels.shape[-2:]
    blurred = gaussian_blur_2d(pixels, sigma).flatten(2)
    for _ in range(rounds):
        shifts = draws.below(2 * reach, (2, height, width)) - reach
        source = _copied_from(shifts, reach).flatten(1)
        blurred = blurred.gather(2, source.unsqueeze(1).expand_as(blurred))
    return gaussian_blur_2d(blurred.view_as(pixels), sigma)


@corruption(
    ((10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0)),
    ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),
)
def motion_blur(pixels: Tensor, draws: Draws, radius: int, sigma: float) -> Tensor:
    """Smear along a straight line at an angle within 45 degrees of the horizontal, one angle per image."""
    return move(pixels, radius, sigma, draws.uniform((), -45.0, 45.0))


@corruption(
    ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
    ((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
)
def zoom_blur(pixels: Tensor, draws: Draws, count: int, step: float) -> Tensor:
    """Average the image with enlargements of its centre, as when driving towards it. Nothing is drawn."""
    height, width = pixels.shape[-2:]
    # All planes of all images as the channels of one, next to each other in memory: resizing is then up to seven times
    # as fast. Padded to whole vectors of the CPU, as a remainder is rounded differently, by its place in the batch.
    planes = pixels.reshape(1, -1, height, width)
    number = planes.shape[1]
    planes = F.pad(planes, (0, 0, 0, 0, 0, -number % 16)).contiguous(memory_format=torch.channels_last)
    total = planes * 2.0  # the image itself, and its enlargement by 1
    for index in range(1, count):
        # NumPy's arange, with which the released code counts, has the rounding error of 1 + step in its step; where a
        # size lies on the edge between two whole numbers of pixels that decides.
        factor = 1.0 + index * ((1.0 + step) - 1.0)
        crop_height, crop_width = math.ceil(height / factor), math.ceil(width / factor)
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        crop = planes[..., top : top + crop_height, left : left + crop_width]
        total += zoom_centre(crop, factor, height, width)
    return total[:, :number].contiguous().div_(count + 1).view(pixels.shape)


zoom_blur.slices = (8.0, 2.0)


def move(pixels: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """Blur along a line, as ImageMagick's motion blur does (its ``effect.c``).

    The trail is half a Gaussian of deviation ``sigma`` that starts at the pixel and reads ``2 * radius + 1`` whole
    pixels at the image's angle ``(N,)``, clockwise from the right; the edge is repeated outside the image.
    """
    # Taps without weight in float32 are left out.
    length = min(2 * radius + 1, math.ceil(6.0 * sigma))
    distance = torch.arange(length, device=pixels.device, dtype=pixels.dtype)
    weights = torch.exp(-0.5 * (distance / sigma) ** 2)
    weights = weights / weights.sum()
    angle = torch.deg2rad(degrees).unsqueeze(1)
    columns = torch.ceil(distance * angle.cos() - 0.5).long()
    rows = torch.ceil(distance * angle.sin() - 0.5).long()
    if pixels.device.type != "cpu":
        # One product of spectra for the whole batch, for want of an operation that shifts each image differently.
        size = 2 * length + 1
        kernels = pixels.new_zeros(len(pixels), size * size)
        places = (rows + length) * size + (columns + length)
        kernels.scatter_add_(1, places, weights.expand(len(pixels), -1))
        return correlate(pixels, kernels.view(-1, size, size), "replicate")
    top, left = max(0, -int(rows.min())), max(0, -int(columns.min()))
    padded = F.pad(pixels, (left, int(columns.max()), top, int(rows.max())), mode="replicate")
    moved = torch.empty_like(pixels, memory_format=torch.contiguous_format)
    amounts = weights.tolist()
    for index, (down, across) in enumerate(zip((rows + top).tolist(), (columns + left).tolist(), strict=True)):
        moved[index] = add_shifted(padded[index], list(zip(down, across, amounts, strict=True)), *pixels.shape[-2:])
    return moved


def _copied_from(shifts: Tensor, reach: int) -> Tensor:
    """Return the flat index ``(N, H, W)`` of the pixel whose original value ends up at each place.

    Pixels are overwritten one by one, ``image[p] = image[p + shift(p)]``, last pixel first, by ``shifts`` ``(N, 2, H,
    W)`` from ``-reach`` to ``reach - 1``; those nearer to the edge than ``reach`` are not. A copy reads a copied value
    if its source was overwritten before, so a pixel follows its sources for as long as they are overwritten ones. All
    chains are followed at once by doubling the stride, and since each step goes forward they end.
    """
    height, width = shifts.shape[-2:]
    here = torch.arange(height * width, device=shifts.device, dtype=torch.int32).view(height, width)
    # As 0 and 1, to multiply by: selecting by a mask costs a CPU ten times as much.
    written = torch.zeros(height, width, dtype=torch.int32, device=shifts.device)
    written[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1] = 1
    source = here + (shifts[:, 0] * width + shifts[:, 1]) * written
    source, here = source.flatten(1).long(), here.flatten().long()
    follows = (source > here).to(torch.int32) * written.flatten().expand_as(source).gather(1, source)
    chain = here + (source - here) * follows
    # A chain takes fewer steps than there are pixels; those of images end after some 20, hence the early exit.
    for _ in range(math.ceil(math.log2(height * width))):
        further = chain.gather(1, chain)
        if torch.equal(further, chain):
            break
        chain = further
    return source.gather(1, chain).view(-1, height, width)


@lru_cache(maxsize=32)
def _disk(radius: float, softness: float) -> Tensor:
    """A disk of weights, softened by a short Gaussian: ``(17, 17)`` up to radius 8, else ``(2r + 1, 2r + 1)``."""
    half = max(8, int(radius))
    line = torch.arange(-half, half + 1, dtype=torch.float64)
    disk = (line.unsqueeze(1) ** 2 + line**2 <= radius**2).double()
    taps = torch.arange(-1, 2, dtype=torch.float64) if radius <= 8 else torch.arange(-2, 3, dtype=torch.float64)
    soft = torch.exp(-0.5 * (taps / softness) ** 2)
    kernel = torch.outer(soft, soft) / soft.sum() ** 2
    padded = F.pad((disk / disk.sum()).view(1, 1, *disk.shape), (len(taps) // 2,) * 4, mode="reflect")
    return F.conv2d(padded, kernel.view(1, 1, *kernel.shape))[0, 0]
