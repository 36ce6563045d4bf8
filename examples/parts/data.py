"""Data for train.py: scikit-learn's digits, an image folder, or an image data set of the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from entprop_wrap import PixelSpace
from entprop_wrap.integrations.hub_datasets import eval_transform, in_memory, load_images, train_transform

DIGITS = "digits"


@dataclass
class Data:
    """A data set, ready for any model.

    Attributes:
        name: What to call it in the table.
        classes: Class names, in the order of the labels.
        train: Images to train on: float ``(3, H, W)``, normalised to ``space``, and an integer label.
        eval: Images for clean accuracy.
        robustness: Images for robust accuracy: ``eval``, or a seeded part of it.
        space: What the images were normalised with.
    """

    name: str
    classes: tuple[str, ...]
    train: Dataset
    eval: Dataset
    robustness: Dataset
    space: PixelSpace

    def loader(self, images: Dataset, batch_size: int, workers: int) -> DataLoader:
        """Return a loader in a fixed order."""
        return DataLoader(images, batch_size=batch_size, num_workers=workers)


def load(options, space: PixelSpace, size: int) -> Data:
    """Load ``options.dataset`` for a model that takes images of ``size`` pixels in ``space``."""
    data = digits(options, space) if options.dataset == DIGITS else images(options, space, size)
    if options.robustness_images and options.robustness_images < len(data.eval):
        chosen = torch.randperm(len(data.eval), generator=torch.Generator().manual_seed(0))
        data.robustness = Subset(data.eval, chosen[: options.robustness_images].tolist())
    return data


def digits(options, space: PixelSpace) -> Data:
    """Return 8x8 digits as 32 px RGB: a few hundred to train on (small data is the paper's claim), the rest tests."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(raw, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    pixels = torch.nn.functional.interpolate(pixels, size=32, mode="bilinear").clamp(0, 1).expand(-1, 3, -1, -1)
    normalised = (pixels - torch.tensor(space.mean).view(-1, 1, 1)) / torch.tensor(space.std).view(-1, 1, 1)
    size = options.max_train or 300
    train, test = train_test_split(range(len(labels)), train_size=size, stratify=labels, random_state=0)
    targets = torch.tensor(labels)
    parts = [TensorDataset(normalised[rows].contiguous(), targets[rows]) for rows in (train, test)]
    return Data("digits", tuple("0123456789"), *parts, parts[1], space)


def images(options, space: PixelSpace, size: int) -> Data:
    """Return a local folder or a data set of the Hub."""
    train: Callable = train_transform(size, normalize=space)
    evaluate: Callable = eval_transform(size, normalize=space)
    data = load_images(
        options.dataset,
        train_split=options.train_split,
        eval_split=options.eval_split,
        train_transform=train,
        eval_transform=evaluate,
        max_train=options.max_train,
        max_eval=options.max_eval,
    )
    for note in data.notes:
        print(f"note: {note}")
    sets = [data.train, data.eval]
    if options.in_memory:
        # A little larger than the model's input, so that random crops still have something to choose from.
        sets = [
            in_memory(part, round(size * 8 / 7), transform)
            for part, transform in zip(sets, (train, evaluate), strict=True)
        ]
    return Data(str(options.dataset).rstrip("/").rsplit("/", 1)[-1], data.classes, *sets, sets[1], space)
