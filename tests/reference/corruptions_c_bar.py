"""The corruptions of ImageNet-C-bar, pixel by pixel where that is feasible: NumPy, float64, slow and plain.

Written from the definitions of Mintun, Kirillov & Xie (2021) and their released code: formulas and constants, without
rounding to bytes. Images are square ``(3, S, S)`` in [0, 1]; ``rng`` has ``uniform``, ``integers`` and ``normal``.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage

STRENGTHS = {
    "blue_noise_sample": ([0.8, 1.6, 2.4, 4.0, 5.6], [0.7, 1.4, 2.1, 3.5, 4.2]),
    "brownish_noise": ([1, 2, 3, 4, 5], [2.5, 4, 5.5, 6.5, 7]),
    "caustic_refraction": ([2.35, 3.2, 4.9, 6.6, 9.15], None),
    "checkerboard_cutout": ([2, 3, 4, 5, 6], [1, 2, 3, 4, 5]),
    "cocentric_sine_waves": ([3, 5, 8, 9, 10], None),
    "inverse_sparkles": ([1, 2, 4, 9, 10], [1, 1.5, 2.5, 4.5, 5]),
    "perlin_noise": ([4.6, 5.2, 5.8, 7.6, 8.8], None),
    "plasma_noise": ([4.75, 7, 8.5, 9.25, 10], None),
    "single_frequency_greyscale": ([1, 1.5, 2, 4.5, 5], None),
    "sparkles": ([1, 2, 3, 5, 6], [0.7, 3.5, 5.6, 6.3, 7]),
}


def strength(name, image, severity):
    imagenet, cifar = STRENGTHS[name]
    return (cifar if cifar and min(image.shape[1:]) < 96 else imagenet)[severity - 1]


def everywhere(image, value):
    """``value(y, x)`` at each pixel."""
    side = image.shape[1]
    return np.array([[value(y, x) for x in range(side)] for y in range(side)])


def single_frequency_greyscale(image, severity, rng):
    intensity = strength("single_frequency_greyscale", image, severity) * 196 / 10 / 255
    one = rng.uniform(-math.pi, math.pi, (1, 1)).item()
    two = rng.uniform(-1.0, 1.0, (1, 1)).item() * abs(one)
    swapped = rng.integers(0, 2, (1, 1)).item()
    phase = rng.uniform(0.0, 2 * math.pi, (1, 1)).item()
    of_x, of_y = (two, one) if swapped else (one, two)
    return np.clip(image + intensity * everywhere(image, lambda y, x: math.sin(x * of_x + y * of_y + phase)), 0, 1)


def cocentric_sine_waves(image, severity, rng):
    side = image.shape[1]
    intensity = strength("cocentric_sine_waves", image, severity) * 128 / 10 / 255
    left, top = rng.uniform(0.0, side, (1, 1)).item(), rng.uniform(0.0, side, (1, 1)).item()
    frequency = rng.uniform(0.0, 10.0, (1, 1)).item()
    amplitude, width = (rng.uniform(0.0, side / 10, (1, 1)).item() for _ in range(2))

    def ring(y, x):
        wobble = math.sin(math.atan2(x - left, y - top) * frequency) * amplitude
        return ((math.hypot(x - left, y - top) + wobble) % width) / width - 0.5

    return np.clip(image + intensity * everywhere(image, ring), 0, 1)


def plasma_noise(image, severity, rng):
    side = image.shape[1]
    intensity = strength("plasma_noise", image, severity) * 6.4 / 255
    time, folds = rng.uniform(0.0, 6 * math.pi, (1, 1)).item(), rng.integers(4, 7, (1, 1)).item()
    sharpness, scale = rng.uniform(0.5, 1.0, (1, 1)).item(), rng.uniform(0.075, 0.2, (1, 1)).item() * side

    def colour(y, x):
        x, y = x / scale, y / scale
        for fold in range(folds):
            shift = time / 1.15**fold
            r = np.array([math.cos(y * 1.93**fold + shift), math.sin(x * 1.93**fold + shift)])
            r = r / (2.25 - sharpness) ** fold
            r = r + 0.3 * np.array([-r[1], r[0]])
            x, y = x + r[0], y + r[1]
        return [math.sin(x - time), math.sin((x + y + math.sin(time)) * 0.5), math.sin(y + time)]

    return np.clip((1 - intensity) * image + intensity * everywhere(image, colour).transpose(2, 0, 1), 0, 1)


def perlin_noise(image, severity, rng):
    side = image.shape[1]
    blend = strength("perlin_noise", image, severity) * 0.05
    gradients = rng.uniform(-1.0, 1.0, (256, 2))
    gradients = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    table = np.argsort(rng.uniform(0.0, 1.0, (256,)))

    def noise(y, x):
        total = {}
        for down in (0, 1):
            for right in (0, 1):
                row, column = int(y) + down, int(x) + right
                slope = gradients[table[(table[row % 256] + column % 256) % 256]]
                total[down, right] = slope @ [y - row, x - column]
        v, u = ((t % 1) ** 2 * (3 - 2 * (t % 1)) for t in (y, x))
        left, right = (total[0, at] + v * (total[1, at] - total[0, at]) for at in (0, 1))
        return 1.5 * (left + u * (right - left))

    def turbulence(y, x):
        y, x = y / (32 * side / 224), x / (32 * side / 224)
        return sum(abs(noise(octave * y, octave * x)) / octave for octave in (1, 2, 4, 8, 16))

    return np.clip((1 - blend) * image + blend * np.clip(0.5 * everywhere(image, turbulence) + 0.5, 0, 1), 0, 1)


def spectral(image, rng, power, planes):
    side = image.shape[1]
    amplitude = everywhere(image, lambda y, x: power(math.hypot(x - side / 2, y - side / 2)))
    half = rng.uniform(0.0, 2 * math.pi, (planes, side, side // 2))
    middle = rng.uniform(0.0, 2 * math.pi, (planes, side // 2, 1)) if side % 2 else None
    noises = []
    for plane in range(planes):
        parts = [half[plane], half[plane][::-1, ::-1]]
        if side % 2:
            parts.insert(1, np.concatenate([middle[plane], [[0.0]], middle[plane][::-1]]))
        phases = np.concatenate(parts, axis=1)
        waves = np.roll(amplitude * np.exp(1j * phases), (side // 2, side // 2), (0, 1))
        noise = np.real(np.fft.ifft2(waves))
        noises.append(noise / np.std(noise))
    return np.stack(noises)


def brownish_noise(image, severity, rng):
    intensity = strength("brownish_noise", image, severity) * 64 / 10 / 255
    return np.clip(image + intensity * spectral(image, rng, lambda distance: 1 / (distance**2 + 1), 3), 0, 1)


def blue_noise_sample(image, severity, rng):
    threshold = strength("blue_noise_sample", image, severity) * 0.3 - 2.5
    return image * (spectral(image, rng, lambda distance: distance, 1) > threshold)


def checkerboard_cutout(image, severity, rng):
    side = image.shape[1]
    fraction = strength("checkerboard_cutout", image, severity) / 10
    angle, scale = rng.uniform(0.0, 2 * math.pi, (1, 1)).item(), rng.uniform(0.1, 0.25, (1, 1)).item() * side
    most = math.ceil(math.hypot(side, side) / (0.1 * side))
    grid = rng.uniform(0.0, 1.0, (2 * most + 1, 2 * most + 1)) < fraction
    out = image.copy()
    for y in range(side):
        for x in range(side):
            ny = (math.cos(angle) * y + math.sin(angle) * x) / scale
            nx = (-math.sin(angle) * y + math.cos(angle) * x) / scale
            if int(ny % 2) == int(nx % 2) and grid[int(ny) + most, int(nx) + most]:
                out[:, y, x] = 128 / 255
    return out


def star(y, x, centre, rays, lengths, exponent):
    turn = (math.atan2(x - centre[1], y - centre[0]) + math.pi) / (2 * math.pi) * rays
    ray = int(turn)
    between = turn - ray
    length = lengths[ray % rays] + between * (lengths[(ray + 1) % rays] - lengths[ray % rays])
    fall = (length**2 / ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 + 1e-4)) ** exponent
    return min(max((1 - (between - 0.5) ** 2) * fall, 0), 1)


def sparkles(image, severity, rng):
    side = image.shape[1]
    radius = strength("sparkles", image, severity) * 0.01 * side
    centres = rng.uniform(0.0, 1.0, (5, 2)) * side
    rays = rng.integers(50, 200, (5,))
    lengths = np.maximum(1.0, radius + 0.25 * radius * rng.normal((5, 199)))
    for centre, number, length in zip(centres, rays, lengths, strict=True):
        light = everywhere(image, lambda y, x: star(y, x, centre, number, length, 1.0))  # noqa: B023
        image = image + light * (1 - image)
    return image


def inverse_sparkles(image, severity, rng):
    side = image.shape[1]
    exponent = strength("inverse_sparkles", image, severity) * 65 / 10 / 50
    centre = rng.uniform(0.25, 0.75, (2,)) * side
    rays = rng.integers(50, 200, ()).item()
    lengths = 0.25 * side * (1 + 0.25 * rng.normal((199,)))
    return 1 + everywhere(image, lambda y, x: star(y, x, centre, rays, lengths, exponent)) * (image - 1)


def caustic_refraction(image, severity, rng):
    side = image.shape[1]
    level = strength("caustic_refraction", image, severity)
    time, size = rng.uniform(0.5, 2.0, (1, 1)).item(), rng.uniform(0.75, 1.25, (1, 1)).item() * side

    def web(y, x):
        start = np.array([y / size % 1, x / size % 1]) * 6.28318530718 - 250
        at, light = start.copy(), 1.0
        for wave in range(5):
            t = time * (1 - 3.5 / (wave + 1))
            step = [math.cos(t - at[0]) + math.sin(t + at[1]), math.sin(t - at[1]) + math.cos(t + at[0])]
            at = start + step
            parts = start[0] / (math.sin(at[0] + t) / 0.005), start[1] / (math.cos(at[1] + t) / 0.005)
            light += 1 / math.hypot(*parts)
        return min(max(abs(1.17 - (light / 5) ** 1.4) ** 8, 0), 1)

    caustics = ndimage.gaussian_filter(everywhere(image, web), sigma=1)

    def luma(y, x):
        return caustics[y, x] if 0 <= y < side and 0 <= x < side else 0.0

    def pixel(y, x):
        return image[:, y, x] if 0 <= y < side and 0 <= x < side else np.zeros(3)

    def seen(y, x):
        down, right = luma(y + 1, x) - luma(y - 1, x), luma(y, x + 1) - luma(y, x - 1)
        normal = np.array([down, right, 1.0])
        normal /= np.linalg.norm(normal)
        move = np.zeros(2)
        if normal[2] < 1 - 1e-3:
            # Snell's law in the plane of the normal and the vertical.
            sideways = np.cross(normal, np.cross([0.0, 0.0, 1.0], normal))
            sideways /= np.linalg.norm(sideways)
            out = math.asin(math.sin(math.acos(normal[2])) / 4.0)
            move = ((math.cos(out) * normal + math.sin(out) * sideways) * level * 0.05 * side)[:2]
        at_y, at_x = y + move[0], x + move[1]
        top, left = math.floor(at_y), math.floor(at_x)
        v, u = at_y - top, at_x - left
        value = (1 - v) * ((1 - u) * pixel(top, left) + u * pixel(top, left + 1))
        value = value + v * ((1 - u) * pixel(top + 1, left) + u * pixel(top + 1, left + 1))
        return value + (down - right) * level * 0.2

    return np.clip(everywhere(image, seen).transpose(2, 0, 1), 0, 1)


REFERENCES = {name: globals()[name] for name in STRENGTHS}
