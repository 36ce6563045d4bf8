"""JPEG compression, without the entropy coding, which loses nothing (ITU-T T.81 and the IJG's libjpeg)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import Levels, begin, finish, in_slices

__all__ = ["compress", "jpeg_compression"]

# The quality from 1 to 100 that the IJG's encoder is given.
_QUALITY = Levels((25, 18, 15, 10, 7), (80, 65, 58, 50, 40))

# ITU-T T.81, tables K.1 and K.2: steps of luminance and chrominance, by row of the spectrum.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)

# Ties are common here (a mean of 64 integers divided by an integer), and a float sum may fall on either side of
# them depending on the machine. Far above the error of a sum, far below what moves any other value.
_TIE = 1e-3


@in_slices()
def jpeg_compression(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Round to bytes, compress as JPEG with chroma at half the resolution, and decompress. Nothing is drawn."""
    pixels, quality = begin(images, severity, _QUALITY)
    return finish(compress(pixels, quality), images)


def compress(pixels: Tensor, quality: int) -> Tensor:
    """Take images ``(N, 3, H, W)`` in [0, 1] through JPEG at ``quality`` 1 to 100.

    Every rounding of the standard is made: bytes, YCbCr, chroma means, coefficients, samples, and bytes again. What
    differs from an encoder in integers is the last bit of its fixed-point transforms.
    """
    height, width = pixels.shape[-2:]
    colour = _round(pixels * 255.0)
    red, green, blue = colour.unbind(dim=1)
    luma = _round(0.299 * red + 0.587 * green + 0.114 * blue)
    chroma = torch.stack(
        [
            0.5 * blue - 0.168735892 * red - 0.331264108 * green,
            0.5 * red - 0.418687589 * green - 0.081312411 * blue,
        ],
        dim=1,
    )
    chroma = torch.floor(chroma + (128.5 - _TIE))  # ties down, unlike everywhere else
    luma = _quantise(luma.unsqueeze(1), _steps(_LUMINANCE, quality))[..., :height, :width]
    small = _quantise(_halve(chroma), _steps(_CHROMINANCE, quality))
    small = small[..., : (height + 1) // 2, : (width + 1) // 2]
    # Weights of 3/4 and 1/4 in each direction, the IJG decoder's default ("fancy upsampling").
    full = F.interpolate(small, scale_factor=2.0, mode="bilinear", align_corners=False)
    full = torch.floor(full + _in_turn(full, 8 / 16, 7 / 16))  # sixteenths, ties up and down in turn
    chroma = full[..., :height, :width] - 128.0
    blueness, redness = chroma[:, :1], chroma[:, 1:]
    decoded = torch.cat(
        [
            luma + 1.402 * redness,
            luma - 0.344136286 * blueness - 0.714136286 * redness,
            luma + 1.772 * blueness,
        ],
        dim=1,
    )
    return _round(decoded).clamp_(0.0, 255.0).div_(255.0)


def _halve(chroma: Tensor) -> Tensor:
    """Average 2 x 2 samples to an integer, ties up and down in turn along a row, as the IJG's encoder does."""
    height, width = chroma.shape[-2:]
    means = F.avg_pool2d(F.pad(chroma, (0, width % 2, 0, height % 2), mode="replicate"), 2)
    return torch.floor(means + _in_turn(means, 1 / 4, 2 / 4))


def _in_turn(values: Tensor, even: float, odd: float) -> Tensor:
    """One number for the even columns of ``values`` and one for the odd, ``(W,)``."""
    bias = values.new_full((values.shape[-1],), even)
    bias[1::2] = odd
    return bias


def _quantise(plane: Tensor, steps: Tensor) -> Tensor:
    """Round the spectrum of each 8 x 8 block to multiples of ``steps`` ``(64,)``; ``plane`` grows to whole blocks."""
    count, channels, height, width = plane.shape
    plane = F.pad(plane, (0, -width % 8, 0, -height % 8), mode="replicate")
    down, across = plane.shape[-2] // 8, plane.shape[-1] // 8
    blocks = plane.view(count, channels, down, 8, across, 8).transpose(3, 4).reshape(-1, 64)
    basis, steps = _basis().to(plane), steps.to(plane)
    spectrum = (blocks - 128.0) @ basis.T
    # Ties away from zero.
    levels = torch.floor((spectrum.abs() + _TIE) / steps + 0.5).copysign(spectrum)
    samples = _round((levels * steps) @ basis + 128.0).clamp_(0.0, 255.0)
    return samples.view(count, channels, down, across, 8, 8).transpose(3, 4).reshape(plane.shape)


def _round(values: Tensor) -> Tensor:
    return torch.floor(values + (0.5 + _TIE))


@lru_cache(maxsize=16)
def _steps(table: tuple[tuple[int, ...], ...], quality: int) -> Tensor:
    """The steps at a quality, ``(64,)``, by the IJG's rule: percent of the table, rounded, within a byte."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    scaled = (torch.tensor(table) * percent + 50) // 100
    return scaled.clamp(1, 255).flatten()


@lru_cache(maxsize=1)
def _basis() -> Tensor:
    """The orthonormal two-dimensional DCT of a flattened block, ``(64, 64)``, float64 on the CPU."""
    position, frequency = torch.arange(8, dtype=torch.float64), torch.arange(8, dtype=torch.float64).unsqueeze(1)
    line = torch.cos((2.0 * position + 1.0) * frequency * (math.pi / 16.0)) / 2.0
    line[0] /= math.sqrt(2.0)
    return torch.kron(line, line)
