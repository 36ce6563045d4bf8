"""From a list of (image, label) to a batch, for ``DataLoader(..., collate_fn=...)``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from entprop_wrap.errors import ImageError

__all__ = ["collate", "hf_collate"]


def collate(samples: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Stack B pairs of a tensor ``(3, H, W)`` and a label: an int, or soft labels ``(C,)``.

    Returns:
        Images ``(B, 3, H, W)`` and labels ``(B,)`` int64, or ``(B, C)``.

    Raises:
        ImageError: Images that are not tensors, or of several sizes.
    """
    images, labels = zip(*samples, strict=True)
    found = {tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__ for image in images}
    if len(found) > 1 or not isinstance(images[0], Tensor):
        raise ImageError(
            f"Expected tensors (3, H, W) of one size, found {sorted(found, key=str)[:5]}: give the dataset a transform "
            "that ends with a crop or a resize to (height, width), such as train_transform(224)."
        )
    return torch.stack(images), torch.stack([torch.as_tensor(label) for label in labels])


def hf_collate(samples: Sequence[tuple[Any, Any]]) -> dict[str, Tensor]:
    """Stack samples into ``{"pixel_values": (B, 3, H, W), "labels": (B,)}``, as Hugging Face models take them."""
    images, labels = collate(samples)
    return {"pixel_values": images, "labels": labels}
