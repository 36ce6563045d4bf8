"""Datasets of (image, label) for torch, over stored rows."""

import copy
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from entprop_wrap.errors import DataError, ImageError
from entprop_wrap.integrations.hub_datasets.decoding import BrokenImageError, read_image, to_rgb
from entprop_wrap.integrations.hub_datasets.labels import LabelMap, read_labels

__all__ = ["LabelledImages", "OnBroken"]

logger = logging.getLogger(__name__)

OnBroken: TypeAlias = Literal["skip", "raise"]
Transform: TypeAlias = Callable[[Image.Image], Any]


class LabelledImages(Dataset[tuple[Any, int]]):
    """Images with their class indices, decoded when asked for, in a fixed order; made by `load_images`.

    ``dataset[i]`` is ``(transform(image), label)``; without a transform the image is an upright RGB PIL image.

    An image that cannot be read raises `BrokenImageError` under ``on_broken="raise"``. Under ``"skip"`` the next
    readable image stands in, with its own label: harmless in training, wrong in evaluation, for which there is
    `without_broken`. What DataLoader workers find broken, the main process knows too.

    Attributes:
        labels: Class indices, ``(N,)`` int64.
        positions: Rows in the stored dataset, ``(N,)`` int64.
        transform: Applied to each RGB image, or None.
    """

    def __init__(
        self, rows: datasets.Dataset, image: str, label: str, label_map: LabelMap, on_broken: OnBroken, name: str
    ) -> None:
        # raw bytes: `datasets` would decode inside its own loop, where a broken file ends it
        self.rows = rows.with_format(None).select_columns([image]).cast_column(image, datasets.Image(decode=False))
        self.labels = torch.tensor(label_map.indices(read_labels(rows, label), name), dtype=torch.int64)
        self.positions = torch.arange(len(rows))
        self.image_column, self.on_broken, self.name = image, on_broken, name
        self.transform: Transform | None = None
        self._broken = _shared_zeros(len(rows))

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images.")
        for position in ((index + step) % len(self) for step in range(len(self))):
            if not self._broken[position]:
                try:
                    image = self.read(position)
                except BrokenImageError as error:
                    self.mark_broken(position, error)
                else:
                    return (self.transform(image) if self.transform else image), int(self.labels[position])
        raise self._nothing_readable()

    @property
    def broken(self) -> tuple[int, ...]:
        """Indices of the images found unreadable so far."""
        return tuple(self._broken.nonzero().flatten().tolist())

    def mark_broken(self, index: int, error: BrokenImageError) -> None:
        """Record and log that an image cannot be read, or raise under ``on_broken="raise"``."""
        if self.on_broken == "raise":
            raise error
        self._broken[index] = 1
        logger.warning("skipped: %s", error)

    def read(self, index: int) -> Image.Image:
        """Return the RGB image at an index, without transform and without stand-in; raise if it cannot be read."""
        row = int(self.positions[index])
        try:
            image: Image.Image = to_rgb(read_image(self.rows[row][self.image_column]))
        except ImageError as error:
            raise type(error)(f"Image {index} of {self.name} (row {row}): {error}") from error
        return image

    def without_broken(self) -> "LabelledImages":
        """Return the images that can be read, found by decoding every one once; later failures raise."""

        def readable(index: int) -> bool:
            try:
                self.read(index)
            except BrokenImageError as error:
                logger.warning("dropped: %s", error)
                return False
            return True

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            good = np.flatnonzero(list(pool.map(readable, range(len(self)))))
        if len(good) == 0:
            raise self._nothing_readable()
        other = self.select(good)
        other.on_broken = "raise"
        return other

    def select(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> "LabelledImages":
        """Return a dataset of some of the images, in the order given."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        other = copy.copy(self)
        other.labels, other.positions = self.labels[chosen], self.positions[chosen]
        other.name, other._broken = name or self.name, _shared_zeros(len(chosen))
        return other

    def with_transform(self, transform: Transform | None) -> "LabelledImages":
        """Return the same images under another transform; what was found broken is shared."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def _nothing_readable(self) -> DataError:
        return DataError(f"Expected readable images in {self.name}, found none among {len(self):,}.")


def _shared_zeros(size: int) -> torch.Tensor:
    """Return zeros that DataLoader workers and the main process see alike."""
    zeros = torch.zeros(size, dtype=torch.int64)
    zeros.share_memory_()  # type: ignore[no-untyped-call]
    return zeros
