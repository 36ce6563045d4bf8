"""From bytes or a path to an upright 8-bit RGB image.

A file that cannot be read is a `BrokenImageError`, and may be left out. Pixels without a defined range are an
`ImageError`, and never left out: they usually concern every file of the dataset.
"""

from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps

from entprop_wrap.errors import ImageError


class BrokenImageError(ImageError):
    """An image is missing, is not an image, or is damaged or cut off."""


def read_image(cell: Any) -> Image.Image:
    """Decode one cell of a `datasets.Image(decode=False)` column completely, in whatever mode it is stored."""
    data, path = (cell or {}).get("bytes"), (cell or {}).get("path")
    try:
        if data is None and "://" in str(path):  # a URL, perhaps into an archive
            image: Image.Image = datasets.Image().decode_example({"bytes": None, "path": path})
        else:  # from memory: PIL would keep one file handle per image
            image = Image.open(BytesIO(Path(str(path)).read_bytes() if data is None else data))
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a PIL image of any mode as an upright 8-bit RGB image; of an animation, the first frame.

    The EXIF orientation is applied. Transparency is composited on white, as the colour under it is arbitrary. 16-bit
    grayscale is divided by 257, so that white stays white; PIL would clip everything above 255.

    Raises:
        ImageError: The mode has no defined range of values (floating point, 32-bit integers above 65,535, LAB).
    """
    with suppress(Exception):  # damaged EXIF data, common on the web, says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which older PIL opens as 32
        values = np.asarray(image).astype(np.int64)
        if values.min() >= 0 and values.max() <= 65_535:
            image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.mode in ("F", "LAB") or image.mode.startswith("I"):
        raise ImageError(
            f"Expected an 8-bit or 16-bit image, found mode {image.mode!r}, whose values have no defined range: "
            "convert these files to 8-bit RGB first, for example with dataset.map(...)."
        )
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")
