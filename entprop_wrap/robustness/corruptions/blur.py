"""Blur: defocus, frosted glass, motion, zoom, and Gaussian (Hendrycks & Dietterich 2019, section 4.1, appendix B)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import Levels, begin, finish, in_slices
from entprop_wrap.robustness.corruptions.filters import add_shifted, correlate, gaussian_blur_2d, zoom_centre
from entprop_wrap.robustness.corruptions.random import Draws

__all__ = ["defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "move", "zoom_blur"]

# Radius of the disk and standard deviation of its softened edge, in pixels.
_DEFOCUS = Levels(
    ((3.0, 0.1), (4.0, 0.5), (6.0, 0.5), (8.0, 0.5), (10.0, 0.5)),
    ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1)),
)
# Standard deviation and furthest copy in pixels, and the number of rounds.
_GLASS = Levels(
    ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
)
# Radius and standard deviation of the trail, in pixels.
_MOTION = Levels(
    ((10, 3.0), (15, 5.0), (15, 8.0), (15, 12.0), (20, 15.0)),
    ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5)),
)
# How many enlargements are averaged, from 1 upwards, and the step between two of them.
_ZOOM = Levels(
    ((12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)),
    ((7, 0.01), (12, 0.01), (16, 0.01), (21, 0.01), (26, 0.01)),
)
# Up to this many taps, adding shifted images costs less than a product of spectra.
_FEW_TAPS = 32

# Standard deviation, in pixels.
_GAUSSIAN = Levels((1.0, 2.0, 3.0, 4.0, 6.0), (0.4, 0.6, 0.7, 0.8, 1.0))


@in_slices()
def defocus_blur(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Average over a disk, as a lens out of focus does. Nothing is drawn."""
    pixels, (radius, softness) = begin(images, severity, _DEFOCUS)
    kernel = _disk(radius, softness)
    if int(kernel.count_nonzero()) > _FEW_TAPS:
        return finish(correlate(pixels, kernel.to(pixels).unsqueeze(0), "reflect"), images)
    edge = len(kernel) // 2
    padded = F.pad(pixels, (edge,) * 4, mode="reflect")
    taps = [(row, column, float(kernel[row, column])) for row, column in kernel.nonzero().tolist()]
    return finish(add_shifted(padded, taps, *pixels.shape[-2:]), images)


@in_slices()
def glass_blur(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Blur, let pixels be overwritten by near neighbours, and blur again, as behind frosted glass.

    The released code means to swap pixels one after the other, but its swap assigns through views, so each pixel
    is overwritten by its neighbour and the neighbour stays. The datasets were made that way, and so is this:
    exactly that process in distribution, with all chains of copies resolved at once (see :func:`_copied_from`).
    Its rounding down to bytes between the steps is left out.

    By PSNR, neither published table is in order.
    """
    pixels, (sigma, reach, rounds) = begin(images, severity, _GLASS)
    draws = Draws(pixels, generator)
    height, width = pixels.shape[-2:]
    blurred = gaussian_blur_2d(pixels, sigma).flatten(2)
    for _ in range(rounds):
        shifts = draws.below(2 * reach, (2, height, width)) - reach
        source = _copied_from(shifts, reach).flatten(1)
        blurred = blurred.gather(2, source.unsqueeze(1).expand_as(blurred))
    return finish(gaussian_blur_2d(blurred.view_as(pixels), sigma), images)


@in_slices()
def motion_blur(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Smear along a straight line at an angle within 45 degrees of the horizontal, one angle per image."""
    pixels, (radius, sigma) = begin(images, severity, _MOTION)
    angles = Draws(pixels, generator).uniform((), -45.0, 45.0)
    return finish(move(pixels, radius, sigma, angles), images)


@in_slices(imagenet=8.0, cifar=2.0)
def zoom_blur(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Average the image with enlargements of its centre, as when driving towards it. Nothing is drawn."""
    pixels, (count, step) = begin(images, severity, _ZOOM)
    height, width = pixels.shape[-2:]
    # All planes of all images as the channels of one, next to each other in memory: resizing is then up to seven
    # times as fast, since the weights are the same for all.
    planes = pixels.reshape(1, -1, height, width)
    count_planes = planes.shape[1]
    # Whole vectors of the CPU only: what is left over is rounded differently, by where an image is in its batch.
    planes = F.pad(planes, (0, 0, 0, 0, 0, -count_planes % 16)).contiguous(memory_format=torch.channels_last)
    total = planes * 2.0  # the image itself, and its enlargement by 1
    for index in range(1, count):
        # The released code counts with NumPy's arange, whose step has the rounding error of 1 + step in it; where a
        # size lies on the edge between two whole numbers of pixels that decides.
        factor = 1.0 + index * ((1.0 + step) - 1.0)
        crop_height, crop_width = math.ceil(height / factor), math.ceil(width / factor)
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        crop = planes[..., top : top + crop_height, left : left + crop_width]
        total += zoom_centre(crop, factor, height, width)
    return finish(total[:, :count_planes].contiguous().div_(count + 1).view(pixels.shape), images)


@in_slices()
def gaussian_blur(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Blur with a Gaussian. Nothing is drawn."""
    pixels, sigma = begin(images, severity, _GAUSSIAN)
    return finish(gaussian_blur_2d(pixels, sigma), images)


def move(pixels: Tensor, radius: int, sigma: float, degrees: Tensor) -> Tensor:
    """Blur along a line, one angle per image, as ImageMagick's motion blur does (its ``effect.c``).

    The trail is half a Gaussian that starts at the pixel and reads ``2 * radius + 1`` whole pixels along the line,
    the edge repeated outside the image. Those without weight in float32 are left out.

    Args:
        pixels: ``(N, C, H, W)``.
        radius: Half the length of the trail, in pixels.
        sigma: Standard deviation of the trail, in pixels.
        degrees: ``(N,)`` angles, clockwise from the right, of where the trail reads.
    """
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
    """Resolve one round of sequential copies ``image[p] = image[p + shift(p)]``, last pixel first.

    A copy reads an original value if its source comes later in that order, and a copied value if the source was
    overwritten before. So a pixel follows its sources for as long as they are overwritten ones; all chains are
    followed at once by doubling the stride, and since each step goes forward they end.

    Args:
        shifts: ``(N, 2, H, W)``, rows and columns, from ``-reach`` to ``reach - 1``.
        reach: Pixels with an index up to ``reach``, or beyond the side less ``reach``, are never overwritten.

    Returns:
        ``(N, H, W)`` flat indices of the pixels whose original values end up at each place.
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
