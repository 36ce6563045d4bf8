"""Data sets of (image, label) for torch: map-style over stored rows, or a stream."""

import copy
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from entprop_wrap.errors import DataError, ImageError
from entprop_wrap.integrations.hub_datasets.decoding import BrokenImageError, read_image, to_rgb
from entprop_wrap.integrations.hub_datasets.labels import LabelMap, label_value
from entprop_wrap.integrations.hub_datasets.load_options import OnBroken, check_on_broken

__all__ = ["LabelledImages", "StreamedImages"]

logger = logging.getLogger(__name__)

Transform = Callable[[Image.Image], Any]


class LabelledImages(Dataset[tuple[Any, int]]):
    """Images with their class indices, decoded when asked for, in a fixed order.

    ``dataset[i]`` is ``(transform(image), label)``; without a transform the image is an upright RGB PIL image.

    An image that cannot be read raises `BrokenImageError` under ``on_broken="raise"``. Under ``"skip"`` the next
    readable image stands in for it, with its own label: good enough for training, where a neighbour seen twice does no
    harm, and wrong for evaluation; `without_broken` gives a data set with no stand-ins. Positions found broken are
    kept in memory that DataLoader workers share, so `broken` is complete in the main process.

    Args:
        rows: The stored data set; only ``image_column`` of it is read.
        image_column: Its column of images, paths or bytes.
        labels: Class index of each image, ``(N,)``.
        positions: Row of each image in ``rows``, ``(N,)``.
        transform: Applied to each RGB image.
        on_broken: ``"skip"`` or ``"raise"``.
        name: Of the split, for messages.

    Attributes:
        labels: Class indices, ``(N,)`` int64.
        positions: Rows in the stored data set, ``(N,)`` int64.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        image_column: str,
        labels: Sequence[int],
        positions: Sequence[int],
        transform: Transform | None = None,
        on_broken: OnBroken = "skip",
        name: str = "data",
    ) -> None:
        check_on_broken(on_broken)
        self.rows = _undecoded(rows.with_format(None).select_columns([image_column]), image_column)
        self.image_column = image_column
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.positions = torch.as_tensor(positions, dtype=torch.int64)
        self.transform = transform
        self.on_broken: OnBroken = on_broken
        self.name = name
        self._broken = _shared(len(self.positions), torch.bool)

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
        """The RGB image at an index, without transform and without stand-in.

        Raises:
            BrokenImageError: It cannot be read.
            ImageError: It has a pixel format whose meaning is unknown.
        """
        row = int(self.positions[index])
        try:
            return to_rgb(read_image(self.rows[row][self.image_column]))
        except ImageError as error:
            raise type(error)(f"Image {index} of {self.name} (row {row}): {error}") from error

    def without_broken(self, threads: int | None = None) -> "LabelledImages":
        """The same data set without the images that cannot be read, found by decoding every one of them once.

        What is left raises on a broken image, should one still turn up: nothing ever stands in for another.

        Args:
            threads: How many decode side by side; by default one per core, at most 8.

        Raises:
            DataError: No image can be read.
        """
        with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
            readable = list(pool.map(self._is_readable, range(len(self))))
        good = torch.tensor(readable, dtype=torch.bool).nonzero().flatten()
        if len(good) == 0:
            raise DataError(f"Expected readable images in {self.name}, found none among {len(self):,}.")
        return self.select(good.tolist(), on_broken="raise")

    def select(self, indices: Sequence[int], on_broken: OnBroken | None = None) -> "LabelledImages":
        """A data set of some of the images, in the order given."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return LabelledImages(
            self.rows,
            self.image_column,
            self.labels[chosen].tolist(),
            self.positions[chosen].tolist(),
            self.transform,
            on_broken or self.on_broken,
            self.name,
        )

    def with_transform(self, transform: Transform | None) -> "LabelledImages":
        """The same images under another transform; what was found broken is shared."""
        other = copy.copy(self)
        other.transform = transform
        return other

    def mark_broken(self, index: int, error: BrokenImageError) -> None:
        """Record that the image at an index cannot be read, and log it."""
        self._broken[index] = True
        logger.warning("skipped: %s", error)

    def _is_readable(self, index: int) -> bool:
        try:
            self.read(index)
        except BrokenImageError as error:
            logger.warning("dropped: %s", error)
            return False
        return True


class StreamedImages(IterableDataset[tuple[Any, int]]):
    """Images with their class indices, read one after the other from a stream.

    Iterating gives ``(transform(image), label)``. DataLoader workers share the stream by its files, as `datasets`
    arranges. Unreadable images are left out and counted, or raise; no image stands in for another.

    Args:
        stream: The streamed data set.
        image_column: Its column of images, paths or bytes.
        label_column: Its column of labels.
        labels: The mapping from label values to class indices.
        transform: Applied to each RGB image.
        on_broken: ``"skip"`` or ``"raise"``.
        name: Of the split, for messages.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        image_column: str,
        label_column: str,
        labels: LabelMap,
        transform: Transform | None = None,
        on_broken: OnBroken = "skip",
        name: str = "stream",
    ) -> None:
        check_on_broken(on_broken)
        self.stream = _undecoded(stream.select_columns([image_column, label_column]), image_column)
        self.image_column = image_column
        self.label_column = label_column
        self.label_map = labels
        self.transform = transform
        self.on_broken: OnBroken = on_broken
        self.name = name
        self._label_type = (stream.features or {}).get(label_column)
        self._broken = _shared(1, torch.int64)

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        for index, row in enumerate(self.stream):
            value = label_value(row[self.label_column], self._label_type)
            (label,) = self.label_map.indices([value], f"{self.name}, image {index}")
            try:
                image = to_rgb(read_image(row[self.image_column]))
            except BrokenImageError as error:
                if self.on_broken == "raise":
                    raise BrokenImageError(f"Image {index} of {self.name}: {error}") from error
                self._broken += 1
                logger.warning("skipped: image %d of %s: %s", index, self.name, error)
                continue
            except ImageError as error:
                raise ImageError(f"Image {index} of {self.name}: {error}") from error
            yield (image if self.transform is None else self.transform(image)), label

    @property
    def broken_count(self) -> int:
        """How many unreadable images were left out so far, over all epochs and workers."""
        return int(self._broken)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle in another order from the next iteration on (no effect on an unshuffled stream)."""
        self.stream.set_epoch(epoch)

    def with_transform(self, transform: Transform | None) -> "StreamedImages":
        """The same stream under another transform."""
        other = copy.copy(self)
        other.transform = transform
        return other


def _shared(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros that DataLoader workers and the main process see alike."""
    zeros = torch.zeros(size, dtype=dtype)
    zeros.share_memory_()  # type: ignore[no-untyped-call]
    return zeros


def _undecoded(rows: Any, column: str) -> Any:
    """The rows with raw image bytes: `datasets` would decode inside its own loop, where a broken file ends it."""
    return rows.cast_column(column, datasets.Image(decode=False))
