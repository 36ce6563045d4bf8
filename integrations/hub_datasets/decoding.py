"""Bytes or a path in, an upright 8-bit RGB image out.

Damaged files and unusual pixel formats are kept apart: a file that cannot be read is a `BrokenImageError`, which a
dataset may skip; a pixel format whose meaning is unknown is an `ImageError`, which is never skipped, because it
usually concerns every file of the dataset.
"""

from io import BytesIO
from pathlib import Path
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


def read_image(cell: Any) -> Image.Image:
    """Decode one cell of a `datasets.Image(decode=False)` column completely, in whatever mode it is stored."""
    data, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    try:
        image = _open(data, path)
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        # On damaged files PIL's plugins raise nearly anything: OSError, SyntaxError, EOFError, struct.error, ...
        size = "no bytes" if data is None else f"{len(data):,} bytes"
        raise BrokenImageError(
            f"Expected a readable image, found {size}{f' at {path!r}' if path else ''}: {type(error).__name__}: {error}"
        ) from error
    return image


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Return an upright 8-bit RGB image of a PIL image of any mode; of an animation, the first frame.

    The EXIF orientation is applied. Transparency is composited on ``background`` (RGB, 0 to 255): what lies under it
    is arbitrary, often black. 16-bit grayscale, also in mode ``I``, in which older versions of PIL open it, is divided
    by 257, so that white stays white; PIL would clip everything above 255.

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
    if image.mode not in _DIRECT_MODES:
        raise ImageError(
            f"Expected an 8-bit or 16-bit image, found mode {image.mode!r}, which has no defined range of values: "
            "convert these files to 8-bit RGB first, for example with dataset.map(...)."
        )
    return image if image.mode == "RGB" else image.convert("RGB")


def _open(data: bytes | None, path: str | None) -> Image.Image:
    """Open an image, perhaps without decoding it yet."""
    if data is None and path is None:
        raise ValueError("the cell is empty")
    if data is None and "://" in str(path):  # a streamed file: `datasets` knows how to fetch it, also from an archive
        decoded: Image.Image = datasets.Image().decode_example({"bytes": None, "path": path})
        return decoded
    # From memory: PIL would keep one file handle per image.
    return Image.open(BytesIO(Path(str(path)).read_bytes() if data is None else data))


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
