"""Image classification data for training and evaluation, from the Hugging Face Hub, a folder or memory.

    data = load_images("timm/oxford-iiit-pet", train_transform=train_transform(224), eval_transform=eval_transform(224))
    loader = DataLoader(data.train, batch_size=64, shuffle=True, num_workers=4, collate_fn=collate)
    model = AutoModelForImageClassification.from_pretrained(name, id2label=data.id2label, label2id=data.label2id)

Everything one needs is importable from here; the parts are in ``image_data`` beside this module.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from entprop_wrap.integrations.hub_datasets.collating import MixedCollate, collate, hf_collate
from entprop_wrap.integrations.hub_datasets.decoding import BrokenImageError, to_rgb
from entprop_wrap.integrations.hub_datasets.formats import ImageFormat, image_format
from entprop_wrap.integrations.hub_datasets.image_datasets import LabelledImages, StreamedImages
from entprop_wrap.integrations.hub_datasets.in_memory import InMemoryImages, in_memory, random_crop_flip
from entprop_wrap.integrations.hub_datasets.labels import LabelMap
from entprop_wrap.integrations.hub_datasets.load_options import LoadOptions, OnBroken
from entprop_wrap.integrations.hub_datasets.parts import stored_images, streamed_images
from entprop_wrap.integrations.hub_datasets.sources import open_splits
from entprop_wrap.integrations.hub_datasets.transforms import eval_transform, train_transform

__all__ = [
    "BrokenImageError",
    "ImageData",
    "ImageFormat",
    "InMemoryImages",
    "LabelledImages",
    "MixedCollate",
    "StreamedImages",
    "collate",
    "eval_transform",
    "hf_collate",
    "image_format",
    "in_memory",
    "load_images",
    "random_crop_flip",
    "to_rgb",
    "train_transform",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageData:
    """Images to train on and to evaluate on, under one numbering of the classes.

    Attributes:
        train: Gives (image, class index).
        eval: Likewise; the image of every index is a different one.
        classes: C class names, in the order of their indices.
        notes: What was decided for the user (splits, labels, images left out), in sentences; they are logged too.
    """

    train: LabelledImages | StreamedImages
    eval: LabelledImages | StreamedImages
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
        """The same data under other transforms."""
        return dataclasses.replace(self, train=self.train.with_transform(train), eval=self.eval.with_transform(eval))


def load_images(
    path_or_name: Any,
    *,
    config: str | None = None,
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
    on_broken: OnBroken = "skip",
    streaming: bool = False,
    shuffle_buffer: int = 1000,
    seed: int = 0,
    **load_options: Any,
) -> ImageData:
    """Load any image classification data set.

    What is not given is found out, and said in ``notes`` where it could have been meant otherwise. Images come out
    upright and RGB (`to_rgb`), in an order that never changes.

    Args:
        path_or_name: A Hub id; a folder of parquet or other data files, of images with a ``metadata.csv``, of class
            folders (with or without split folders above them), or written by ``save_to_disk``; or an opened
            `datasets.Dataset` or `DatasetDict`.
        config: Configuration of a Hub data set.
        train_split: Split to train on, or a slice such as ``"train[:80%]"``; by default ``train``, or the only one.
        eval_split: Split to evaluate on; by default ``validation``, else ``test``, under their usual spellings, if its
            images have labels. Otherwise ``eval_fraction`` of every class of the training split, at least one image;
            classes of a single image stay in training.
        image_column: By default the column of type `Image`, else strings or bytes under a usual name.
        label_column: By default the column of type `ClassLabel`, else a usual name, else the only column of text that
            can be one.
        classes: Label values in the order their indices shall have, for example those of a trained model; or names
            for the integer labels 0 .. C-1. By default from the training split.
        train_transform: From an RGB PIL image to a tensor; without one, ``train`` gives PIL images.
        eval_transform: Likewise for ``eval``.
        eval_fraction: Share of the images to hold out where no split can be evaluated on, in (0, 1).
        max_train: Train on so many images, every class in proportion (of a stream: the first so many).
        max_eval: Evaluate on so many, likewise.
        on_broken: ``"skip"``: evaluation images are decoded once here and the unreadable ones left out; in training
            the next readable image stands in, counted by ``train.broken``. ``"raise"``: nothing is decoded here, and
            an unreadable image raises `BrokenImageError` with its index when it is reached.
        streaming: Read while training instead of downloading first: both parts are then `StreamedImages`. Needs an
            evaluation split, and labels of type `ClassLabel` or ``classes``.
        shuffle_buffer: Training images a stream shuffles among; 0 keeps their order.
        seed: Of held-out images, of ``max_train`` and ``max_eval``, and of the shuffled stream.
        **load_options: For `datasets.load_dataset`: ``revision``, ``token``, ``data_files``, ``cache_dir``, ...

    Raises:
        DataError: No labels, no such or ambiguous columns or splits, multi-label data, fewer than two classes.
        LabelError: Images without a label, or evaluation labels that training does not have.
        ConfigurationError: An option is out of its range or contradicts another.
    """
    options = LoadOptions(
        train_split=train_split,
        eval_split=eval_split,
        image_column=image_column,
        label_column=label_column,
        classes=classes,
        train_transform=train_transform,
        eval_transform=eval_transform,
        eval_fraction=eval_fraction,
        max_train=max_train,
        max_eval=max_eval,
        on_broken=on_broken,
        shuffle_buffer=shuffle_buffer,
        seed=seed,
    )
    splits, how = open_splits(path_or_name, config, streaming, **load_options)
    streams = any(isinstance(rows, datasets.IterableDataset) for rows in splits.values())
    assemble: Callable[..., tuple[Any, Any, LabelMap, list[str]]] = streamed_images if streams else stored_images
    train, evaluate, labels, notes = assemble(splits, options)
    notes = [*how, *notes]
    for note in notes:
        logger.warning("%s: %s", path_or_name if isinstance(path_or_name, str) else "data", note)
    return ImageData(train, evaluate, labels.classes, tuple(notes))
