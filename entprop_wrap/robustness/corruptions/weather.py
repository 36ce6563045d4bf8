"""Weather: snow, frost, and fog (Hendrycks & Dietterich 2019, section 4.1 and appendix B), and their textures.

Fog is a cloud of plasma; frost is a crop of a pane of ice as it grows on a window.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from entprop_wrap.robustness.corruptions.base import corruption
from entprop_wrap.robustness.corruptions.blur import move
from entprop_wrap.robustness.corruptions.filters import lines, zoom_centre
from entprop_wrap.robustness.corruptions.random import Draws

# How far, in pixels, a crop can be moved about in a picture of frost, at least.
_ROOM = 160
# The blue-white of ice in the sun, as (red, green, blue) in [0, 1].
_ICE = (0.83, 0.93, 1.0)
# Barbs per crystal, and how many lengths they are chosen from, a power of two.
_BARBS = 9.0
_LENGTHS = 64
# The released code chooses from this many pictures.
_PANES = 5


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

    The datasets used five photographs. Here five pictures are generated (see :func:`panes`) and blended with
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
    cloud = _plasma(draws, height, width, decay)
    brightest = pixels.amax(dim=(1, 2, 3), keepdim=True)
    return (pixels + thickness * cloud.unsqueeze(1)) * (brightest / (brightest + thickness))


def _plasma(draws: Draws, height: int, width: int, decay: float) -> Tensor:
    """Return a fractal height map by the diamond-square algorithm, ``(N, height, width)``, from 0 to 1 before cropping.

    The map is periodic, its side a power of two. Each halving of the step divides the random part by ``decay ** 2``:
    the released code scales its draws, which already span the current amplitude, by that amplitude once more.

    Source: A. Fournier, D. Fussell, L. Carpenter, "Computer Rendering of Stochastic Models" (1982).
    """
    side = 1 << (max(height, width) - 1).bit_length()
    wobbles = draws.uniform((side * side - 1,), -1.0, 1.0)  # of all levels, from coarse to fine
    grid = wobbles.new_zeros(len(wobbles), 1, 1)
    amplitude = 1.0
    while grid.shape[-1] < side:
        size = grid.shape[-1]
        wobble = wobbles[:, size * size - 1 : 4 * size * size - 1].view(-1, 3, size, size) * amplitude
        right, below = grid.roll(-1, 2), grid.roll(-1, 1)
        centre = (grid + right + below + right.roll(-1, 1)) / 4 + wobble[:, 0]
        top = (grid + right + centre + centre.roll(1, 1)) / 4 + wobble[:, 1]
        left = (grid + below + centre + centre.roll(1, 2)) / 4 + wobble[:, 2]
        finer = grid.new_empty(len(grid), 2 * size, 2 * size)
        finer[:, ::2, ::2], finer[:, ::2, 1::2], finer[:, 1::2, ::2], finer[:, 1::2, 1::2] = grid, top, left, centre
        grid = finer
        amplitude /= decay**2
    low, high = grid.amin(dim=(1, 2), keepdim=True), grid.amax(dim=(1, 2), keepdim=True)
    return ((grid - low) / (high - low))[:, :height, :width]


@functools.lru_cache(maxsize=8)
def panes(height: int, width: int, grain: float, shrink: int, device: torch.device) -> Tensor:
    """Return pictures of frost, bytes ``(5, 3, height, width)``: always the same ones, made on the CPU and then kept.

    They take the place of the datasets' photographs. ``grain`` is the size of a large crystal as it is drawn, in
    pixels; the drawing is then shrunk ``shrink`` times.
    """
    pictures = []
    for number in range(_PANES):
        draws = Draws(torch.zeros(1, dtype=torch.float64), torch.Generator().manual_seed(number))
        drawn = F.avg_pool2d(_ice(draws, height * shrink, width * shrink, grain), shrink)
        pictures.append((drawn * 255.0).round().to(torch.uint8))
    return torch.cat(pictures).to(device)


def _ice(draws: Draws, height: int, width: int, grain: float) -> Tensor:
    """Return frost on a window, ``(N, 3, height, width)`` in [0, 1]: feathers of ice that meet at bright seams.

    The pane is divided among random seeds, from which spines grow, and from these barbs at 60 degrees. Three sizes of
    crystals are laid over each other, and a cloud of plasma thins them out in places.
    """
    cover = _plasma(draws, height, width, 1.7)
    cover = cover / cover.mean(dim=(1, 2), keepdim=True) * 0.5
    cover = ((cover - 0.15) / 0.4).clamp_(0.25, 1.0)
    light = 0.5 * _crystals(draws, height, width, grain)
    light += 0.4 * _crystals(draws, height, width, grain * 0.45)
    light += 0.3 * _crystals(draws, height, width, grain * 0.2)
    dust = draws.uniform((height, width), 0.75, 1.25)
    light = (0.08 + cover * light * dust).unsqueeze(1)
    tint = light.new_tensor(_ICE).view(1, 3, 1, 1)
    # The thicker the ice, the whiter.
    return (light * (tint + (1.0 - tint) * light)).clamp_(0.0, 1.0)


def _crystals(draws: Draws, height: int, width: int, size: float) -> Tensor:
    """Return one layer of feathers about ``size`` pixels across, ``(N, height, width)``, from 0 to about 1."""
    rows, columns = math.ceil(height / size) + 3, math.ceil(width / size) + 3
    seeds = draws.uniform((3, rows, columns))
    lengths = draws.uniform((_LENGTHS,), 0.05, 0.75)
    bend = draws.normal((2, rows, columns))
    # Bent a little, in units of crystals, with a margin of one crystal all around.
    bend = F.interpolate(bend, size=(height, width), mode="bilinear", align_corners=True) * 0.04
    y, x = lines(bend)
    y, x = (y / size + 1.5 + bend[:, 0]).flatten(1), (x / size + 1.5 + bend[:, 1]).flatten(1)
    row, column = y.floor().clamp_(1, rows - 2), x.floor().clamp_(1, columns - 2)
    corner = (row * columns + column).long()
    lattice_y, lattice_x = lines(seeds)
    down, right = (seeds[:, 0] + lattice_y).flatten(1), (seeds[:, 1] + lattice_x).flatten(1)
    # The number of a neighbour takes the place of the last four bits of its distance, so that one minimum finds both:
    # the bits of floats from 0 upwards are in the order of their values.
    whole = torch.int64 if y.dtype == torch.float64 else torch.int32
    steps = [step_y * columns + step_x for step_y in (-1, 0, 1) for step_x in (-1, 0, 1)]
    nearest = torch.full_like(y, float("inf")).view(whole)
    second = nearest.clone()
    for number, step in enumerate(steps):
        # Moving the few seeds costs less than moving the index of every pixel.
        distance = (y - down.roll(-step, 1).gather(1, corner)).square_()
        distance.add_((x - right.roll(-step, 1).gather(1, corner)).square_())
        coded = distance.view(whole).bitwise_and_(-16).bitwise_or_(number)
        torch.minimum(second, torch.maximum(nearest, coded), out=second)
        torch.minimum(nearest, coded, out=nearest)
    owner = corner + torch.tensor(steps, device=y.device).take((nearest & 15).long())
    nearest, second = (code.bitwise_and_(-16).view(y.dtype) for code in (nearest, second))
    along, across = x - right.gather(1, owner), y - down.gather(1, owner)
    angles = seeds[:, 2].flatten(1) * (2.0 * math.pi)
    cosine, sine = angles.cos().gather(1, owner), angles.sin().gather(1, owner)
    along, across = along * cosine + across * sine, across * cosine - along * sine
    side, across = (across > 0.0).long(), across.abs()
    # Lines of equal phase leave the spine at 60 degrees: across / along = tan(60 degrees).
    phase = _BARBS * (along - across / math.sqrt(3.0))
    barb = phase.floor().long().add_(owner, alpha=17).add_(side, alpha=29).bitwise_and_(_LENGTHS - 1)
    reach = torch.sigmoid(24.0 * (lengths.gather(1, barb) - across))
    needles = torch.sin(math.pi * phase.frac()).square() * reach * torch.exp(-across)
    spine = torch.exp(-25.0 * across)
    seam = torch.exp(-14.0 * (second.sqrt() - nearest.sqrt()))
    return (0.7 * needles + 0.4 * spine + 0.3 * seam + 0.12).view(-1, height, width)
