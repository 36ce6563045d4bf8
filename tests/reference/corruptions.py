"""The corruptions of ImageNet-C and CIFAR-C, one image at a time: NumPy, SciPy and Pillow, float64, slow and plain.

Written from the published description and constants (Hendrycks & Dietterich 2019), step by step as the released
code goes, without its rounding to bytes except where a step works on bytes. Images are ``(3, H, W)`` in [0, 1];
``rng`` is a NumPy generator, or anything with its ``normal``, ``uniform``, ``integers`` and ``poisson``.
"""

from __future__ import annotations

import functools
import io
import math

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from entprop_wrap.robustness.corruptions.weather import panes


def pick(image, severity, imagenet, cifar):
    return (cifar if min(image.shape[1:]) < 96 else imagenet)[severity - 1]


def blur(plane, sigma, mode="nearest", truncate=4.0):
    return ndimage.gaussian_filter(plane, sigma, mode=mode, truncate=truncate)


def blur_channels(image, sigma):
    return np.stack([blur(channel, sigma) for channel in image])


def clip(image):
    return np.clip(image, 0.0, 1.0)


# Noise


def gaussian_noise(image, severity, rng):
    c = pick(image, severity, [0.08, 0.12, 0.18, 0.26, 0.38], [0.04, 0.06, 0.08, 0.09, 0.10])
    return clip(image + c * rng.normal(size=image.shape))


def shot_noise(image, severity, rng):
    c = pick(image, severity, [60, 25, 12, 5, 3], [500, 250, 100, 75, 50])
    return clip(rng.poisson(image * c) / c)


def impulse_noise(image, severity, rng):
    c = pick(image, severity, [0.03, 0.06, 0.09, 0.17, 0.27], [0.01, 0.02, 0.03, 0.05, 0.07])
    chance = rng.uniform(0.0, 1.0, size=image.shape)
    out = image.copy()
    out[chance < c / 2] = 0.0
    out[chance > 1 - c / 2] = 1.0
    return out


# Blur


