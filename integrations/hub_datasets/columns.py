"""Which columns of a dataset hold images and labels, and labels of any kind to class indices 0 .. C-1.

Training and evaluation have one mapping of labels. It goes through the *value* of a label (its name where it has one),
never through the stored integer: two splits may declare the same classes in a different order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from entprop_wrap.errors import DataError, LabelError

_IMAGE_NAMES = (
    "image", "img", "images", "picture", "photo", "jpg", "jpeg", "png", "webp", "pixel_values",
    "image_path", "image_file_path", "img_path", "file_path", "filepath", "file_name", "filename", "path",
)  # fmt: skip
_LABEL_NAMES = (
    "label", "labels", "target", "targets", "class", "classes", "cls", "category", "label_id", "class_id",
    "class_label", "class_name", "label_name", "category_id", "y",
)  # fmt: skip


def find_image_column(features: datasets.Features, named: str | None = None) -> str:
    """Return the column the user names, else that of type `datasets.Image`, else paths or bytes under a usual name."""
    possible = [name for name, feature in features.items() if _may_hold_image(feature)]
    typed = [name for name in possible if isinstance(features[name], datasets.Image)]
    usual = [name for name in possible if name.lower() in _IMAGE_NAMES]
    found = typed or usual if named is None else [name for name in possible if name == named]
    return _only(found, features, "image", "images, paths or bytes", named)


def find_label_column(features: datasets.Features, named: str | None = None) -> str:
    """Return the column the user names, else the only one of type `datasets.ClassLabel` or under a usual name."""
    possible = [name for name, feature in features.items() if _is_label(feature)]
    typed = [name for name in possible if isinstance(features[name], datasets.ClassLabel)]
    usual = [name for name in possible if name.lower() in _LABEL_NAMES]
    found = [name for name in typed if name in usual] or [*typed, *usual]
    if named is not None:
        found = [name for name in possible if name == named]
    return _only(found, features, "label", "one class per image: text, integers or ClassLabel", named)


def _only(found: Sequence[str], features: datasets.Features, what: str, kinds: str, named: str | None) -> str:
    """Return the only one found, or that called ``what``."""
    for best in ([name for name in found if name.lower() == what], found):
        if len(best) == 1:
            return best[0]
    types = {n: str(f.dtype) if isinstance(f, datasets.Value) else type(f).__name__ for n, f in features.items()}
    columns = ", ".join(f"{name!r} ({kind})" for name, kind in types.items())
    choices = " or ".join(f"{what}_column={name!r}" for name in found) or f"another {what}_column=..."
    given = "" if named is None else f" in {what}_column={named!r}"
    raise DataError(f"Expected a column of {what}s ({kinds}){given}, found columns {columns}: pass {choices}.")


def _may_hold_image(feature: Any) -> bool:
    text = ("string", "large_string", "binary", "large_binary")
    cell = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    return cell or isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in text


def _is_label(feature: Any) -> bool:
    kinds = ("string", "large_string", "int", "uint", "bool", "null")
    return isinstance(feature, (datasets.ClassLabel, datasets.Value)) and str(feature.dtype).startswith(kinds)


LabelValue = str | int | None


def class_indices(values: Sequence[LabelValue], index: Mapping[str | int, int], where: str) -> list[int]:
    """Return the class indices of label values, by the index of each; messages say ``where`` these are."""
    if missing := sum(value is None for value in values):
        raise LabelError(
            f"Expected a label for every image of {where}, found {missing:,} of {len(values):,} without one (empty "
            "or -1): drop them with dataset.filter(...), or name another split."
        )
    if unknown := sorted({str(value) for value in values if value not in index}):
        names = [key for key in index if isinstance(key, str)]
        write = "pass classes=... with all of them"
        if names and any(isinstance(value, int) and value not in index for value in values):
            write = (
                f"integers, where classes have names ({some(names)}). Give them theirs: dataset.cast_column(column, "
                "datasets.ClassLabel(names=[...])), whose names count from 0"
            )
        raise LabelError(f"Expected only the classes of training in {where}, found {some(unknown)}: {write}.")
    return [index[value] for value in values if value is not None]


def read_labels(rows: datasets.Dataset, column: str) -> list[LabelValue]:
    """Return all labels of a column as class names or integers, and None where an image is unlabelled."""
    values = rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names: list[str] = feature.names
        if (most := max((value for value in values if value is not None), default=-1)) >= len(names):
            raise LabelError(f"Expected labels below {len(names)}, the number of class names, found {most}.")
        return [None if value is None or value < 0 else names[value] for value in values]  # the Hub's -1: unlabelled
    return [None] * len(values) if set(values) == {-1} else [v if isinstance(v, str | None) else int(v) for v in values]


def number_classes(
    values: Sequence[LabelValue], feature: Any, classes: Sequence[str | int] | None, notes: list[str]
) -> tuple[tuple[str, ...], dict[str | int, int]]:
    """Return the class names, and the index of each label value.

    Classes are as given, else of the `ClassLabel` in its order, else the sorted label values. ``values``
    are the labels of the training split. ``notes`` gets a sentence where integers are renumbered or declared classes
    have no image.
    """
    found: set[Any] = set(values) - {None}
    keys: list[Any]
    if classes is not None:
        keys = list(classes)
    elif isinstance(feature, datasets.ClassLabel):
        keys = list(feature.names)
        if found and (unseen := [key for key in keys if key not in found]):
            notes.append(f"{len(unseen)} of the {len(keys)} declared classes have no training image: {some(unseen)}")
    else:
        keys = sorted(found)
        if -1 in found and found != {-1, 1}:
            raise LabelError(
                f"Expected classes, found -1 among the integers {some(keys)}, which often means 'unlabelled': drop "
                "those images with dataset.filter(...), or pass classes=[-1, ...] if it is a class."
            )
        if keys != list(range(len(keys))) and not isinstance(keys[0], str):
            notes.append(
                f"the {len(keys)} integer labels {some(keys)} were renumbered 0..{len(keys) - 1} in this order"
            )
    if classes is not None and len({isinstance(key, str) for key in keys}) > 1:
        raise DataError(f"classes must be all names or all integers, found {some(keys)}.")
    if len(keys) < 2 or len(set(keys)) < len(keys):
        raise DataError(
            f"Expected at least two classes, every one once, found {some(keys) or 'none'}: pass label_column=... with "
            "the right one; of class folders, the folder that holds them directly; or, for labels in a table, write a "
            "metadata.csv with the columns file_name and label."
        )
    index = {key: position for position, key in enumerate(keys)}
    integers = isinstance(feature, datasets.Value) and str(feature.dtype).startswith(("int", "uint", "bool"))
    if integers and all(isinstance(key, str) for key in keys):  # names for 0 .. C-1
        index |= {position: position for position in range(len(keys))}
    return tuple(map(str, keys)), index


def some(items: Sequence[Any]) -> str:
    """Return the first items, for a message."""
    shown = ", ".join(map(repr, items[:5]))
    return shown + (f", ... ({len(items)} in all)" if len(items) > 5 else "")
