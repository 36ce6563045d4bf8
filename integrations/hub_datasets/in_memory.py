"""A small data set decoded once: uint8 images of one size in memory, for many epochs without decoding again."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from entprop_wrap.errors import ConfigurationError, DataError, ImageError, LabelError
from entprop_wrap.integrations.hub_datasets.decoding import BrokenImageError
from entprop_wrap.integrations.hub_datasets.image_datasets import LabelledImages

__all__ = ["InMemoryImages", "in_memory", "random_crop_flip"]


class InMemoryImages(Dataset[tuple[Any, int]]):
    """Images of one size and their labels, as two tensors.

    ``dataset[i]`` is ``(transform(image), label)`` with a uint8 image ``(3, H, W)``; the torchvision v2 transforms of
    `train_transform` and `eval_transform` take such tensors. For whole batches without a DataLoader:
    ``dataset.images[indices]``, ``dataset.labels[indices]`` and `random_crop_flip`.

    Args:
        images: ``(N, 3, H, W)`` uint8, 0 to 255.
        labels: ``(N,)`` int64 class indices.
        transform: Applied to each image.

    Raises:
        ImageError, LabelError: Other shapes or types.
    """

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Any] | None = None) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ImageError(
                f"Expected uint8 images (N, 3, H, W), found {images.dtype} {tuple(images.shape)}: for floats in "
                "[0, 1] write (images * 255).round().to(torch.uint8)."
            )
        if labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise LabelError(f"Expected int64 labels ({len(images)},), found {labels.dtype} {tuple(labels.shape)}.")
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])

    def with_transform(self, transform: Callable[[Tensor], Any] | None) -> "InMemoryImages":
        """The same tensors, not copied, under another transform."""
        return InMemoryImages(self.images, self.labels, transform)


def in_memory(dataset: LabelledImages, size: int, transform: Callable[[Tensor], Any] | None = None) -> InMemoryImages:
    """Decode a data set once: short side to ``size``, then the central square.

    Takes ``3 * size**2`` bytes an image (128 px: 49 kB; 10,000 images: 0.5 GB). For random crops choose ``size``
    somewhat above the size of the crops. The data set's own transform is not applied.

    Args:
        dataset: Images to decode, each once. Unreadable ones are left out under ``on_broken="skip"``, else raise.
        size: Height and width, in pixels.
        transform: Applied to each uint8 image of the result.

    Raises:
        ConfigurationError: ``size`` is not a positive integer.
        DataError: No image can be read.
    """
    if not isinstance(size, int) or size < 1:
        raise ConfigurationError(f"Expected size as a positive number of pixels, found {size!r}.")
    images = torch.empty((len(dataset), 3, size, size), dtype=torch.uint8)
    kept: list[int] = []
    for index in range(len(dataset)):
        try:
            image = dataset.read(index)
        except BrokenImageError as error:
            if dataset.on_broken == "raise":
                raise
            dataset.mark_broken(index, error)
            continue
        square = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        images[len(kept)] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        kept.append(index)
    if not kept:
        raise DataError(f"Expected readable images in {dataset.name}, found none among {len(dataset):,}.")
    return InMemoryImages(images[: len(kept)], dataset.labels[kept], transform)


def random_crop_flip(images: Tensor, size: int, flip: bool = True, generator: torch.Generator | None = None) -> Tensor:
    """A random square of every image of a batch, half of them mirrored, without a loop.

    Args:
        images: ``(B, C, H, W)``, any type.
        size: Of the squares, in pixels, at most ``min(H, W)``.
        flip: Mirror left and right with probability 1/2, each image by itself.
        generator: On the device of the images.

    Returns:
        ``(B, C, size, size)`` of the same type.

    Raises:
        ImageError: Not a batch, or smaller than ``size``.
    """
    if images.ndim != 4 or not 0 < size <= min(images.shape[-2:]):
        raise ImageError(f"Expected images (B, C, H, W) of at least {size} px, found {tuple(images.shape)}.")
    batch, _, height, width = images.shape
    device = images.device
    top = torch.randint(height - size + 1, (batch,), generator=generator, device=device)
    left = torch.randint(width - size + 1, (batch,), generator=generator, device=device)
    windows = images.unfold(2, size, 1).unfold(3, size, 1)  # a view: every square of every image
    squares = windows[torch.arange(batch, device=device), :, top, left]
    if not flip:
        return squares
    mirrored = torch.rand((batch, 1, 1, 1), generator=generator, device=device) < 0.5
    return torch.where(mirrored, squares.flip(3), squares)
