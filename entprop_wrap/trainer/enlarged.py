"""A data set together with what it has grown, whose images are kept as uint8."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from entprop_wrap.data.batches import Form, form_of
from entprop_wrap.data.pixel_space import PixelSpace

__all__ = ["Enlarged", "from_bytes", "to_bytes"]


class Enlarged(Dataset[Any]):
    """A data set and what it has grown; samples in the form of the data set, or as pairs without augmentation.

    Args:
        data: The data set that it began with.
        parts: For each phase "images" ``(n, C, H, W)`` uint8 and "labels".
        form: Of the samples of ``data``.
        space: Pixel space of the images.
        augment: Applied to grown images; None: nothing is.
        pairs: Return ``(image, label)``, whatever the form of the data.
    """

    def __init__(
        self,
        data: Any,
        parts: list[dict[str, Tensor]],
        form: Form,
        space: PixelSpace,
        augment: Callable[[Tensor], Tensor] | None = None,
        *,
        pairs: bool = False,
    ) -> None:
        self.data, self.parts, self.form, self.space = data, list(parts), form, space
        self.augment, self.pairs = augment, pairs

    def __len__(self) -> int:
        size: int = len(self.data) * 2 ** len(self.parts)
        return size

    def __getitem__(self, index: Hashable) -> Any:
        assert isinstance(index, int)
        if index < len(self.data):
            sample = self.data[index]
            return form_of(sample, "A sample").take(sample) if self.pairs else sample
        phase = (index // len(self.data)).bit_length() - 1
        row = index - len(self.data) * 2**phase
        part = self.parts[phase]
        image, label = from_bytes(part["images"][row], self.space, self.form.dtype), part["labels"][row]
        if self.augment is not None:
            image = self.augment(image)
        return (image, self.form.label(label)) if self.pairs else self.form.give(image, label)


def to_bytes(images: Tensor, space: PixelSpace) -> Tensor:
    """Return images ``(N, C, H, W)`` in ``space`` as uint8, rounded."""
    pixels = (images - space.bounds(images)[0]) / space.scale(images)
    return (255 * pixels).round().clamp(0, 255).to(torch.uint8)


def from_bytes(image: Tensor, space: PixelSpace, dtype: torch.dtype) -> Tensor:
    """Return the image ``(C, H, W)`` in ``space`` that is ``image`` in uint8."""
    pixels = image.to(dtype)[None] / 255
    return (pixels * space.scale(pixels) + space.bounds(pixels)[0])[0]
