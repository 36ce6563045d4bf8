"""Datasets, loaders and batches in the forms that a Trainer and an evaluation take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from entprop_wrap.errors import DataError

_IMAGES = ("pixel_values", "images", "image")
_LABELS = ("labels", "label")


def images_and_labels(batch: Any, name: str = "The data") -> tuple[Tensor, Tensor]:
    """Return images and labels of a batch: a pair, or a mapping with "pixel_values", "images" or "image", and labels.

    ``name`` is what messages call the data.
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
            f"and 'labels' or 'label'; found {found}."
        )
    return images, labels


def refuse_dataset(data: Any, name: str) -> None:
    """Raise :class:`DataError` unless ``data`` is a map-style dataset with something in it."""
    single = getattr(data, "ndim", 1) == 0 or isinstance(data, type)
    if isinstance(data, IterableDataset) or single or not all(hasattr(data, n) for n in ("__getitem__", "__len__")):
        raise DataError(
            f"{name}: expected a map-style dataset (with __len__ and __getitem__) or a DataLoader over one, found "
            f"{type(data).__name__}. Load a stream whole."
        )
    if isinstance(data, Mapping):
        raise DataError(
            f"{name}: expected one dataset, found a {type(data).__name__} with {', '.join(map(repr, data))}. Pass one "
            f"split: data[{next(iter(data), 'train')!r}]."
        )
    if len(data) == 0:
        raise DataError(f"{name} is empty. Expected at least one batch.")


def refuse_loader(loader: DataLoader[Any], name: str) -> None:
    """Raise :class:`DataError` unless ``loader`` makes batches of a whole map-style dataset."""
    if isinstance(loader.dataset, IterableDataset):
        refuse_dataset(loader.dataset, name)
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise DataError(
            f"{name}: {type(loader).__name__} has an __iter__ of its own, which would not be called: the Trainer makes "
            "the batches. Expected a torch DataLoader, from before accelerator.prepare(); change batches in collate_fn."
        )
    if loader.batch_sampler is None:
        raise DataError(
            f"{name}: expected a DataLoader that makes batches, found batch_size=None. Write batch_size=64, say."
        )
    if isinstance(getattr(loader.batch_sampler, "sampler", None), DistributedSampler):
        raise DataError(
            f"{name}: found a DataLoader with a DistributedSampler. Expected one over the whole data, which the "
            "Trainer shares out."
        )
    if len(loader.dataset) == 0:  # type: ignore[arg-type]
        raise DataError(f"{name} is empty. Expected at least one batch.")
