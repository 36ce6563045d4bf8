"""What data a Trainer and an evaluation take: which datasets, and which form of batches."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from entprop_wrap.errors import DataError

__all__ = ["Form", "form_of", "images_and_labels", "refuse_dataset", "refuse_loader"]

_IMAGES = ("pixel_values", "images", "image")
_LABELS = ("labels", "label")


def images_and_labels(batch: Any, name: str = "The data") -> tuple[Tensor, Tensor]:
    """Return ``images (N, C, H, W)`` and ``labels`` of a batch.

    Args:
        batch: ``(images, labels)``, or a mapping with "pixel_values", "images" or "image", and "labels" or "label".
        name: What messages call the data.

    Raises:
        DataError: The batch is of another form; the message says what it holds.
    """
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in _IMAGES if key in batch), None)
        labels = next((batch[key] for key in _LABELS if key in batch), None)
        found = f"a dict with {', '.join(map(repr, batch))}"
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        (images, labels), found = batch, f"({type(batch[0]).__name__}, {type(batch[1]).__name__})"
    else:
        images, labels, found = None, None, type(batch).__name__
        found = f"{found} of {len(batch)} items" if isinstance(batch, (tuple, list)) else f"{found} without labels"
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise DataError(
            f"{name}: expected batches (images, labels) of tensors, or dicts with 'pixel_values', 'images' or 'image' "
            f"and 'labels' or 'label'; found {found}. Return both from the dataset, or from a DataLoader's collate_fn."
        )
    return images, labels


@dataclass(frozen=True)
class Form:
    """Where a sample has its image and its label, and of which types they are.

    Attributes:
        image: Key or index of the image.
        target: Key or index of the label.
        mapping: Whether samples are dicts, rather than pairs.
        dtype: Of images.
        label_type: A type of tensors, or None where labels are plain integers.
    """

    image: Any
    target: Any
    mapping: bool
    dtype: torch.dtype
    label_type: torch.dtype | None

    def take(self, sample: Any) -> tuple[Tensor, Any]:
        """Return image and label of a sample."""
        return sample[self.image], sample[self.target]

    def give(self, image: Tensor, label: Tensor) -> Any:
        """Return a sample of this form."""
        if self.mapping:
            return {self.image: image, self.target: self.label(label)}
        return image, self.label(label)

    def label(self, label: Tensor) -> Any:
        """Return a label as samples of this form have it."""
        return int(label) if self.label_type is None else label.to(self.label_type)


def form_of(sample: Any, name: str) -> Form:
    """Return the form of a sample that is an image tensor, its label, and nothing else.

    Raises:
        DataError: It is of another form.
    """
    if isinstance(sample, Mapping):
        keys: list[Any] = [next((key for key in names if key in sample), None) for names in (_IMAGES, _LABELS)]
        good, found = len(sample) == 2 and None not in keys, f"a dict with {', '.join(map(repr, sample))}"
    else:
        keys, good = [0, 1], isinstance(sample, (tuple, list)) and len(sample) == 2
        found = type(sample).__name__
    if good:
        image, label = sample[keys[0]], sample[keys[1]]
        whole = isinstance(label, numbers.Integral) and not isinstance(label, bool)
        good = isinstance(image, Tensor) and image.ndim == 3 and image.is_floating_point()
        good = good and (whole or (isinstance(label, Tensor) and label.ndim <= 1))
        found = f"({type(image).__name__}, {type(label).__name__})"
        if good:
            label_type = None if whole else label.dtype
            return Form(keys[0], keys[1], isinstance(sample, Mapping), image.dtype, label_type)
    raise DataError(
        f"{name}: expected samples of an image, a floating-point tensor (C, H, W), and a label, an integer or tensor, "
        f"and nothing else, so that more of them can be made; found {found}. Let the dataset return these, rather "
        "than a collate_fn."
    )


def refuse_dataset(data: Any, name: str) -> None:
    """Raise :class:`DataError` unless ``data`` is a map-style dataset with something in it."""
    if isinstance(data, IterableDataset) or not _has_rows(data):
        raise DataError(
            f"{name}: expected a map-style dataset (with __len__ and __getitem__) or a DataLoader over one, found "
            f"{type(data).__name__}. A stream has no order to repeat and no place to resume from: load it whole."
        )
    if isinstance(data, Mapping):
        raise DataError(
            f"{name}: expected one dataset, found a {type(data).__name__} with {', '.join(map(repr, data))}. Pass one "
            f"split: data[{next(iter(data), 'train')!r}]."
        )
    if len(data) == 0:
        raise DataError(f"{name} is empty. Expected at least one batch.")


def _has_rows(data: Any) -> bool:
    single = getattr(data, "ndim", 1) == 0 or isinstance(data, type)
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not single


def refuse_loader(loader: DataLoader[Any], name: str) -> None:
    """Raise :class:`DataError` unless ``loader`` makes batches of a whole map-style dataset."""
    if isinstance(loader.dataset, IterableDataset):
        refuse_dataset(loader.dataset, name)
    if loader.batch_sampler is None:
        raise DataError(
            f"{name}: expected a DataLoader that makes batches, found batch_size=None. Write batch_size=64, say."
        )
    if isinstance(getattr(loader.batch_sampler, "sampler", None), DistributedSampler):
        raise DataError(
            f"{name}: found a DataLoader with a DistributedSampler. Expected one over the whole data: the Trainer "
            "gives each process its share."
        )
    if len(loader.dataset) == 0:  # type: ignore[arg-type]
        raise DataError(f"{name} is empty. Expected at least one batch.")
