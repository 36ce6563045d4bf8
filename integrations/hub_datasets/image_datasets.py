"""Datasets of (image, label) for torch: map-style over stored rows, or a stream."""

import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeAlias

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from entprop_wrap.errors import DataError, ImageError
from entprop_wrap.integrations.hub_datasets.decoding import BrokenImageError, read_image, to_rgb
from entprop_wrap.integrations.hub_datasets.labels import LabelMap, label_value, read_labels

__all__ = ["LabelledImages", "OnBroken", "StreamedImages"]

logger = logging.getLogger(__name__)

OnBroken: TypeAlias = Literal["skip", "raise"]
Transform: TypeAlias = Callable[[Image.Image], Any]


class LabelledImages(Dataset[tuple[Any, int]]):
    """Images with their class indices, decoded when asked for, in a fixed order; made by `load_images`.

    ``dataset[i]`` is ``(transform(image), label)``; without a transform the image is an upright RGB PIL image.

    An image that cannot be read raises `BrokenImageError` under ``on_broken="raise"``. Under ``"skip"`` the next
    readable image stands in for it, with its own label: good enough for training, where a neighbour seen twice does no
    harm, and wrong for evaluation; `without_broken` gives a dataset with no stand-ins. Positions found broken are
    kept in memory that DataLoader workers share, so `broken` is complete in the main process.

    Attributes:
        labels: Class indices, ``(N,)`` int64.
        positions: Rows in the stored dataset, ``(N,)`` int64.
        transform: Applied to each RGB image, or None.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        label_column: str,
        label_map: LabelMap,
        on_broken: OnBroken = "skip",
        name: str = "data",
    ) -> None:
        self.rows = _undecoded(rows.with_format(None).select_columns([image_column]), image_column)
        self.image_column = image_column
        self.labels = torch.tensor(label_map.indices(read_labels(rows, label_column), name), dtype=torch.int64)
        self.positions = torch.arange(len(rows))
        self.transform: Transform | None = None
        self.on_broken: OnBroken = on_broken
        self.name = name
        self._broken = _shared_zeros(len(rows))

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images.")
        for step in range(len(self)):
            position = (index + step) % len(self)
            if self._broken[position]:
                continue
            try:
                image = self.read(position)
            except BrokenImageError as error:
                if self.on_broken == "raise":
                    raise
                self.mark_broken(position, error)
                continue
            return (image if self.transform is None else self.transform(image)), int(self.labels[position])
        raise DataError(f"Expected readable images in {self.name}, found none among {len(self):,}.")

    @property
    def broken(self) -> tuple[int, ...]:
        """Indices of the images found unreadable so far."""
        return tuple(self._broken.nonzero().flatten().tolist())

    def read(self, index: int) -> Image.Image:
        """Return the RGB image at an index, without transform and without stand-in; raise if it cannot be read."""
        row = int(self.positions[index])
        try:
            image: Image.Image = to_rgb(read_image(self.rows[row][self.image_column]))
        except ImageError as error:
            raise type(error)(f"Image {index} of {self.name} (row {row}): {error}") from error
        return image

    def mark_broken(self, index: int, error: BrokenImageError) -> None:
        """Record that the image at an index cannot be read, and log it."""
        self._broken[index] = 1
        logger.warning("skipped: %s", error)

    def without_broken(self) -> "LabelledImages":
        """Return the same dataset without the images that cannot be read, found by decoding every one of them once.

        What is left raises on a broken image, should one still turn up: nothing ever stands in for another.
        """
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            good = np.flatnonzero(list(pool.map(self._is_readable, range(len(self)))))
        if len(good) == 0:
            raise DataError(f"Expected readable images in {self.name}, found none among {len(self):,}.")
        readable = self.select(good)
        readable.on_broken = "raise"
        return readable

    def select(self, indices: Sequence[int] | np.ndarray, name: str | None = None) -> "LabelledImages":
        """Return a dataset of some of the images, in the order given."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        other = copy.copy(self)
        other.labels, other.positions = self.labels[chosen], self.positions[chosen]
        other.name = name or self.name
        other._broken = _shared_zeros(len(chosen))
        return other

    def with_transform(self, transform: Transform | None) -> "LabelledImages":
        """Return the same images under another transform; what was found broken is shared."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def _is_readable(self, index: int) -> bool:
        try:
            self.read(index)
        except BrokenImageError as error:
            logger.warning("dropped: %s", error)
            return False
        return True


class StreamedImages(IterableDataset[tuple[Any, int]]):
    """Images with their class indices, read one after the other from a stream; made by `load_images`.

    Iterating gives ``(transform(image), label)``. DataLoader workers share the stream by its files, as `datasets`
    arranges. Unreadable images are left out and counted, or raise; no image stands in for another.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        image_column: str,
        label_column: str,
        label_map: LabelMap,
        on_broken: OnBroken = "skip",
        name: str = "stream",
    ) -> None:
        self.stream = _undecoded(stream.select_columns([image_column, label_column]), image_column)
        self.image_column = image_column
        self.label_column = label_column
        self.label_map = label_map
        self.transform: Transform | None = None
        self.on_broken: OnBroken = on_broken
        self.name = name
        self._label_type = stream.features[label_column]
        self._broken = _shared_zeros(1)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for index, row in enumerate(self.stream):
            value = label_value(row[self.label_column], self._label_type)
            (label,) = self.label_map.indices([value], f"{self.name}, image {index}")
            try:
                image = to_rgb(read_image(row[self.image_column]))
            except ImageError as error:
                if self.on_broken == "raise" or not isinstance(error, BrokenImageError):
                    raise type(error)(f"Image {index} of {self.name}: {error}") from error
                self._broken += 1
                logger.warning("skipped: image %d of %s: %s", index, self.name, error)
                continue
            yield (image if self.transform is None else self.transform(image)), label

    @property
    def broken_count(self) -> int:
        """Number of unreadable images left out so far, over all epochs and workers."""
        return int(self._broken)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle in another order from the next iteration on (no effect on an unshuffled stream)."""
        self.stream.set_epoch(epoch)

    def with_transform(self, transform: Transform | None) -> "StreamedImages":
        """Return the same stream under another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other


def _shared_zeros(size: int) -> torch.Tensor:
    """Return zeros that DataLoader workers and the main process see alike."""
    zeros = torch.zeros(size, dtype=torch.int64)
    zeros.share_memory_()  # type: ignore[no-untyped-call]
    return zeros


def _undecoded(rows: Any, column: str) -> Any:
    """Return rows with raw image bytes: `datasets` would decode inside its own loop, where a broken file ends it."""
    return rows.cast_column(column, datasets.Image(decode=False))
