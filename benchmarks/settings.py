"""What a sweep trains and how it evaluates: plain descriptions, which a run table tells apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, Subset

from entprop_wrap.methods import Method
from entprop_wrap.train.options import DIGITS, SMALL


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, whatever the method. Data and model are as in train.py; so are the defaults, for digits.

    Attributes:
        share: Part of the training images that is used, every class in proportion, in (0, 1]. The number of steps stays
            the same: a tenth of the images is trained on for ten times as many epochs. Where there are fewer images
            than a batch holds, all of them are the batch.
    """

    dataset: str = DIGITS
    model: str = SMALL
    pretrained: bool = False
    image_size: int | None = None
    max_train: int | None = None
    max_eval: int | None = None
    train_split: str | None = None
    eval_split: str | None = None
    in_memory: bool = False
    share: float = 1.0
    epochs: int = 60
    batch_size: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    warmup: float = 0.1
    channels_last: bool = False


@dataclass(frozen=True)
class Setting:
    """One thing to train, with any seed.

    Attributes:
        recipe: How.
        method: With what in a step.
        grows: Whether the data grows in phases, as ME-ADA's does.
        start: What is trained first, whose weights this begins with; None: a new model.
    """

    recipe: Recipe
    method: Method
    grows: bool = False
    start: Setting | None = None


@dataclass(frozen=True)
class Protocol:
    """How models are evaluated.

    Attributes:
        images: Test images, a seeded part of all; None: all.
        severities: Of the 15 corruptions.
        epsilon: Of a PGD-20 attack on the clean images, as a fraction of the pixel range; None: no attack.
    """

    images: int | None = 500
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    epsilon: float | None = None


#: The fields of a recipe that data and model depend on.
_DATA = (
    "dataset",
    "model",
    "pretrained",
    "image_size",
    "max_train",
    "max_eval",
    "train_split",
    "eval_split",
    "in_memory",
)


def whole_data(recipe: Recipe) -> Recipe:
    """Return a recipe that only says what data and what model: the same for all settings that share them."""
    return Recipe(**{name: getattr(recipe, name) for name in _DATA})


def part_of(images: Dataset, share: float) -> Dataset:
    """Return a seeded ``share`` of a dataset in (0, 1], every class in proportion and with at least one image."""
    if share == 1:
        return images
    labels = images.tensors[1] if hasattr(images, "tensors") else images.labels
    chosen = []
    generator = torch.Generator().manual_seed(0)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        chosen += rows[: max(1, round(share * len(rows)))].tolist()
    return Subset(images, sorted(chosen))
