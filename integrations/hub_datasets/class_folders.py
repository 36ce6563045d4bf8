"""Folders whose subfolders are the classes of the images in them."""

import glob
import os
from pathlib import Path
from typing import Any

import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from entprop_wrap.integrations.hub_datasets.splits import EVAL_NAMES, TRAIN_NAMES

__all__ = ["read_class_folders"]

_EXTENSIONS = (*IMG_EXTENSIONS, ".gif")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# What folders are called that are parts of a dataset rather than classes.
_PARTS = {
    *TRAIN_NAMES, *EVAL_NAMES, "annotation", "annotations", "data", "image", "images", "img", "imgs", "jpegimages",
    "label", "labels", "mask", "masks", "segmentation", "segmentations", "trimaps",
}  # fmt: skip


def read_class_folders(folder: Path, notes: list[str]) -> dict[str, datasets.Dataset] | None:
    """Return the splits of an image folder, or None where the folder is something else.

    Either ``folder/<class>/.../image`` (one split, ``train``) or ``folder/<split>/<class>/.../image``. It is read
    here rather than by the `imagefolder` builder, which takes splits from words anywhere in a path: a class folder
    ``test`` or a file ``dev_01.jpg`` moves images from one split to another. Files that are not images and whatever is
    hidden are ignored; files lie in the order of their names. ``notes`` gets what may have been meant otherwise.
    """
    if any((place / name).is_file() for place in (folder, *folder.glob("*/")) for name in _METADATA):
        return None  # labels come from a table: the `imagefolder` builder's own format
    found = glob.iglob("**/*", root_dir=folder, recursive=True)  # leaves out what is hidden, follows links
    paths = sorted(tuple(name.split(os.sep)) for name in found if name.lower().endswith(_EXTENSIONS))
    tops = {parts[0] for parts in paths if len(parts) > 1}
    if not tops:
        return None
    names = [name for name in sorted(tops) if name.lower() in (*TRAIN_NAMES, *EVAL_NAMES)]
    train_has_classes = any(parts[0].lower() in TRAIN_NAMES and len(parts) > 2 for parts in paths)
    if names and (train_has_classes or len(names) == len(tops)):
        splits = {name: _rows(folder / name, [parts[1:] for parts in paths if parts[0] == name]) for name in names}
    else:
        splits = {"train": _rows(folder, paths)}
    _note(folder, splits, notes)
    return splits


def _rows(folder: Path, paths: list[tuple[str, ...]]) -> datasets.Dataset:
    """Return one split: a label for every file under a class folder; no labels where there are no such folders."""
    classes = sorted({parts[0] for parts in paths if len(parts) > 1})
    files = [parts for parts in paths if len(parts) > 1] if classes else paths
    features = datasets.Features({"image": datasets.Image()})
    columns: dict[str, list[Any]] = {"image": [str(folder.joinpath(*parts)) for parts in files]}
    if classes:
        features["label"] = datasets.ClassLabel(names=classes)
        columns["label"] = [parts[0] for parts in files]
    return datasets.Dataset.from_dict(columns, features=features)


def _note(folder: Path, splits: dict[str, datasets.Dataset], notes: list[str]) -> None:
    labelled = [rows.features["label"].names for rows in splits.values() if "label" in rows.features]
    classes = sorted({name for names in labelled for name in names})
    if classes:
        shown = ", ".join(map(repr, classes[:5])) + (", ..." if len(classes) > 5 else "")
        notes.append(f"the {len(classes)} classes are the names of folders: {shown}")
    if doubtful := ", ".join(repr(name) for name in classes if name.lower() in _PARTS):
        notes.append(
            f"read as classes, but called like parts of a dataset: {doubtful}; if they are, pass the folder that holds "
            "the class folders, or write metadata.csv with the columns file_name and label"
        )
    tables = sorted(path.name for path in folder.glob("*.*") if path.suffix in (".csv", ".tsv", ".jsonl", ".parquet"))
    if tables:
        notes.append(f"not read: {', '.join(map(repr, tables))} (labels would be read from a metadata.csv)")
