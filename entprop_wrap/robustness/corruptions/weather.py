"""Weather: snow, frost, and fog (Hendrycks & Dietterich 2019, section 4.1 and appendix B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import Levels, begin, finish, in_slices
from entprop_wrap.robustness.corruptions.blur import move
from entprop_wrap.robustness.corruptions.filters import zoom_centre
from entprop_wrap.robustness.corruptions.random import Draws
from entprop_wrap.robustness.corruptions.textures import panes, plasma

__all__ = ["fog", "frost", "snow"]

# Mean and deviation of the flakes, their size, the least brightness that counts, radius and deviation of their
# trail in pixels, and how much of the image's own colour is kept.
_SNOW = Levels(
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
# Weights of the image and of the ice.
_FROST = Levels(
    ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
)
# Size of the ice's crystals as they are drawn, in pixels, and how often the drawing is shrunk: CIFAR-C shrinks its
# photographs of frost too (to a fifth), and needles finer than a pixel would be noise.
_ICE = Levels(((70.0, 1),) * 5, ((42.0, 3),) * 5)
# How far, in pixels, a crop can be moved about in a picture of frost, at least.
_ROOM = 160
# Thickness of the fog, and how fast its detail decays.
_FOG = Levels(
    ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4)),
    ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75)),
)


@in_slices()
def snow(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Whiten the image and let blurred flakes fall across it, the same flakes once more upside down.

    The released code rounds the flakes to bytes; that is left out.

    The flakes of ImageNet-C change size back and forth, so severities are not in order of PSNR.
    """
    pixels, (mean, deviation, size, least, radius, sigma, kept) = begin(images, severity, _SNOW)
    draws = Draws(pixels, generator)
    height, width = pixels.shape[-2:]
    flakes = draws.normal((1, math.ceil(height / size), math.ceil(width / size))) * deviation + mean
    layer = zoom_centre(flakes, size, height, width)
    layer = layer.mul((layer >= least).to(layer.dtype)).clamp_(0.0, 1.0)
    layer = move(layer, radius, sigma, draws.uniform((), -135.0, -45.0))
    grey = (pixels * pixels.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
    whitened = torch.lerp(torch.maximum(pixels, grey * 1.5 + 0.5), pixels, kept)
    return finish(whitened + layer + layer.flip((2, 3)), images)


@in_slices()
def frost(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Add ice that has grown on the lens: for each image a random crop of a picture of frost.

    The datasets used five photographs. Here five pictures are generated (see :func:`~.textures.panes`) and blended
    with the published weights, so that scores on this corruption are not those on the datasets' frost. The first
    call for images of a new size takes a second or two, to draw them.
    """
    pixels, (image_weight, ice_weight) = begin(images, severity, _FROST)
    height, width = pixels.shape[-2:]
    grain, shrink = _ICE.at(severity, min(height, width))
    pictures = panes(*(-(-(side + _ROOM) // 128) * 128 for side in (height, width)), grain, shrink, pixels.device)
    draws = Draws(pixels, generator)
    crops = pictures.unfold(2, height, 1).unfold(3, width, 1)  # (5, 3, tops, lefts, H, W), a view
    number, top, left = (draws.below(crops.shape[of], ()).long() for of in (0, 2, 3))
    frozen = crops[number, :, top, left].to(pixels.dtype).mul_(ice_weight / 255.0)
    return finish(frozen.add_(pixels, alpha=image_weight), images)


@in_slices()
def fog(images: Tensor, severity: int, generator: torch.Generator | None = None) -> Tensor:
    """Add a cloud of plasma and scale back to the brightest value of the image."""
    pixels, (thickness, decay) = begin(images, severity, _FOG)
    height, width = pixels.shape[-2:]
    cloud = plasma(Draws(pixels, generator), height, width, decay)
    brightest = pixels.amax(dim=(1, 2, 3), keepdim=True)
    return finish((pixels + thickness * cloud.unsqueeze(1)) * (brightest / (brightest + thickness)), images)
