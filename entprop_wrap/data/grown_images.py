"""Images that were made from a dataset, kept as uint8, in samples that look like its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from entprop_wrap.data.batches import images_and_labels, refuse_dataset
from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.data.validation import check_images
from entprop_wrap.errors import DataError


@dataclass(frozen=True, eq=False)
class GrownImages(Dataset[Any]):
    """Images in uint8, in samples of the form of other samples.

    Attributes:
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` or ``(N, C)``.
        space: Pixel space of the samples.
        dtype: Type of the images.
        keys: Keys of image and label in samples that are dicts; None: pairs.
        plain_labels: Whether labels are Python's integers.
        augment: Applied to an image whenever it is loaded; None: nothing is.
    """

    images: Tensor
    labels: Tensor
    space: PixelSpace
    dtype: torch.dtype
    keys: tuple[Any, Any] | None
    plain_labels: bool
    augment: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        pixels = self.images[index].to(self.dtype)[None] / 255
        image = self.space.to_images(pixels)[0]
        image = image if self.augment is None else self.augment(image)
        label: Any = int(self.labels[index]) if self.plain_labels else self.labels[index]
        return (image, label) if self.keys is None else dict(zip(self.keys, (image, label), strict=True))


def to_bytes(images: Tensor, space: PixelSpace) -> Tensor:
    """Return images ``(N, C, H, W)`` in ``space`` as uint8, rounded."""
    return (255 * space.to_pixels(images)).round().to(torch.uint8)


def without_augmentation(dataset: Any) -> Any:
    """Return ``dataset``, a map-style one, with the grown images in it as they are stored."""
    if isinstance(dataset, DataLoader):
        raise DataError("grow() takes a dataset, found a DataLoader. Write grow(model, loader.dataset, ...).")
    refuse_dataset(dataset, "dataset")
    if isinstance(dataset, ConcatDataset):
        return ConcatDataset([without_augmentation(part) for part in dataset.datasets])
    return replace(dataset, augment=None) if isinstance(dataset, GrownImages) else dataset


def form_of(dataset: Any, space: PixelSpace) -> dict[str, Any]:
    """Return how samples look, after a trial: a grown one makes a batch with another."""
    sample = dataset[0]
    batch = collate([sample])
    images, labels = images_and_labels(batch, "dataset")
    check_images(images, space)
    keys = None
    if isinstance(batch, Mapping):
        keys = tuple(next(key for key, value in batch.items() if value is part) for part in (images, labels))
    label = sample[1 if keys is None else keys[1]]
    form: dict[str, Any] = {"dtype": images.dtype, "keys": keys, "plain_labels": not isinstance(label, Tensor)}
    collate([sample, GrownImages(to_bytes(images, space), labels, space, **form)[0]])
    return form


def collate(samples: list[Any]) -> Any:
    """Return a batch, or raise :class:`DataError` where the samples do not make one."""
    try:
        return default_collate(samples)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"dataset: its samples do not make a batch with grown ones ({error}). Expected an image, a floating-point "
            "tensor (C, H, W) of one size, a label, and nothing else."
        ) from error
