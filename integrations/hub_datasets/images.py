"""From bytes or a path to upright 8-bit RGB images, and datasets of them with labels: decoded when asked for, or once.

A file that cannot be read is a `BrokenImageError`, and may be left out. Pixels without a defined range are an
`ImageError`, and never left out: they usually concern every file of the dataset.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.Image import Resampling
from torch import Tensor
from torch.utils.data import Dataset, default_collate

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


class LabelledImages(Dataset[tuple[Any, int]]):
    """Images with their class indices, decoded when asked for, in a fixed order; made by `load_images`.

    ``dataset[i]`` is ``(transform(image), label)``; without a transform the image is an upright RGB PIL image. An image
    that cannot be read raises `BrokenImageError`.

    Attributes:
        labels: Class indices, ``(N,)`` int64.
        positions: Rows in the stored dataset, ``(N,)`` int64.
        transform: Applied to each RGB image, or None.
    """

    def __init__(self, rows: datasets.Dataset, image_column: str, labels: Sequence[int], name: str) -> None:
        # Raw bytes: `datasets` would decode inside its own loop, where a broken file ends it.
        rows = rows.with_format(None).select_columns([image_column])
        self.rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.positions = torch.arange(len(rows))
        self.image_column, self.name = image_column, name
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.read(index)
        return (self.transform(image) if self.transform else image), int(self.labels[index])

    def read(self, index: int) -> Image.Image:
        """Return the RGB image at an index, without transform."""
        row = int(self.positions[index])
        try:
            return to_rgb(read_image(self.rows[row][self.image_column]))
        except ImageError as error:
            raise type(error)(f"Image {index} of {self.name} (row {row}): {error}") from error

    def select(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> "LabelledImages":
        """Return a dataset of some of the images, in the order given."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        other = copy.copy(self)
        other.labels, other.positions, other.name = self.labels[chosen], self.positions[chosen], name or self.name
        return other

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> "LabelledImages":
        """Return the same images under another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other


@dataclass(frozen=True, eq=False)
class InMemoryImages(Dataset[tuple[Any, int]]):
    """Pairs ``(transform(image), label)``, held as two tensors.

    Attributes:
        images: ``(N, 3, H, W)`` uint8, 0 to 255.
        labels: ``(N,)`` int64 class indices.
        transform: Applied to each image ``(3, H, W)``, such as `train_transform` and `eval_transform`, or None.
    """

    images: Tensor
    labels: Tensor
    transform: Callable[[Tensor], Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), int(self.labels[index])


def in_memory(dataset: LabelledImages, size: int, transform: Callable[[Tensor], Any] | None = None) -> InMemoryImages:
    """Decode a dataset once: short side to ``size`` pixels, then the central square.

    Takes ``3 * size**2`` bytes an image (128 px: 49 kB). For random crops choose ``size`` somewhat above the size of
    the crops. The dataset's own transform is not applied.
    """
    images = torch.empty((len(dataset), 3, size, size), dtype=torch.uint8)
    for index in range(len(dataset)):
        square = ImageOps.fit(dataset.read(index), (size, size), Resampling.BILINEAR)
        images[index] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    return InMemoryImages(images, dataset.labels, transform)


def hf_collate(samples: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
    """Stack B pairs of a tensor ``(3, H, W)`` and a label, an int or soft labels ``(C,)``, for Hugging Face models.

    Returns:
        ``{"pixel_values": (B, 3, H, W), "labels": (B,)}``, or labels ``(B, C)``.
    """
    images, labels = default_collate(list(samples))
    return {"pixel_values": images, "labels": labels}
