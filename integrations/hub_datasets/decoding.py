"""Bytes or a path in, an upright 8-bit RGB image out.

Damaged files and unusual pixel formats are kept apart: a file that cannot be read is a `BrokenImageError`, which a
data set may skip; a pixel format whose meaning is unknown is an `ImageError`, which is never skipped, because it
usually concerns every file of the data set.
"""

import os
from io import BytesIO
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps

from entprop_wrap.errors import ImageError

__all__ = ["BrokenImageError", "read_image", "to_rgb"]

_ALPHA_MODES = frozenset({"LA", "PA", "RGBA", "RGBa"})
_DIRECT_MODES = frozenset({"1", "CMYK", "HSV", "L", "P", "RGB", "RGBX", "YCbCr"})


class BrokenImageError(ImageError):
    """An image is missing, is not an image, or is damaged or cut off."""


def read_image(value: Any) -> Image.Image:
    """Decode one image completely, in whatever mode it is stored.

    Args:
        value: What a `datasets.Image(decode=False)` column holds, ``{"bytes": ..., "path": ...}``; or a path, the
            bytes of a file, or a PIL image.

    Raises:
        BrokenImageError: Nothing there, or no image can be decoded from it to its last byte.
    """
    if isinstance(value, (str, os.PathLike)):
        value = {"bytes": None, "path": os.fspath(value)}
    elif isinstance(value, (bytes, bytearray)):
        value = {"bytes": bytes(value), "path": None}
    try:
        image = _open(value)
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        # On damaged files PIL's plugins raise nearly anything: OSError, SyntaxError, EOFError, struct.error, ...
        raise BrokenImageError(
            f"Expected a readable image, found {_describe(value)}: {type(error).__name__}: {error}"
        ) from error
    return image


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """An upright 8-bit RGB image of any PIL image.

    - The EXIF orientation is applied, so that width and height are those a viewer shows.
    - Transparency (an alpha channel, a transparent palette entry) is composited on ``background``: what lies under
      transparent pixels is arbitrary, often black, and was never meant to be seen.
    - 16-bit grayscale is divided by 257, so that white stays white; PIL would clip everything above 255. Mode ``I``,
      in which older versions of PIL open 16-bit PNG files, is read in the same way.
    - Of an animation, the first frame.

    Args:
        image: A PIL image of any mode.
        background: RGB, 0 to 255, seen through transparent pixels.

    Raises:
        ImageError: The mode has no defined value range (floating point, 32-bit integers above 65,535) or cannot be
            converted (LAB).
    """
    image = _upright(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    if image.mode == "RGB":
        return image
    if image.mode not in _DIRECT_MODES:
        raise ImageError(
            f"Expected an 8-bit or 16-bit image, found mode {image.mode!r}, which has no defined range of values: "
            "convert these files to 8-bit RGB first, for example with dataset.map(...)."
        )
    return image.convert("RGB")


def _open(value: Any) -> Image.Image:
    """A PIL image, perhaps not decoded yet; whatever goes wrong is the caller's to translate."""
    if isinstance(value, Image.Image):
        return value
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise ValueError("the cell is empty")
    if value.get("bytes") is not None:
        return Image.open(BytesIO(value["bytes"]))
    if "://" in value["path"]:  # a streamed file: `datasets` knows how to fetch it, and from inside an archive
        decoded: Image.Image = datasets.Image().decode_example({"bytes": None, "path": value["path"]})
        return decoded
    with open(value["path"], "rb") as file:  # closed at once: PIL would keep one handle per image
        return Image.open(BytesIO(file.read()))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data, common on the web, says nothing about the pixels
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65_535:
        raise ImageError(
            f"Expected 16-bit values, 0 to 65535, found a 32-bit image (mode {image.mode!r}) spanning "
            f"[{values.min()}, {values.max()}]: convert these files to 8-bit first."
        )
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _describe(value: Any) -> str:
    if not isinstance(value, dict):
        return type(value).__name__
    data, path = value.get("bytes"), value.get("path")
    size = "no bytes" if data is None else f"{len(data):,} bytes"
    return f"{size} at {path!r}" if path else size
