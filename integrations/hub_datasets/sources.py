"""From a name, a path or an object to the splits of a dataset. Nothing is decoded here."""

import glob
import os
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from pyarrow import parquet
from torchvision.datasets.folder import IMG_EXTENSIONS

from entprop_wrap.errors import ConfigurationError, DataError
from entprop_wrap.integrations.hub_datasets.columns import some
from entprop_wrap.integrations.hub_datasets.splits import EVAL_NAMES, TRAIN_NAMES

_IMAGES = (*IMG_EXTENSIONS, ".gif", ".jfif")


def open_splits(source: Any, load_options: dict[str, Any], notes: list[str]) -> dict[str, datasets.Dataset]:
    """Return all splits of a dataset by name; the arguments are those of `load_images`.

    Errors of `datasets.load_dataset` (no such dataset, gated, no such configuration) pass through unchanged.
    """
    opened = source
    if isinstance(source, (str, os.PathLike)):
        opened = _open_path(os.fspath(source), load_options, notes)
    elif load_options:
        raise ConfigurationError(f"Expected no options of the Hub for opened data, found {load_options}.")
    if isinstance(opened, datasets.Dataset):
        opened = {str(opened.split or "train"): opened}
    splits = opened if isinstance(opened, dict) else {}
    if not splits or not all(isinstance(rows, datasets.Dataset) for rows in splits.values()):
        found = {name: type(rows).__name__ for name, rows in splits.items()}
        raise DataError(
            f"Expected a Hub id, a folder, a Dataset or a DatasetDict, found {found or type(opened).__name__}. Streams "
            "and torch datasets need no loader: any DataLoader of (image, label) will do."
        )
    return dict(splits)


def _open_path(name: str, load_options: dict[str, Any], notes: list[str]) -> Any:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "~", os.sep)) or name.count("/") > 1:
            raise DataError(f"Expected a folder or a Hub id, found {name!r}, which is not a folder.")
        return datasets.load_dataset(name, **load_options)
    if not load_options:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return datasets.load_from_disk(str(folder))
        if splits := read_class_folders(folder, notes):
            return splits
    _refuse_other_names(folder)
    return datasets.load_dataset(str(folder), **load_options)


def _refuse_other_names(folder: Path) -> None:
    """Raise if parquet files name their classes differently: `load_dataset` reads all with the names of the first."""
    declared: dict[str, tuple[Path, list[str]]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        for column, feature in datasets.Features.from_arrow_schema(parquet.read_schema(file)).items():
            if isinstance(feature, datasets.ClassLabel):
                first, names = declared.setdefault(column, (file, feature.names))
                if names != feature.names:
                    raise DataError(
                        f"{first.name} and {file.name} name the classes of {column!r} differently: {some(names)} and "
                        f"{some(feature.names)}. Read each by itself: load_images({{'train': datasets.Dataset."
                        "from_parquet(...), 'test': datasets.Dataset.from_parquet(...)})."
                    )


def read_class_folders(folder: Path, notes: list[str]) -> dict[str, datasets.Dataset] | None:
    """Return the splits of an image folder, or None where the folder is something else.

    Either ``folder/<class>/.../image`` (one split, ``train``) or ``folder/<split>/<class>/.../image``. It is read
    here rather than by the `imagefolder` builder, which takes splits from words anywhere in a path: a class folder
    ``test`` or a file ``dev_01.jpg`` moves images from one split to another. Files that are not images and whatever is
    hidden are ignored; files lie in the order of their names. ``notes`` gets what may have been meant otherwise.
    """
    tables = ImageFolder.METADATA_FILENAMES  # older versions of `datasets` read no metadata.parquet
    if any((place / name).is_file() for place in (folder, *folder.glob("*/")) for name in tables):
        return None  # labels come from a table: the `imagefolder` builder's own format
    found = glob.iglob("**/*", root_dir=folder, recursive=True)  # leaves out what is hidden, follows links
    paths = sorted(tuple(name.split(os.sep)) for name in found if name.lower().endswith(_IMAGES))
    tops = {parts[0] for parts in paths if len(parts) > 1}
    if not tops:
        return None
    names = [name for name in sorted(tops) if name.lower() in (*TRAIN_NAMES, *EVAL_NAMES)]
    train_has_classes = any(parts[0].lower() in TRAIN_NAMES and len(parts) > 2 for parts in paths)
    splits = {"train": _rows(folder, paths)}
    if names and (train_has_classes or len(names) == len(tops)):
        splits = {name: _rows(folder / name, [parts[1:] for parts in paths if parts[0] == name]) for name in names}
    labelled = (rows.features["label"].names for rows in splits.values() if "label" in rows.features)
    if classes := sorted({name for names in labelled for name in names}):
        notes.append(f"the {len(classes)} classes are the names of folders: {some(classes)}")
    if left := len(paths) - sum(map(len, splits.values())):
        notes.append(f"{left:,} of {len(paths):,} images are left out: they lie in no folder of a class that is read")
    if unread := sorted(p.name for p in folder.glob("*.*") if p.suffix in (".csv", ".tsv", ".jsonl", ".parquet")):
        notes.append(f"not read: {some(unread)} (labels would be read from a metadata.csv)")
    return splits


def _rows(folder: Path, paths: list[tuple[str, ...]]) -> datasets.Dataset:
    """Return one split: a label for every file under a class folder; no labels where there are no such folders."""
    classes = sorted({parts[0] for parts in paths if len(parts) > 1})
    files = [parts for parts in paths if len(parts) > 1] or paths
    features = datasets.Features({"image": datasets.Image()})
    columns: dict[str, list[Any]] = {"image": [str(folder.joinpath(*parts)) for parts in files]}
    if classes:
        features["label"] = datasets.ClassLabel(names=classes)
        columns["label"] = [parts[0] for parts in files]
    return datasets.Dataset.from_dict(columns, features=features)
