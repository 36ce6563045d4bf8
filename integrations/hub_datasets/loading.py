"""`load_images`: from a name, a folder or an opened dataset to images for training and evaluation."""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from entprop_wrap.errors import DataError
from entprop_wrap.integrations.hub_datasets.columns import (
    class_indices,
    find_image_column,
    find_label_column,
    number_classes,
    read_labels,
    some,
)
from entprop_wrap.integrations.hub_datasets.images import BrokenImageError, LabelledImages
from entprop_wrap.integrations.hub_datasets.sources import open_splits
from entprop_wrap.integrations.hub_datasets.splits import split_names, stratified_sample, stratified_split
from entprop_wrap.utils.options import check_choice, check_integer, check_number, check_seed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageData:
    """Images to train on and to evaluate on, under one numbering of the classes.

    Attributes:
        train: Gives (image, class index).
        eval: Gives (image, class index).
        classes: C class names, in the order of their indices.
        notes: What was decided for the user (splits, labels, images left out), in sentences; they are logged too.
    """

    train: LabelledImages
    eval: LabelledImages
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by index, as Hugging Face configurations take them."""
        return dict(enumerate(self.classes))

    @property
    def label2id(self) -> dict[str, int]:
        """Indices by class name, as Hugging Face configurations take them."""
        return {name: index for index, name in enumerate(self.classes)}

    def with_transforms(self, train: Callable[[Any], Any] | None, eval: Callable[[Any], Any] | None) -> "ImageData":
        """Return the same data under other transforms."""
        return dataclasses.replace(self, train=self.train.with_transform(train), eval=self.eval.with_transform(eval))


def load_images(
    path_or_name: Any,
    *,
    train_split: str | None = None,
    eval_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str | int] | None = None,
    train_transform: Callable[[Any], Any] | None = None,
    eval_transform: Callable[[Any], Any] | None = None,
    eval_fraction: float = 0.2,
    max_train: int | None = None,
    max_eval: int | None = None,
    on_broken: str = "skip",
    seed: int = 0,
    **load_options: Any,
) -> ImageData:
    """Load any image classification dataset: upright RGB images (`to_rgb`), in an order that never changes.

    What is not given is found out, and said in ``notes`` where it could have been meant otherwise.

    Args:
        path_or_name: A Hub id; a folder of parquet or other data files, of images with a ``metadata.csv``, of class
            folders (with or without split folders above them), or written by ``save_to_disk``; or an opened
            `datasets.Dataset` or `DatasetDict`.
        train_split: Split to train on; by default ``train``, or the only one.
        eval_split: Split to evaluate on; by default ``validation``, else ``test``, under their usual spellings, if its
            images have labels. Otherwise ``eval_fraction`` of every class of the training split, at least one image;
            classes of a single image stay in training.
        image_column: By default the column of type `Image`, else paths or bytes under a usual name.
        label_column: By default the column of type `ClassLabel`, else a column under a usual name.
        classes: Label values in the order of their indices, for example those of a trained model; or names for the
            integer labels 0 .. C-1. By default from the training split.
        train_transform: From an RGB PIL image to a tensor; without one, ``train`` gives PIL images.
        eval_transform: The same for ``eval``.
        eval_fraction: Share of the images to hold out where no split can be evaluated on, in (0, 1).
        max_train: Maximum number of training images, every class in proportion.
        max_eval: The same for evaluation.
        on_broken: ``"skip"``: every image is decoded once here, and those that cannot be read are left out. For large
            data ``"raise"``: nothing is decoded here, and such an image raises `BrokenImageError` when it is reached.
        seed: Seed of held-out images, of ``max_train`` and of ``max_eval``.
        **load_options: For `datasets.load_dataset`: ``name`` (the configuration), ``revision``, ``data_files``, ...

    Raises:
        DataError: No labels, no such or ambiguous columns or splits, multi-label data, fewer than two classes.
        LabelError: Images without a label, or evaluation labels that training does not have.
        ConfigurationError: An option is out of its range or contradicts another.
    """
    check_choice("on_broken", on_broken, ("skip", "raise"))
    check_number("eval_fraction", eval_fraction, lambda share: 0 < share < 1, "between 0 and 1")
    check_seed(seed)  # NumPy would take None, and hold out other images in each run
    for name, limit in (("max_train", max_train), ("max_eval", max_eval)):
        if limit is not None:
            check_integer(name, limit, 1)

    notes: list[str] = []
    splits = open_splits(path_or_name, load_options, notes)
    train_name, eval_names = split_names(list(splits), train_split, eval_split)
    rows = splits[train_name]
    image_column = find_image_column(rows.features, image_column)
    label_column = find_label_column(rows.features, label_column)
    values = read_labels(rows, label_column)
    if not values:
        raise DataError(f"Expected images in split {train_name!r}, found none.")
    names, index = number_classes(values, rows.features[label_column], classes, notes)

    def labelled(name: str) -> LabelledImages:
        where = f"split {name!r}"
        labels = class_indices(read_labels(splits[name], label_column), index, where)
        return LabelledImages(splits[name], image_column, labels, where)

    train, evaluate = labelled(train_name), None
    for place, name in enumerate(eval_names, start=1):
        problem = _problem(splits[name], image_column, label_column)
        if problem is None:
            evaluate = labelled(name)
            if rest := some(eval_names[place:]):
                notes.append(f"evaluating on split {name!r}; {rest} not touched (eval_split=... names another)")
            break
        if eval_split is not None:
            raise DataError(f"Expected labelled images in eval_split={name!r}, found a split that {problem}.")
        notes.append(f"split {name!r} is not used: it {problem}")
    if evaluate is None:
        train, evaluate = _hold_out(train, eval_fraction, seed, notes)
    train, evaluate = _limited(train, max_train, seed, notes), _limited(evaluate, max_eval, seed, notes)
    if on_broken == "skip":
        train, evaluate = _readable(train, notes), _readable(evaluate, notes)
    there = set(evaluate.labels.tolist())
    if untested := [name for number, name in enumerate(names) if number not in there]:
        notes.append(f"classes without images to evaluate on, so that nothing is known of them: {some(untested)}")
    for note in notes:
        logger.warning("%s: %s", path_or_name if isinstance(path_or_name, str) else "data", note)
    data = ImageData(train, evaluate, names, tuple(notes))
    return data.with_transforms(train_transform, eval_transform)


def _problem(rows: datasets.Dataset, image_column: str, label_column: str) -> str | None:
    """Return why a split cannot be evaluated on, or None."""
    if missing := [name for name in (image_column, label_column) if name not in rows.features]:
        return f"has no column {missing[0]!r}"
    values = read_labels(rows, label_column)
    if all(value is None for value in values):
        return "has no labels" if values else "is empty"
    return None


def _hold_out(
    images: LabelledImages, fraction: float, seed: int, notes: list[str]
) -> tuple[LabelledImages, LabelledImages]:
    """Cut a labelled split in two."""
    kept, held_out = stratified_split(images.labels, fraction, seed)
    if len(held_out) == 0:
        raise DataError(
            f"Expected an evaluation split, or two images of a class to hold one out, found one image of each class "
            f"in {images.name}: pass eval_split=..."
        )
    notes.append(
        f"no split to evaluate on: {len(held_out):,} of the {len(images):,} images of {images.name} are held out, "
        f"{fraction:.0%} of every class, seed {seed}"
    )
    return images.select(kept), images.select(held_out, name=f"{images.name} (held out)")


def _limited(images: LabelledImages, limit: int | None, seed: int, notes: list[str]) -> LabelledImages:
    if limit is None or limit >= len(images):
        return images
    notes.append(f"{limit:,} of the {len(images):,} images of {images.name} are used, every class in proportion")
    return images.select(stratified_sample(images.labels, limit, seed))


def _readable(images: LabelledImages, notes: list[str]) -> LabelledImages:
    """Decode every image once, and leave out those that cannot be read."""

    def broken(index: int) -> bool:
        try:
            images.read(index)
        except BrokenImageError as error:
            logger.warning("left out: %s", error)
            return True
        return False

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        lost = np.fromiter(pool.map(broken, range(len(images))), bool)
    if lost.all():
        raise DataError(f"Expected readable images in {images.name}, found none among {len(images):,}.")
    if lost.any():
        notes.append(
            f"{lost.sum():,} of the {len(images):,} images of {images.name} cannot be read and are left out: rows "
            f"{some(images.positions[lost].tolist())}"
        )
        return images.select(np.flatnonzero(~lost))
    return images
