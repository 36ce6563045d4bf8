"""Linear filters for batches of images: matrices along each axis, and kernels in the Fourier domain.

A one-dimensional filter with any border rule, or a resampling, is a matrix; applied from both sides it costs two
matrix products, whatever its radius. Short filters are sums of shifted images. A two-dimensional kernel that differs
from image to image (motion) or has no short factors (a disk) is applied as a product of spectra.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["correlate", "gaussian_blur_2d", "shrink_and_enlarge", "zoom_centre"]

Border = Literal["nearest", "reflect"]

# Up to this radius, in pixels, adding shifted images costs less than the matrix products.
_SHORT = 9


def gaussian_blur_2d(values: Tensor, sigma: float, truncate: float = 4.0, border: Border = "nearest") -> Tensor:
    """Blur the last two dimensions with a Gaussian of ``sigma`` pixels, cut off at ``truncate`` sigmas.

    Args:
        values: ``(..., H, W)``.
        sigma: Standard deviation in pixels; one below ``0.5 / truncate`` changes nothing.
        truncate: Where the kernel ends, in sigmas.
        border: ``"nearest"`` repeats the edge, ``"reflect"`` mirrors about the edge of the last pixel.
    """
    radius = int(truncate * sigma + 0.5)
    if radius <= _SHORT:
        for dim in (-2, -1):
            values = _slide(values, dim, _gaussian(radius, sigma), border)
        return values
    height, width = values.shape[-2:]
    return _separable(
        values,
        _gaussian_matrix(height, radius, sigma, border),
        _gaussian_matrix(width, radius, sigma, border),
    )


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


def correlate(values: Tensor, kernels: Tensor, border: Literal["replicate", "reflect"]) -> Tensor:
    """Correlate images with one kernel each, or with one kernel for all.

    Args:
        values: ``(N, C, H, W)``.
        kernels: ``(N, K, K)`` or ``(1, K, K)`` with odd ``K``; the tap at the centre reads the pixel itself.
        border: ``"replicate"`` repeats the edge; ``"reflect"`` mirrors about the last pixel (``K // 2 < H, W``).
    """
    height, width = values.shape[-2:]
    size = kernels.shape[-1]
    padded = F.pad(values, (size // 2,) * 4, mode=border)
    # Multiples of 32 have fast transforms, and the zeros they add are never read back.
    shape = [math.ceil(side / 32) * 32 for side in padded.shape[-2:]]
    # The conjugate spectrum turns a product into a correlation with the kernel's first tap at the origin.
    spectrum = torch.fft.rfft2(kernels, s=shape).conj().unsqueeze(1)
    result: Tensor = torch.fft.irfft2(torch.fft.rfft2(padded, s=shape) * spectrum, s=shape)
    return result[..., :height, :width]


def _separable(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return rows.to(values) @ (values @ columns.to(values).T)


def _slide(values: Tensor, dim: int, weights: Tensor, border: Border) -> Tensor:
    """Correlate along ``dim`` with an odd number of weights, as a sum of shifted images."""
    size, radius = values.shape[dim], len(weights) // 2
    inside = _fold(torch.arange(-radius, size + radius, device=values.device), size, border)
    padded = values.index_select(dim, inside)
    total = torch.zeros_like(values)
    for start, weight in enumerate(weights.tolist()):
        total.add_(padded.narrow(dim, start, size), alpha=weight)
    return total


def _gaussian(radius: int, sigma: float) -> Tensor:
    """The ``2 * radius + 1`` weights of a Gaussian, float64 on the CPU, with sum 1."""
    taps = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (taps / sigma) ** 2)
    return weights / weights.sum()


@lru_cache(maxsize=128)
def _gaussian_matrix(size: int, radius: int, sigma: float, border: Border) -> Tensor:
    """The ``(size, size)`` matrix of a Gaussian filter, float64 on the CPU."""
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
    """The ``(target, source)`` matrix of a box filter as Pillow's ``resize`` samples it.

    A source pixel counts fully when its centre lies within the footprint of the target pixel, and not at all
    otherwise; a footprint is never narrower than one source pixel. Where a centre lies on the edge of a footprint
    the rounding of the last bit decides, so the arithmetic goes in Pillow's order, its whole limits included.
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
