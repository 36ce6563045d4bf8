"""Folders whose subfolders are the classes of the images in them."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from entprop_wrap.errors import DataError
from entprop_wrap.integrations.hub_datasets.splits import EVAL_NAMES, TRAIN_NAMES

__all__ = ["class_folders", "how_read"]

_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# What folders are called that are parts of a data set rather than classes.
_PARTS = {
    *TRAIN_NAMES, *EVAL_NAMES, "annotation", "annotations", "data", "image", "images", "img", "imgs", "jpegimages",
    "label", "labels", "mask", "masks", "segmentation", "segmentations", "trimaps",
}  # fmt: skip


def class_folders(folder: Path) -> dict[str, datasets.Dataset] | None:
    """The splits of an image folder, or None where the folder is something else.

    Either ``folder/<class>/.../image`` (one split, ``train``) or ``folder/<split>/<class>/.../image``. It is read
    here rather than by the `imagefolder` builder, which takes splits from words anywhere in a path: a class folder
    ``test`` or a file ``dev_01.jpg`` moves images from one split to another. Files that are no images and hidden
    folders are ignored; files lie in the order of their names.
    """
    if any((place / name).is_file() for place in (folder, *_folders(folder)) for name in _METADATA):
        return None  # labels come from a table: the `imagefolder` builder's own format
    children = [child for child in _folders(folder) if _has_images(child)]
    if not children:
        return None
    names = {*TRAIN_NAMES, *EVAL_NAMES}
    splits = [child for child in children if child.name.lower() in names]
    train_has_classes = any(
        child.name.lower() in TRAIN_NAMES and any(_has_images(inner) for inner in _folders(child)) for child in splits
    )
    if splits and (train_has_classes or len(splits) == len(children)):
        return {child.name: _read_classes(child) for child in splits}
    return {"train": _read_classes(folder)}


def how_read(folder: Path, splits: dict[str, datasets.Dataset]) -> list[str]:
    """Notes on what `class_folders` has made of a folder, as it may have been meant otherwise.

    Raises:
        DataError: A single class beside a table, which then has the labels.
    """
    labelled = [rows.features["label"].names for rows in splits.values() if "label" in rows.features]
    classes = sorted({name for names in labelled for name in names})
    tables = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in _TABLES and file.is_file())
    if not classes:
        return []
    if len(classes) == 1 and tables:
        raise DataError(
            f"Expected a folder for each class, or a table metadata.csv, .jsonl or .parquet, found the images in "
            f"{classes[0]!r} alone, beside {', '.join(map(repr, tables))}: if that has the labels, write them to "
            "metadata.csv in the same place, with the columns file_name (relative to it) and label."
        )
    shown = ", ".join(map(repr, classes[:5])) + (", ..." if len(classes) > 5 else "")
    notes = [f"the {len(classes)} classes are the names of folders: {shown}"]
    doubtful = [name for name in classes if name.lower() in _PARTS]
    if doubtful:
        notes.append(
            f"{', '.join(map(repr, doubtful))} {'is' if len(doubtful) == 1 else 'are'} read as a class, but called "
            "like a part of a data set: if so, pass the folder that holds a folder for each class, or write "
            "metadata.csv with the columns file_name and label"
        )
    if tables:
        notes.append(f"not read: {', '.join(map(repr, tables))} (labels would be read from a metadata.csv)")
    return notes


def _read_classes(folder: Path) -> datasets.Dataset:
    """One split: an image and a label for every file under a class folder; no labels where there are none."""
    classes = [child for child in _folders(folder) if _has_images(child)]
    files = [(file, label) for label, child in enumerate(classes) for file in _images(child)]
    features = datasets.Features({"image": datasets.Image()})
    columns: dict[str, list[Any]] = {"image": [file for file, _ in files] or list(_images(folder))}
    if files:
        features["label"] = datasets.ClassLabel(names=[child.name for child in classes])
        columns["label"] = [label for _, label in files]
    return datasets.Dataset.from_dict(columns, features=features)


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _has_images(folder: Path) -> bool:
    return next(_images(folder), None) is not None


def _images(folder: Path) -> Iterator[str]:
    for place, inner, files in os.walk(folder, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for file in sorted(files):
            if file.lower().endswith(_EXTENSIONS) and not file.startswith("."):
                yield os.path.join(place, file)
