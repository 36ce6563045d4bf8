"""The data: scikit-learn's digits, an image folder, or an image dataset of the Hub."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import accelerate
import datasets
import torch
from torch.utils.data import Subset, TensorDataset

from entprop_wrap.cli.options import DIGITS
from entprop_wrap.data.pixel_space import PixelSpace
from entprop_wrap.errors import DataError
from entprop_wrap.integrations.hub_datasets import eval_transform, in_memory, load_images, train_transform


@dataclass
class Data:
    """A dataset, ready for any model: images are float ``(3, H, W)`` in ``space``, labels are integers."""

    name: str  # in the table
    classes: tuple[str, ...]  # in the order of the labels
    train: Any
    test: Any  # that everything is measured on, while training and after
    space: PixelSpace
    unchanged: Any  # the training images, neither augmented nor cropped at random


def load(options: Namespace, space: PixelSpace, size: int) -> Data:
    """Load ``options.dataset`` for a model that takes images of ``size`` pixels in ``space``."""
    data = digits(options, space) if options.dataset == DIGITS else images(options, space, size)
    number = len(data.test)
    if options.robustness_images and options.robustness_images < number:
        chosen = torch.randperm(number, generator=torch.Generator().manual_seed(0))
        data.test = Subset(data.test, chosen[: options.robustness_images].tolist())
    return data


def say(note: str) -> None:
    """Print a note, once, however many processes there are."""
    if accelerate.PartialState().is_main_process:
        print(f"note: {note}", flush=True)


def digits(options: Namespace, space: PixelSpace) -> Data:
    """Return 8x8 digits as RGB of 32 px or ``options.image_size``: a few hundred to train on, the rest tests."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw, labels = load_digits(return_X_y=True)
    pixels = torch.tensor(raw, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    pixels = torch.nn.functional.interpolate(pixels, size=options.image_size or 32, mode="bilinear")
    pixels = pixels.clamp(0, 1).expand(-1, 3, -1, -1)
    normalised = (pixels - torch.tensor(space.mean).view(-1, 1, 1)) / torch.tensor(space.std).view(-1, 1, 1)
    size = options.max_train or 300
    if not 10 <= size <= len(labels) - 10:
        raise DataError(f"--max-train of digits: expected 10 to {len(labels) - 10:,} images, found {size:,}.")
    train, test = train_test_split(range(len(labels)), train_size=size, stratify=labels, random_state=0)
    targets = torch.tensor(labels)
    images, tests = (TensorDataset(normalised[rows].contiguous(), targets[rows]) for rows in (train, test))
    return Data("digits", tuple("0123456789"), images, tests, space, images)


def images(options: Namespace, space: PixelSpace, size: int) -> Data:
    """Return a local folder or a dataset of the Hub."""
    train: Callable[[Any], Any] = train_transform(size, normalize=space)
    evaluate: Callable[[Any], Any] = eval_transform(size, normalize=space)
    logger = logging.getLogger(load_images.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)  # its notes are printed here
    try:
        data = load_images(
            options.dataset,
            train_split=options.train_split,
            eval_split=options.eval_split,
            image_column=options.image_column,
            label_column=options.label_column,
            train_transform=train,
            eval_transform=evaluate,
            max_train=options.max_train,
            max_eval=options.max_eval,
        )
    except DataError:
        raise
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"--dataset {options.dataset}: {str(error).strip().rstrip('.') or type(error).__name__}. Expected a folder "
            "with a folder of images for each class, or with a table; or the id of a dataset of the Hub."
        ) from error
    finally:
        logger.setLevel(level)
    for note in data.notes:
        say(note)
    name = options.dataset.rstrip("/").rsplit("/", 1)[-1]
    if not options.in_memory:
        return Data(name, data.classes, data.train, data.eval, space, data.train.with_transform(evaluate))
    # A little larger than the model's input, so that random crops still have something to choose from.
    kept, tests = (in_memory(part, round(size * 8 / 7), evaluate) for part in (data.train, data.eval))
    return Data(name, data.classes, replace(kept, transform=train), tests, space, kept)
