"""From a name, a path or an object to the splits of a data set. Nothing is decoded here."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from entprop_wrap.errors import ConfigurationError, DataError

from .splits import EVAL_NAMES, TRAIN_NAMES

__all__ = ["class_folders", "open_splits"]

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset

_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def open_splits(
    source: Any, config: str | None = None, streaming: bool = False, **load_options: Any
) -> dict[str, Rows]:
    """Open a data set: all its splits, by name.

    Args:
        source: A Hub id; a folder of data files, of class folders, or written by ``save_to_disk``; the name of a
            builder such as ``"parquet"`` with ``data_files=...``; or an opened data set, with or without splits.
        config: Configuration of a Hub data set.
        streaming: Open it as `datasets.IterableDataset`.
        **load_options: For `datasets.load_dataset`, whose own errors (no such data set, gated, no such configuration)
            pass through unchanged.

    Raises:
        ConfigurationError: An option that this kind of source does not have.
        DataError: A path that does not exist, or something that is no data set.
    """
    if isinstance(source, dict):  # DatasetDict and IterableDatasetDict are dicts
        splits: dict[str, Rows] = dict(source)
    elif isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        splits = {str(source.split or "train"): source}
    elif isinstance(source, (str, os.PathLike)):
        return _open_path(os.fspath(source), config, streaming, load_options)
    else:
        raise DataError(
            f"Expected a Hub id, a folder, a Dataset or a DatasetDict, found {type(source).__name__}: for a torch "
            "data set of your own no loader is needed, any DataLoader of (image, label) will do."
        )
    wrong = [f"{name!r}: {type(rows).__name__}" for name, rows in splits.items() if not isinstance(rows, Rows)]
    if wrong or not splits:
        raise DataError(f"Expected splits of type Dataset or IterableDataset, found {', '.join(wrong) or 'none'}.")
    _refuse(config, load_options, "an opened data set")
    return _streamed(splits) if streaming else splits


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


def _open_path(name: str, config: str | None, streaming: bool, load_options: dict[str, Any]) -> dict[str, Rows]:
    path = Path(name).expanduser()
    if path.is_dir():
        local = _open_saved(path) or (None if load_options else class_folders(path))
        if local is not None:
            _refuse(config, load_options, f"the folder {name!r}")
            return _streamed(local) if streaming else local
    elif name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise DataError(f"Expected a folder or a Hub id, found {name!r}, which does not exist.")
    opened = datasets.load_dataset(str(path) if path.is_dir() else name, config, streaming=streaming, **load_options)
    return (
        dict(opened)
        if isinstance(opened, dict)
        else {str(load_options.get("split") or opened.split or "train"): opened}
    )


def _open_saved(path: Path) -> dict[str, Rows] | None:
    """What ``save_to_disk`` wrote, or None."""
    if not ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return None
    opened = datasets.load_from_disk(str(path))
    return dict(opened) if isinstance(opened, dict) else {str(opened.split or "train"): opened}


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


def _streamed(splits: dict[str, Rows]) -> dict[str, Rows]:
    return {
        name: rows.to_iterable_dataset() if isinstance(rows, datasets.Dataset) else rows
        for name, rows in splits.items()
    }


def _refuse(config: str | None, load_options: dict[str, Any], where: str) -> None:
    given = {**({} if config is None else {"config": config}), **load_options}
    if given:
        options = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ConfigurationError(f"Expected no options of the Hub for {where}, found {options}: leave them out.")