def defocus_blur(image, severity, rng=None):
    radius, softness = pick(
        image,
        severity,
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
    )
    half = 8 if radius <= 8 else radius
    taps = 3 if radius <= 8 else 5
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float64)
    disk /= disk.sum()
    soft = np.exp(-((np.arange(taps) - taps // 2) ** 2) / (2 * softness**2))
    soft /= soft.sum()
    disk = ndimage.correlate1d(ndimage.correlate1d(disk, soft, axis=0, mode="mirror"), soft, axis=1, mode="mirror")
    return clip(np.stack([ndimage.correlate(channel, disk, mode="mirror") for channel in image]))


def copy_neighbours(image, reach, rng):
    """One round: from the last pixel to the first, copy a random neighbour over each."""
    _, height, width = image.shape
    shifts = rng.integers(-reach, reach, size=(2, height, width))
    out = image.copy()
    for h in range(height - reach, reach, -1):
        for w in range(width - reach, reach, -1):
            out[:, h, w] = out[:, h + shifts[0, h, w], w + shifts[1, h, w]]
    return out


def glass_blur(image, severity, rng):
    sigma, reach, rounds = pick(
        image,
        severity,
        [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
        [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
    )
    out = blur_channels(image, sigma)
    for _ in range(rounds):
        out = copy_neighbours(out, reach, rng)
    return clip(blur_channels(out, sigma))


def move(image, radius, sigma, degrees):
    """ImageMagick's motion blur: half a Gaussian along a line of whole pixels, edges repeated."""
    _, height, width = image.shape
    taps = 2 * math.ceil(radius) + 1
    weights = np.exp(-(np.arange(taps) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    angle = math.radians(degrees)
    out = np.zeros_like(image)
    for i in range(taps):
        rows = np.clip(np.arange(height) + math.ceil(i * math.sin(angle) - 0.5), 0, height - 1)
        columns = np.clip(np.arange(width) + math.ceil(i * math.cos(angle) - 0.5), 0, width - 1)
        out += weights[i] * image[:, rows][:, :, columns]
    return out


def motion_blur(image, severity, rng):
    radius, sigma = pick(
        image,
        severity,
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
        [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
    )
    return clip(move(image, radius, sigma, float(rng.uniform(-45, 45, size=()))))


def enlarge(planes, factor, height, width):
    big = ndimage.zoom(planes, (1, factor, factor), order=1)
    top, left = (big.shape[1] - height) // 2, (big.shape[2] - width) // 2
    return big[:, top : top + height, left : left + width]


def crop_size(height, width, factor):
    return int(np.ceil(height / factor)), int(np.ceil(width / factor))


def zoom_blur(image, severity, rng=None):
    factors = pick(
        image,
        severity,
        [
            np.arange(1, 1.11, 0.01),
            np.arange(1, 1.16, 0.01),
            np.arange(1, 1.21, 0.02),
            np.arange(1, 1.26, 0.02),
            np.arange(1, 1.31, 0.03),
        ],
        [np.arange(1, stop, 0.01) for stop in (1.06, 1.11, 1.16, 1.21, 1.26)],
    )
    _, height, width = image.shape
    total = image.copy()
    for factor in factors:
        ch, cw = crop_size(height, width, factor)
        top, left = (height - ch) // 2, (width - cw) // 2
        total += enlarge(image[:, top : top + ch, left : left + cw], factor, height, width)
    return clip(total / (len(factors) + 1))


# Weather


def snow(image, severity, rng):
    mean, deviation, size, least, radius, sigma, kept = pick(
        image,
        severity,
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
    )
    _, height, width = image.shape
    layer = enlarge(rng.normal(size=(1, *crop_size(height, width, size))) * deviation + mean, size, height, width)
    layer[layer < least] = 0.0
    layer = move(clip(layer), radius, sigma, float(rng.uniform(-135, -45, size=())))
    grey = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    white = kept * image + (1 - kept) * np.maximum(image, grey * 1.5 + 0.5)
    return clip(white + layer + np.rot90(layer, 2, axes=(1, 2)))


def plasma(side, decay, rng):
    """Diamond-square on a torus, level by level."""
    heights = np.zeros((side, side))
    random, used = rng.uniform(-1, 1, size=(side * side - 1,)), 0
    step, wobble = side, 1.0
    while step >= 2:
        half, points = step // 2, (side // step) ** 2
        move = random[used : used + 3 * points].reshape(3, side // step, side // step) * wobble
        used += 3 * points
        corners, centres = heights[::step, ::step], heights[half::step, half::step]
        right, below = np.roll(corners, -1, axis=1), np.roll(corners, -1, axis=0)
        centres[:] = (corners + right + below + np.roll(right, -1, axis=0)) / 4 + move[0]
        heights[::step, half::step] = (corners + right + centres + np.roll(centres, 1, axis=0)) / 4 + move[1]
        heights[half::step, ::step] = (corners + below + centres + np.roll(centres, 1, axis=1)) / 4 + move[2]
        step, wobble = half, wobble / decay**2
    heights -= heights.min()
    return heights / heights.max()


@functools.cache
def pictures_of_frost(small, sides):
    """The package's own pictures: they stand for the photographs, as data, and leave 160 px or more to crop from."""
    height, width = (math.ceil((side + 160) / 128) * 128 for side in sides)
    grain, shrink = (42.0, 3) if small else (70.0, 1)
    return panes(height, width, grain, shrink, torch.device("cpu")).numpy()


def frost(image, severity, rng):
    image_weight, ice_weight = pick(
        image,
        severity,
        [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
        [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
    )
    _, height, width = image.shape
    pictures = pictures_of_frost(min(height, width) < 96, (height, width))
    picture = pictures[rng.integers(0, 5, ())]
    top = rng.integers(0, picture.shape[1] - height + 1, ())
    left = rng.integers(0, picture.shape[2] - width + 1, ())
    crop = picture[:, top : top + height, left : left + width] / 255
    return clip(image_weight * image + ice_weight * crop)


def fog(image, severity, rng):
    thickness, decay = pick(
        image,
        severity,
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
    )
    _, height, width = image.shape
    side = 2 ** math.ceil(math.log2(max(height, width)))
    cloud = plasma(side, decay, rng)[:height, :width]
    return clip((image + thickness * cloud) * image.max() / (image.max() + thickness))


# Digital


def to_hsv(image):
    red, green, blue = image
    value, low = image.max(axis=0), image.min(axis=0)
    spread = np.where(value > low, value - low, 1.0)
    sector = np.where(
        value == red,
        ((green - blue) / spread) % 6,
        np.where(value == green, 2 + (blue - red) / spread, 4 + (red - green) / spread),
    )
    hue = np.where(value > low, sector / 6, 0.0)
    return hue, np.where(value > 0, (value - low) / np.where(value > 0, value, 1.0), 0.0), value


def from_hsv(hue, saturation, value):
    out = []
    for shift in (5, 3, 1):
        k = (shift + hue * 6) % 6
        out.append(value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(out)


def brightness(image, severity, rng=None):
    hue, saturation, value = to_hsv(image)
    c = pick(image, severity, [0.1, 0.2, 0.3, 0.4, 0.5], [0.05, 0.1, 0.15, 0.2, 0.3])
    return clip(from_hsv(hue, saturation, clip(value + c)))


def contrast(image, severity, rng=None):
    c = pick(image, severity, [0.4, 0.3, 0.2, 0.1, 0.05], [0.75, 0.5, 0.4, 0.3, 0.15])
    mean = image.mean(axis=(1, 2), keepdims=True)
    return clip((image - mean) * c + mean)


def elastic_transform(image, severity, rng):
    _, height, width = image.shape
    short = min(height, width)
    unit = short if short < 96 else short / 224 * 244
    strength, smoothness, corner = pick(
        image,
        severity,
        [(2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)],
        [(0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)],
    )
    arm = short // 3
    centre = np.array([width // 2, height // 2])
    before = np.array([centre + arm, centre + np.array([arm, -arm]), centre - arm], dtype=np.float64)
    after = before + rng.uniform(-corner * unit, corner * unit, size=(3, 2))
    # Affine map from (x, y, 1) of the result to (x, y) of the image.
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    source = np.stack([x, y, np.ones_like(x)], axis=-1) @ back
    out = np.stack(
        [ndimage.map_coordinates(c, [source[..., 1], source[..., 0]], order=1, mode="mirror") for c in image]
    )
    if strength == 0:
        return clip(out)
    noise = rng.uniform(-1, 1, size=(2, height, width))
    dx, dy = (blur(plane, smoothness * unit, "reflect", 3.0) * strength * unit for plane in noise)
    return clip(np.stack([ndimage.map_coordinates(c, [y + dy, x + dx], order=1, mode="reflect") for c in out]))


def pixelate(image, severity, rng=None):
    _, height, width = image.shape
    c = pick(image, severity, [0.6, 0.5, 0.4, 0.3, 0.25], [0.95, 0.9, 0.85, 0.75, 0.65])
    out = []
    for channel in image:
        small = Image.fromarray(channel.astype(np.float32)).resize(
            (int(width * c), int(height * c)), Image.Resampling.BOX
        )
        out.append(np.asarray(small.resize((width, height), Image.Resampling.BOX), dtype=np.float64))
    return clip(np.stack(out))


def jpeg_compression(image, severity, rng=None):
    quality = pick(image, severity, [25, 18, 15, 10, 7], [80, 65, 58, 50, 40])
    file = io.BytesIO()
    Image.fromarray(np.round(image * 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), dtype=np.float64).transpose(2, 0, 1) / 255


#: Every corruption by name.
REFERENCES = {
    function.__name__: function
    for function in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}
