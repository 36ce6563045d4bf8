"""From a name, a path or an object to the splits of a dataset. Nothing is decoded here."""

import os
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from entprop_wrap.errors import ConfigurationError, DataError
from entprop_wrap.integrations.hub_datasets.class_folders import read_class_folders

__all__ = ["Rows", "open_splits"]

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


def open_splits(
    source: Any, config: str | None, streaming: bool, load_options: dict[str, Any]
) -> tuple[dict[str, Rows], list[str]]:
    """Return all splits of a dataset by name, and notes on how it was read; the arguments are those of `load_images`.

    Errors of `datasets.load_dataset` (no such dataset, gated, no such configuration) pass through unchanged.
    """
    notes: list[str] = []
    opened: Any = source
    if isinstance(source, (str, os.PathLike)):
        name, path = os.fspath(source), Path(source).expanduser()
        if not path.is_dir() and (name.startswith((".", "~", os.sep)) or name.count("/") > 1):
            raise DataError(f"Expected a folder or a Hub id, found {name!r}, which does not exist.")
        opened = _open_folder(path, not load_options, notes) if path.is_dir() else None
        if opened is None:
            place = str(path) if path.is_dir() else name
            opened = datasets.load_dataset(place, config, streaming=streaming, **load_options)
            if not isinstance(opened, dict) and "split" in load_options:
                opened = {str(load_options["split"]): opened}
            config, load_options = None, {}
    if isinstance(opened, Rows):
        opened = {str(opened.split or "train"): opened}
    if not isinstance(opened, dict):
        raise DataError(
            f"Expected a Hub id, a folder, a Dataset or a DatasetDict, found {type(source).__name__}: a torch dataset "
            "needs no loader, any DataLoader of (image, label) will do."
        )
    wrong = [f"{name!r}: {type(rows).__name__}" for name, rows in opened.items() if not isinstance(rows, Rows)]
    if wrong or not opened:
        raise DataError(f"Expected splits of type Dataset or IterableDataset, found {', '.join(wrong) or 'none'}.")
    given = ({} if config is None else {"config": config}) | load_options
    if given:
        options = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ConfigurationError(f"Expected no options of the Hub for opened or local data, found {options}.")
    if streaming:
        opened = {
            key: rows.to_iterable_dataset() if isinstance(rows, datasets.Dataset) else rows
            for key, rows in opened.items()
        }
    return dict(opened), notes


def _open_folder(path: Path, search: bool, notes: list[str]) -> Any:
    """Open what ``save_to_disk`` wrote, or, if ``search``, class folders; None leaves the folder to a builder."""
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(path))
    return read_class_folders(path, notes) if search else None
