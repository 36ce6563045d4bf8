"""Small images and datasets for the tests of image data."""

from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def picture(shade: int = 0, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """A plain image; different shades are different images."""
    return Image.new("RGB", size, (shade % 256, shade // 256, 100)).convert(mode)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def truncated(format: str = "JPEG") -> bytes:
    """A file cut off in the middle: its header is sound."""
    data = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), format)
    return data[: len(data) // 2]


def table(labels: list, names: list[str] | None = None, broken: tuple[int, ...] = (), **columns) -> datasets.Dataset:
    """Rows of distinct images; the shade is the row's position, so that an image tells where it comes from."""
    cells = [truncated() if row in broken else encoded(picture(row)) for row in range(len(labels))]
    features = datasets.Features({"image": datasets.Image()})
    data = {"image": [{"bytes": cell, "path": None} for cell in cells]}
    rows = datasets.Dataset.from_dict(data, features=features)
    rows = rows.add_column("label", labels)
    if names is not None:
        rows = rows.cast_column("label", datasets.ClassLabel(names=names))
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


def shade(image: Image.Image) -> int:
    """The row an image of `table` comes from."""
    red, green, _ = image.getpixel((0, 0))
    return red + 256 * green


def shades(images) -> list[int]:
    return [shade(image) for image, _ in images]


def folder(root: Path, tree: dict[str, int]) -> Path:
    """Files ``root/<key>/<n>.png``, as many as the tree says."""
    count = 0
    for place, number in tree.items():
        (root / place).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            picture(count).save(root / place / f"{index}.png")
            count += 1
    return root


def dark_and_light(root: Path, levels: tuple[int, int] = (40, 200)) -> Path:
    """An image folder of two classes, eight images each, of these grey levels."""
    dice = np.random.default_rng(0)
    for name, level in zip(("dark", "light"), levels, strict=True):
        (root / name).mkdir(parents=True)
        for index in range(8):
            pixels = dice.integers(level - 30, level + 30, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root
