"""A small dataset decoded once: uint8 images of one size in memory, for many epochs without decoding again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import ImageOps
from PIL.Image import Resampling
from torch import Tensor
from torch.utils.data import Dataset

from entprop_wrap.errors import DataError
from entprop_wrap.integrations.hub_datasets.decoding import BrokenImageError
from entprop_wrap.integrations.hub_datasets.image_datasets import LabelledImages
from entprop_wrap.utils.options import check_integer

__all__ = ["InMemoryImages", "in_memory"]


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
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


def in_memory(dataset: LabelledImages, size: int, transform: Callable[[Tensor], Any] | None = None) -> InMemoryImages:
    """Decode a dataset once: short side to ``size`` pixels, then the central square.

    Takes ``3 * size**2`` bytes an image (128 px: 49 kB). For random crops choose ``size`` somewhat above the size of
    the crops. The dataset's own transform is not applied. Unreadable images are left out under ``on_broken="skip"``,
    else raise.

    Raises:
        DataError: No image can be read.
    """
    check_integer("size", size, 1)
    images = torch.empty((len(dataset), 3, size, size), dtype=torch.uint8)
    kept: list[int] = []
    for index in range(len(dataset)):
        try:
            square = ImageOps.fit(dataset.read(index), (size, size), Resampling.BILINEAR)
        except BrokenImageError as error:
            dataset.mark_broken(index, error)
            continue
        images[len(kept)] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
        kept.append(index)
    if not kept:
        raise DataError(f"Expected readable images in {dataset.name}, found none among {len(dataset):,}.")
    return InMemoryImages(images[: len(kept)], dataset.labels[kept], transform)
