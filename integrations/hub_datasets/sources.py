"""From a name, a path or an object to the splits of a data set. Nothing is decoded here."""

import os
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from entprop_wrap.errors import ConfigurationError, DataError
from entprop_wrap.integrations.hub_datasets.class_folders import class_folders, how_read

__all__ = ["open_splits"]

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


def open_splits(
    source: Any, config: str | None = None, streaming: bool = False, **load_options: Any
) -> tuple[dict[str, Rows], list[str]]:
    """Open a data set: all its splits, by name, and notes on how it was read.

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
    return _streamed(splits) if streaming else splits, []


def _open_path(
    name: str, config: str | None, streaming: bool, load_options: dict[str, Any]
) -> tuple[dict[str, Rows], list[str]]:
    path = Path(name).expanduser()
    if path.is_dir():
        local, notes = _open_local(path, search=not load_options)
        if local is not None:
            _refuse(config, load_options, f"the folder {name!r}")
            return _streamed(local) if streaming else local, notes
    elif name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise DataError(f"Expected a folder or a Hub id, found {name!r}, which does not exist.")
    opened = datasets.load_dataset(str(path) if path.is_dir() else name, config, streaming=streaming, **load_options)
    if isinstance(opened, dict):
        return dict(opened), []
    return {str(load_options.get("split") or opened.split or "train"): opened}, []


def _open_local(path: Path, search: bool) -> tuple[dict[str, Rows] | None, list[str]]:
    """What is read here rather than by a builder: what ``save_to_disk`` wrote, and, if ``search``, class folders."""
    saved = _open_saved(path)
    if saved is not None or not search:
        return saved, []
    folders = class_folders(path)
    return (None, []) if folders is None else ({**folders}, how_read(path, folders))


def _open_saved(path: Path) -> dict[str, Rows] | None:
    """What ``save_to_disk`` wrote, or None."""
    if not ((path / "dataset_dict.json").is_file() or (path / "state.json").is_file()):
        return None
    opened = datasets.load_from_disk(str(path))
    return dict(opened) if isinstance(opened, dict) else {str(opened.split or "train"): opened}


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
