"""Linear filters for batches of images.

A one-dimensional filter with any border rule, or a resampling, is a matrix, applied along each axis. Filters with few
taps are sums of shifted images; other two-dimensional kernels (a disk) are applied as a product of spectra.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Border = Literal["nearest", "reflect"]

#: Row, column, and weight.
Tap = tuple[int, int, float]

# Up to this share of the side, as a radius, adding shifted images costs less than the matrix products.
_SHORT = 0.1


def gaussian_blur_2d(values: Tensor, sigma: float, truncate: float = 4.0, border: Border = "nearest") -> Tensor:
    """Blur images ``(N, C, H, W)`` with a Gaussian of ``sigma`` pixels, cut off at ``truncate`` sigmas.

    The border "nearest" repeats the edge, "reflect" mirrors about the edge of the last pixel.
    """
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return values
    height, width = values.shape[-2:]
    if radius <= _SHORT * min(height, width):
        weights = _gaussian(radius, sigma).tolist()
        padded = _surround(values, radius, border)
        padded = add_shifted(padded, [(at, 0, weight) for at, weight in enumerate(weights)], height, padded.shape[-1])
        return add_shifted(padded, [(0, at, weight) for at, weight in enumerate(weights)], height, width)
    return _separable(values, *(_gaussian_matrix(side, radius, sigma, border) for side in (height, width)))


def lines(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the y ``(H, 1)`` and the x ``(W,)`` of the pixels of images ``(..., H, W)``."""
    y = torch.arange(pixels.shape[-2], device=pixels.device, dtype=pixels.dtype)
    x = torch.arange(pixels.shape[-1], device=pixels.device, dtype=pixels.dtype)
    return y.unsqueeze(1), x


def shrink_and_enlarge(values: Tensor, height: int, width: int) -> Tensor:
    """Resize the last two dimensions to ``(height, width)`` with a box filter, and back to their size."""
    full_height, full_width = values.shape[-2:]
    small = _separable(values, _box_matrix(full_height, height), _box_matrix(full_width, width))
    # Enlarging copies whole samples, so each row of these matrices has a single one.
    rows, columns = _box_matrix(height, full_height).argmax(dim=1), _box_matrix(width, full_width).argmax(dim=1)
    return small.index_select(-1, columns.to(small.device)).index_select(-2, rows.to(small.device))


def zoom_centre(values: Tensor, factor: float, height: int, width: int) -> Tensor:
    """Enlarge a central crop ``(N, C, h, w)`` by ``factor`` >= 1 and cut its centre ``(N, C, height, width)``.

    Corner pixels stay corner pixels, which is how SciPy's ``zoom`` places its samples.
    """
    size = round(values.shape[-2] * factor), round(values.shape[-1] * factor)
    enlarged = F.interpolate(values, size=size, mode="bilinear", align_corners=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return enlarged[..., top : top + height, left : left + width]


def add_shifted(padded: Tensor, taps: Sequence[Tap], height: int, width: int) -> Tensor:
    """Return the weighted sum of the windows ``(..., height, width)`` of ``padded`` that start at each tap."""
    # A window with all that is between its rows is one run of memory, which adds up several times as fast as its rows.
    stride = padded.shape[-1]
    runs, length = padded.contiguous().flatten(-2), (height - 1) * stride + width
    total = padded.new_zeros(*padded.shape[:-2], height * stride)
    run = total.narrow(-1, 0, length)
    for row, column, weight in taps:
        run.add_(runs.narrow(-1, row * stride + column, length), alpha=weight)
    return total.view(*padded.shape[:-2], height, stride)[..., :width]


def correlate(values: Tensor, kernels: Tensor, border: Literal["replicate", "reflect"]) -> Tensor:
    """Correlate images ``(N, C, H, W)`` with kernels ``(N or 1, K, K)``, K odd, in the Fourier domain.

    The border "replicate" repeats the edge; "reflect" mirrors about the last pixel (``K // 2 < H, W``).
    """
    height, width = values.shape[-2:]
    size = kernels.shape[-1]
    padded = F.pad(values, (size // 2,) * 4, mode=border)
    # Multiples of 16 have fast transforms, and the zeros they add are never read back.
    shape = [math.ceil(side / 16) * 16 for side in padded.shape[-2:]]
    # The conjugate spectrum turns a product into a correlation with the kernel's first tap at the origin.
    spectrum = torch.fft.rfft2(kernels, s=shape).conj().unsqueeze(1)
    result: Tensor = torch.fft.irfft2(torch.fft.rfft2(padded, s=shape) * spectrum, s=shape)
    return result[..., :height, :width]


def _separable(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return rows.to(values) @ (values @ columns.to(values).T)


def _surround(values: Tensor, radius: int, border: Border) -> Tensor:
    """Add ``radius`` pixels, no more than a side, around images ``(N, C, H, W)``."""
    if border == "nearest":
        return F.pad(values, (radius,) * 4, mode="replicate")
    for dim in (-2, -1):
        first, last = values.narrow(dim, 0, radius), values.narrow(dim, values.shape[dim] - radius, radius)
        values = torch.cat([first.flip(dim), values, last.flip(dim)], dim=dim)
    return values


def _gaussian(radius: int, sigma: float) -> Tensor:
    """Return the ``2 * radius + 1`` weights of a Gaussian, float64 on the CPU, with sum 1."""
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    return weights / weights.sum()


@lru_cache(maxsize=128)
def _gaussian_matrix(size: int, radius: int, sigma: float, border: Border) -> Tensor:
    """Return the ``(size, size)`` matrix of a Gaussian filter, float64 on the CPU."""
    index = _fold(torch.arange(size).unsqueeze(1) + torch.arange(-radius, radius + 1), size, border)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, index, _gaussian(radius, sigma).expand(size, -1))


def _fold(index: Tensor, size: int, border: Border) -> Tensor:
    """Bring indices that lie outside ``[0, size)`` back inside."""
    if border == "nearest":
        return index.clamp(0, size - 1)
    index = index.remainder(2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)


@lru_cache(maxsize=128)
def _box_matrix(source: int, target: int) -> Tensor:
    """Return the ``(target, source)`` matrix of a box filter as Pillow's ``resize`` samples it.

    A source pixel counts when its centre lies within the footprint of the target pixel, of at least one source pixel.
    For a centre on the edge the rounding of the last bit decides, so the arithmetic goes in Pillow's order.
    """
    scale = source / target
    footprint = max(scale, 1.0)
    index = torch.arange(source, dtype=torch.float64)
    centre = (torch.arange(target, dtype=torch.float64).unsqueeze(1) + 0.5) * scale
    first = torch.floor(centre - 0.5 * footprint + 0.5)
    end = torch.floor(centre + 0.5 * footprint + 0.5)
    distance = (index - centre + 0.5) * (1.0 / footprint)
    inside = ((distance > -0.5) & (distance <= 0.5) & (index >= first) & (index < end)).double()
    return inside / inside.sum(dim=1, keepdim=True)
