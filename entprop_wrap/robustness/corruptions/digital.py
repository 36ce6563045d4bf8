"""Digital corruptions: brightness, contrast, elastic, pixelate, JPEG (Hendrycks & Dietterich 2019)."""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import SMALL_SIDE, corruption
from entprop_wrap.robustness.corruptions.filters import gaussian_blur_2d, lines, shrink_and_enlarge
from entprop_wrap.robustness.corruptions.random import Draws


@corruption((0.1, 0.2, 0.3, 0.4, 0.5), (0.05, 0.1, 0.15, 0.2, 0.3))
def brightness(pixels: Tensor, draws: Draws, offset: float) -> Tensor:
    """Raise the value of HSV and leave hue and saturation as they are. Nothing is drawn.

    With both kept, a colour is proportional to its value, so no conversion is needed.
    """
    pixels = pixels.clamp(min=1e-30)  # black is the darkest grey, and needs no case of its own
    value = pixels.amax(dim=1, keepdim=True)
    return pixels.mul_((value + offset).clamp_(max=1.0).div_(value))


@corruption((0.4, 0.3, 0.2, 0.1, 0.05), (0.75, 0.5, 0.4, 0.3, 0.15))
def contrast(pixels: Tensor, draws: Draws, kept: float) -> Tensor:
    """Pull every colour towards the mean colour of its image. Nothing is drawn."""
    return torch.lerp(pixels.mean(dim=(2, 3), keepdim=True), pixels, kept)


@corruption(
    ((2.0, 0.7, 0.1), (2.0, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ((0.0, 0.0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
)
def elastic_transform(pixels: Tensor, draws: Draws, strength: float, smoothness: float, corner: float) -> Tensor:
    """Shift three points of the image at random and the rest along with them, then stretch it locally.

    Displacement, its smoothness (a standard deviation) and how far corners move are fractions of the short side; on
    ImageNet-C of 244 px where images have 224, a slip of the released code that made the dataset. ImageNet-C changes
    its kind between severity 2 (large moves) and 3 (fine ripples), and by PSNR neither published table is in order.
    """
    height, width = pixels.shape[-2:]
    unit = min(height, width) * (1.0 if min(height, width) < SMALL_SIDE else 244 / 224)
    moves = draws.uniform((3, 2), -corner * unit, corner * unit)
    moved = _sample(pixels, *_affine_places(moves, height, width), corners_are_centres=True)
    if strength == 0.0:  # the mildest level of CIFAR-C is the affine part alone
        return moved
    noise = draws.uniform((2, height, width), -1.0, 1.0)
    shift = gaussian_blur_2d(noise, smoothness * unit, truncate=3.0, border="reflect") * (strength * unit)
    y, x = lines(pixels)
    return _sample(moved, shift[:, 0] + x, shift[:, 1] + y, corners_are_centres=False)


@corruption((0.6, 0.5, 0.4, 0.3, 0.25), (0.95, 0.9, 0.85, 0.75, 0.65))
def pixelate(pixels: Tensor, draws: Draws, share: float) -> Tensor:
    """Average down to a share of the side with a box filter, and enlarge without smoothing. Nothing is drawn.

    The rounding to bytes after each step of the released code is left out.
    """
    height, width = pixels.shape[-2:]
    return shrink_and_enlarge(pixels, int(height * share), int(width * share))


@corruption((25, 18, 15, 10, 7), (80, 65, 58, 50, 40))
def jpeg_compression(pixels: Tensor, draws: Draws, quality: int) -> Tensor:
    """Round to bytes, compress as JPEG, and decompress, on the CPU. Nothing is drawn."""
    decoded = []
    for image in (pixels * 255.0).round().byte().permute(0, 2, 3, 1).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded.append(torch.from_numpy(np.array(Image.open(file))))
    return torch.stack(decoded).permute(0, 3, 1, 2).to(pixels) / 255.0


def _affine_places(moves: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The x and the y ``(N, H, W)`` at which each pixel is read if three points move by ``moves`` ``(N, 3, 2)``."""
    middle = moves.new_tensor([width // 2, height // 2])
    arm = float(min(height, width) // 3)
    points = middle + moves.new_tensor([[arm, arm], [arm, -arm], [-arm, -arm]])
    one = moves.new_ones(len(moves), 3, 1)
    back = torch.linalg.solve(torch.cat([points + moves, one], dim=2), points.expand(len(moves), -1, -1))
    y, x = lines(moves.new_empty(height, width))
    from_x, from_y, offset = back[..., None, None].unbind(dim=1)  # each (N, 2, 1, 1): to x and to y
    places = from_x * x + (from_y * y + offset)
    return places[:, 0], places[:, 1]


def _sample(pixels: Tensor, x: Tensor, y: Tensor, corners_are_centres: bool) -> Tensor:
    """Read images at ``x`` and ``y`` ``(N, H, W)``, in pixels, linearly between pixels.

    Outside, the image is mirrored about the centre of its last pixel, or about that pixel's outer edge.
    """
    height, width = pixels.shape[-2:]
    grid = torch.empty(*x.shape, 2, device=x.device, dtype=x.dtype)
    for at, (place, size) in enumerate(((x, width), (y, height))):
        # From pixels to what grid_sample calls them: -1 to 1 between the first and the last centre, or edge.
        last = size - 1.0 if corners_are_centres else float(size)
        grid[..., at] = (place * (2.0 / last)).add_((0.0 if corners_are_centres else 1.0 / last) - 1.0)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=corners_are_centres)
