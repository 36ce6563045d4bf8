"""Weather: snow, frost, and fog (Hendrycks & Dietterich 2019, section 4.1 and appendix B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import corruption
from entprop_wrap.robustness.corruptions.blur import move
from entprop_wrap.robustness.corruptions.filters import zoom_centre
from entprop_wrap.robustness.corruptions.random import Draws
from entprop_wrap.robustness.corruptions.textures import panes, plasma

__all__ = ["fog", "frost", "snow"]

# How far, in pixels, a crop can be moved about in a picture of frost, at least.
_ROOM = 160


@corruption(
    (
        (0.1, 0.3, 3.0, 0.5, 10, 4.0, 0.8),
        (0.2, 0.3, 2.0, 0.5, 12, 4.0, 0.7),
        (0.55, 0.3, 4.0, 0.9, 12, 8.0, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8.0, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12.0, 0.55),
    ),
    (
        (0.1, 0.2, 1.0, 0.6, 8, 3.0, 0.95),
        (0.1, 0.2, 1.0, 0.5, 10, 4.0, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4.0, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6.0, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12.0, 0.8),
    ),
)
def snow(
    pixels: Tensor,
    draws: Draws,
    mean: float,
    deviation: float,
    size: float,
    least: float,
    radius: int,
    sigma: float,
    kept: float,
) -> Tensor:
    """Whiten the image, ``kept`` of it excepted, and let blurred flakes fall across it, once more upside down.

    Flakes of some ``size`` are the values above ``least`` of normal noise, and leave a trail of ``radius`` and
    ``sigma``. They are not rounded to bytes as in the released code. The flakes of ImageNet-C change size back and
    forth, so severities are not in order of PSNR.
    """
    height, width = pixels.shape[-2:]
    flakes = draws.normal((1, math.ceil(height / size), math.ceil(width / size))) * deviation + mean
    layer = zoom_centre(flakes, size, height, width)
    layer = layer.mul((layer >= least).to(layer.dtype)).clamp_(0.0, 1.0)
    layer = move(layer, radius, sigma, draws.uniform((), -135.0, -45.0))
    grey = (pixels * pixels.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    whitened = torch.lerp(torch.maximum(pixels, grey * 1.5 + 0.5), pixels, kept)
    return whitened + layer + layer.flip((2, 3))


# Weights of image and ice; the size of a large crystal as it is drawn, in pixels, and how often the drawing is shrunk:
# CIFAR-C shrinks its photographs of frost too (to a fifth), and needles finer than a pixel would be noise.
@corruption(
    tuple((*weights, 70.0, 1) for weights in ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    tuple((*weights, 42.0, 3) for weights in ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
)
def frost(pixels: Tensor, draws: Draws, image_weight: float, ice_weight: float, grain: float, shrink: int) -> Tensor:
    """Add ice that has grown on the lens: for each image a random crop of a picture of frost.

    The datasets used five photographs. Here five pictures are generated (see :func:`~.textures.panes`) and blended with
    the published weights, so that scores on this corruption are not those on the datasets' frost. The first call for
    images of a new size takes a second or two, to draw them.
    """
    height, width = pixels.shape[-2:]
    pictures = panes(*(-(-(side + _ROOM) // 128) * 128 for side in (height, width)), grain, shrink, pixels.device)
    crops = pictures.unfold(2, height, 1).unfold(3, width, 1)  # (5, 3, tops, lefts, H, W), a view
    number, top, left = (draws.below(crops.shape[of], ()).long() for of in (0, 2, 3))
    frozen = crops[number, :, top, left].to(pixels.dtype).mul_(ice_weight / 255.0)
    return frozen.add_(pixels, alpha=image_weight)


@corruption(
    ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
    ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
)
def fog(pixels: Tensor, draws: Draws, thickness: float, decay: float) -> Tensor:
    """Add a cloud of plasma and scale back to the brightest value of the image."""
    height, width = pixels.shape[-2:]
    cloud = plasma(draws, height, width, decay)
    brightest = pixels.amax(dim=(1, 2, 3), keepdim=True)
    return (pixels + thickness * cloud.unsqueeze(1)) * (brightest / (brightest + thickness))
